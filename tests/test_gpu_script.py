"""The script that builds, tests and times everything on a GPU, with programs that only pretend to."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_report.sh"
TESTS_APART = ROOT / "scripts" / "gpu_tests.sh"
SETS = {
    "recurrent": ("build", "smoke", "gpu", "grid", "compile", "ladder", "suite", "memcheck", "racecheck"),
    "attention": (
        "build",
        "attention-primitives",
        "attention-smoke",
        "attention-gpu",
        "attention-hopper",
        "attention-grid",
        "attention-memcheck",
    ),
}
STAGES = SETS["recurrent"]
LIMIT = 526  # seconds that the stages of a call have

# Stands for python3, nvcc, nvidia-smi and compute-sanitizer. Writes down how it was called, and fails where
# STUB_FAILS, a regular expression, matches.
STUB = r"""#!/bin/bash
call="$(basename "$0") $*"
[[ $call == *" - "* || $call == *" -" || $call == *" -c "* ]] || printf '%s\n' "$call" >>"$STUB_CALLS"
case $call in
  *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  *sysconfig*) dirname "$STUB_CALLS" ;;
  *registers.py*) echo "3 kernels, 0 with spills" ;;
  *--tally*)
    while [[ $1 != --tally ]]; do shift; done
    [[ ${STUB_TALLY-} == none ]] || echo "${STUB_TALLY-12 of 12 tests ran, 0 failed, 0 skipped}" >"$2" ;;
  *"_run.py --out"*)
    hangs=$(grep -c -- "--resume" "$STUB_CALLS")
    if ((hangs < ${STUB_HANGS-0})); then exit 75; fi
    grid=grid file=results.json
    if [[ $call == *attention* ]]; then grid="attention grid" file=attention.json; fi
    printf -- '-- %s\nthe goals of the %s\n-- end of %s\n' "$grid" "$grid" "$grid"
    echo '{}' >"$3/$file" ;;
esac
echo "output of $call"
if [[ -n ${STUB_SLEEPS-} && $call =~ $STUB_SLEEPS ]]; then exec sleep 60; fi
if [[ -n ${STUB_FAILS-} && $call =~ $STUB_FAILS ]]; then exit 3; fi
"""


TALLY = r"\d+ of \d+ tests ran, \d+ failed, \d+ skipped"


@pytest.fixture
def checkout(tmp_path):
    """A root with the script in it, and a function that runs it and returns (status, stdout, calls, log)."""
    root, programs = tmp_path / "root", tmp_path / "bin"
    (root / "scripts").mkdir(parents=True)
    for script in (SCRIPT, TESTS_APART):
        shutil.copy(script, root / "scripts")
    programs.mkdir()
    for name in ("python3", "nvcc", "nvidia-smi", "compute-sanitizer"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)

    def start(*arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment |= {"PATH": f"{programs}:/usr/bin:/bin", "STUB_CALLS": str(calls), "HOME": str(tmp_path)}
        command = [root / "scripts" / "gpu_report.sh", tmp_path / "out", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        return done, calls.read_text().splitlines(), (tmp_path / "out" / "log.txt").read_text()

    return start


def stages(calls):
    patterns = {
        "build": "setup.py build_ext --inplace",
        "smoke": "^python .*gpu_run.py --smoke$",
        "gpu": r"pytest .*-m gpu and not slow tests/test_cuda_gpu.py$",
        "grid": "gpu_run.py --out",
        "compile": "pytest .*-m gpu and slow tests/test_cuda_gpu.py$",
        "ladder": "pytest .*-m gpu and not slow --ignore=tests/test_cuda_gpu.py --ignore-glob=",
        "suite": "pytest .*-m not slow and not gpu",
        "memcheck": "^compute-sanitizer --tool memcheck .*gpu_run.py",
        "racecheck": "^compute-sanitizer --tool racecheck .*gpu_run.py",
        "attention-smoke": "^python .*gpu_attention_run.py --smoke$",
        "attention-primitives": "pytest .*-m gpu tests/test_cuda_hopper.py$",
        "attention-gpu": "pytest .*-m gpu tests/test_cuda_attention.py$",
        "attention-hopper": "pytest .*-m gpu tests/test_cuda_attention_hopper.py$",
        "attention-grid": "gpu_attention_run.py --out",
        "derivatives": "^python benchmarks/derivatives.py --device cuda ",
        "attention-memcheck": "^compute-sanitizer --tool memcheck .*gpu_attention_run.py",
    }
    return [name for call in calls for name, pattern in patterns.items() if re.search(pattern, call)]


@pytest.mark.parametrize("script", [SCRIPT, TESTS_APART], ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)


def test_script_runs_every_stage_in_order_and_leaves_a_log(checkout, tmp_path):
    done, calls, log = checkout()
    assert done.returncode == 0, done.stdout + done.stderr
    assert stages(calls) == list(STAGES)
    for name in STAGES:
        assert re.search(rf"^{name} +\d+ s  ok(: {TALLY})?$", done.stdout, flags=re.M), done.stdout
    for name in ("gpu", "compile", "ladder", "suite"):
        assert re.search(rf"^{name} .*: {TALLY}$", done.stdout, flags=re.M), done.stdout
    assert "the goals of the grid" in done.stdout
    assert "output of python benchmarks/gpu_run.py --out" in log
    assert done.stdout.splitlines()[-1] in log
    assert (tmp_path / "out" / "registers.txt").read_text().startswith("3 kernels")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "log.txt",
        "registers.txt",
        "results.json",
    }


@pytest.mark.parametrize(
    "failing",
    ["setup.py", "--smoke$", "not slow tests/test_cuda_gpu", "gpu_run.py --out", "not gpu", "racecheck"],
)
def test_script_goes_on_after_a_stage_that_fails_and_says_so(checkout, failing):
    done, calls, _ = checkout(STUB_FAILS=failing)
    assert done.returncode == 1
    assert stages(calls) == list(STAGES)
    assert re.search(r"^\w+ +\d+ s  failed, status 3", done.stdout, flags=re.M), done.stdout
    assert "1 failed" in done.stdout


@pytest.mark.parametrize(
    ("tally", "failures"),
    [
        ("5 of 90 tests ran, 0 failed, 1 skipped", 0),
        ("5 of 90 tests ran, 2 failed, 1 skipped", 1),
        ("none", 1),
    ],
)
def test_script_tells_how_many_tests_ran_before_a_stage_was_cut(checkout, tmp_path, tally, failures):
    script = tmp_path / "root" / "scripts" / "gpu_report.sh"
    script.write_text(re.sub(r"\[ladder\]=\d+", "[ladder]=7", script.read_text()))
    done, _, log = checkout("ladder", STUB_SLEEPS="-m pytest ", STUB_TALLY=tally)
    assert done.returncode == failures, done.stdout
    told = "" if tally == "none" else f": {tally}"
    assert re.search(rf"^ladder +\d+ s  cut after its \d s{told}$", done.stdout, flags=re.M), done.stdout
    assert f"{failures} failed" in done.stdout
    assert told in log


def test_a_run_that_is_ended_from_outside_has_left_how_many_tests_ran(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_a.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): yield; assert False\n"
        "def test_fails_at_its_end(broken): pass\n"
        "@pytest.mark.skip\n"
        "def test_is_skipped(): pass\n"
        "def test_ends_the_process(): os._exit(9)\n"
        "def test_comes_after(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--tally", tmp_path / "tally", tmp_path]
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 9, done.stdout.decode()
    assert (tmp_path / "tally").read_text() == "3 of 6 tests ran, 2 failed, 1 skipped\n"


def test_script_goes_on_with_the_grid_after_a_case_that_hung(checkout):
    done, calls, _ = checkout("grid", STUB_HANGS="1")
    assert done.returncode == 1
    runs = [call for call in calls if "gpu_run.py --out" in call]
    assert ["--resume" in call for call in runs] == [False, True]
    assert "the goals" in done.stdout


def test_script_times_derivatives_if_asked_for(checkout):
    _, calls, _ = checkout("build", "derivatives")
    assert stages(calls) == ["build", "derivatives"]


def test_script_runs_only_the_stages_that_are_named(checkout):
    done, calls, _ = checkout("build", "grid")
    assert done.returncode == 0
    assert stages(calls) == ["build", "grid"]


GENERAL_TESTS = ("test_cuda_attention.py", "test_cuda_attention_gpu.py", "test_attention.py")
HOPPER_TESTS = ("test_cuda_attention_hopper.py", "test_cuda_attention_hopper_backward.py")


@pytest.fixture
def attention_tests(tmp_path):
    """The tests of attention's kernels, as the stage that runs them finds them."""
    (tmp_path / "root" / "tests").mkdir(parents=True)
    for name in GENERAL_TESTS + HOPPER_TESTS:
        (tmp_path / "root" / "tests" / name).touch()


@pytest.mark.usefixtures("attention_tests")
def test_script_runs_the_stages_of_attention_in_a_call_of_their_own(checkout, tmp_path):
    (tmp_path / "out").mkdir()
    kept = [tmp_path / "out" / name for name in ("results.json", "ratio_training.png")]
    old = [tmp_path / "out" / name for name in ("attention.json", "attention_training.png")]
    for path in (*kept, *old):
        path.write_text("of an earlier call")
    done, calls, log = checkout("attention")
    assert done.returncode == 0, done.stdout + done.stderr
    assert stages(calls) == list(SETS["attention"])
    for name in SETS["attention"]:
        assert re.search(rf"^{name} +\d+ s  ok(: {TALLY})?$", done.stdout, flags=re.M), done.stdout
    found = [call.rpartition("/")[2] for call in calls if "-m gpu tests" in call]
    assert found[0] == "test_cuda_hopper.py"
    assert set(found[1:-2]) == set(GENERAL_TESTS)
    assert set(found[-2:]) == set(HOPPER_TESTS), "last, since they are likeliest to hang"
    for name, files in (("attention-gpu", 3), ("attention-hopper", 2)):
        tally = f"{12 * files} of {12 * files} tests ran, 0 failed, 0 skipped"
        assert re.search(rf"^{name} .*: {tally}$", done.stdout, flags=re.M), done.stdout
    assert "the goals of the attention grid" in done.stdout
    assert "output of python benchmarks/gpu_attention_run.py --out" in log
    assert [path.exists() for path in kept] == [True, True], "what other stages left"
    assert (old[0].read_text(), old[1].exists()) == ("{}\n", False)


def test_script_goes_on_with_the_attention_grid_after_every_case_that_hung(checkout):
    done, calls, _ = checkout("attention-grid", STUB_HANGS="5")
    assert done.returncode == 1
    assert ["--resume" in call for call in calls if "_run.py --out" in call] == [False] + [True] * 5
    assert "the goals of the attention grid" in done.stdout


@pytest.mark.usefixtures("attention_tests")
@pytest.mark.parametrize(
    ("environment", "failures", "result"),
    [
        ({"STUB_FAILS": "test_cuda_attention_gpu"}, 1, "failed, status 1: 36 of 36 tests ran, 0 failed"),
        ({"STUB_SLEEPS": "test_cuda_attention_gpu"}, 0, r"cut after its \d+ s: 36 of 36 tests ran, 0 failed"),
    ],
)
def test_a_file_of_tests_that_hangs_or_fails_costs_no_other(
    checkout, tmp_path, environment, failures, result
):
    script = tmp_path / "root" / "scripts" / "gpu_report.sh"
    script.write_text(re.sub(r"\[attention-gpu\]=\d+", "[attention-gpu]=9", script.read_text()))
    done, _, log = checkout("attention-gpu", **environment)
    assert done.returncode == failures, done.stdout
    assert re.search(rf"^attention-gpu +\d+ s  {result}", done.stdout, flags=re.M), done.stdout
    for name in GENERAL_TESTS:
        assert re.search(rf"^output of python .* -m gpu tests/{name}$", log, flags=re.M), "what each printed"


@pytest.mark.parametrize(
    ("said", "status", "result"),
    [
        ("Device not supported", 0, "compute-sanitizer does not support this device"),
        ("Invalid __global__ write", 1, "failed, status 9"),
    ],
)
def test_a_sanitizer_that_the_device_refuses_is_no_failure(checkout, tmp_path, said, status, result):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '========= {said}'\nexit 9\n")
    done, _, _ = checkout("attention-memcheck")
    assert done.returncode == status
    assert re.search(rf"^attention-memcheck +\d+ s  {result}$", done.stdout, flags=re.M), done.stdout


def test_a_sanitizer_that_needs_more_time_is_no_failure(checkout, tmp_path):
    script = tmp_path / "root" / "scripts" / "gpu_report.sh"
    script.write_text(re.sub(r"\[attention-memcheck\]=\d+", "[attention-memcheck]=6", script.read_text()))
    done, _, _ = checkout("attention-memcheck", STUB_SLEEPS="^compute-sanitizer")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^attention-memcheck +\d+ s  cut after its \d s$", done.stdout, flags=re.M), done.stdout


def test_script_tells_the_goals_of_both_grids(checkout):
    done, calls, _ = checkout("grid", "attention-grid")
    assert stages(calls) == ["grid", "attention-grid"]
    goals = re.findall(r"^the goals of the .*$", done.stdout, flags=re.M)
    assert goals == ["the goals of the grid", "the goals of the attention grid"]


def shares():
    return {name: int(n) for name, n in re.findall(r"\[([\w-]+)\]=(\d+)", SCRIPT.read_text())}


@pytest.mark.parametrize("name", SETS)
def test_stages_of_a_set_fill_nine_minutes_and_no_more(name):
    assert sum(shares()[stage] for stage in SETS[name]) == LIMIT
    assert LIMIT + 10 < 540
    assert shares().keys() == set(SETS["recurrent"] + SETS["attention"] + ("derivatives",))


def test_time_that_no_stage_wants_is_the_grid_s(checkout):
    assert told(checkout("attention-grid")[0]) == {"attention-grid": LIMIT}
    build, smoke = (shares()[name] for name in ("build", "smoke"))
    both = told(checkout("build", "smoke", "grid")[0])
    assert both == {"build": build, "smoke": build + smoke, "grid": LIMIT}


@pytest.mark.usefixtures("attention_tests")
def test_more_stages_than_time_share_what_the_build_leaves(checkout):
    marks = told(checkout("recurrent", "attention")[0])
    assert set(marks) == set(SETS["recurrent"] + SETS["attention"])
    assert marks["build"] == shares()["build"]
    assert list(marks.values()) == sorted(marks.values())
    assert LIMIT - len(marks) <= marks["attention-memcheck"] <= LIMIT


def told(done):
    """{stage: its mark}, from "for so many seconds at most, at so many"."""
    lines = re.findall(r"^== (\S+), for (\d+) s at most, at (\d+) s$", done.stdout, flags=re.M)
    return {name: int(seconds) + int(start) for name, seconds, start in lines}
