"""Measuring on a GPU, as far as a machine without one can tell: the grid, its runner rehearsed on the CPU,
the goals, and README's table."""

import itertools
import json
import math
import os
import re
import threading
from types import SimpleNamespace

import pytest

from benchmark_runs import BENCHMARKS, PNG, README, rehearse, run, run_out_of_time

CASES = "^(LSTM|GRU) (inference|training) bfloat16 T2 B16 256->256$"  # four of the cases with a goal


@pytest.fixture
def modules(monkeypatch):
    """The modules beside the runner that draw nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import calibration
    import gpu_run
    import gpu_runner
    import gpu_summary
    import gpu_table
    import timers

    return {m.__name__: m for m in (calibration, gpu_run, gpu_runner, gpu_summary, gpu_table, timers)}


def test_grid_has_the_cases_that_the_project_is_judged_by(modules):
    cases = modules["gpu_run"].gpu_grid.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    batches, dtypes, modes = (
        (1, 8, 16, 64, 256),
        ("float32", "float16", "bfloat16"),
        ("inference", "training"),
    )
    single = {
        f"{cell} {mode} {dtype} T512 B{batch} {hidden}->{hidden}"
        for cell, mode, dtype, batch, hidden in itertools.product(
            ("LSTM", "GRU"), modes, dtypes, batches, (64, 128, 256, 512, 768, 1024, 2048)
        )
    }
    stacked = {
        f"{cell} {mode} {dtype} T512 B{batch} 512->512 x2 bidir"
        for cell, mode, dtype, batch in itertools.product(("LSTM", "GRU"), modes, dtypes, batches)
    }
    cells = {
        f"{cell}Cell {mode} {dtype} T1 B{batch} {hidden}->{hidden}"
        for cell, mode, dtype, batch, hidden in itertools.product(
            ("RNN", "LSTM", "GRU"), modes, ("float32", "bfloat16"), (1, 8, 64), (128, 512)
        )
    }
    rnn = {name for name in names if name.startswith("RNN ")}
    assert set(names) == single | stacked | rnn | cells
    assert len(rnn) == 3 * len(dtypes) * len(modes)
    assert len({name.split(maxsplit=3)[3] for name in rnn}) == 3


def test_grid_starts_with_the_goals_and_any_part_of_it_is_a_fair_sample(modules):
    cases = modules["gpu_run"].gpu_grid.cases()
    first = {(c.cell, c.dtype, c.shape.batch, c.shape.hidden) for c in cases[:6]}
    assert first == {
        ("LSTM", "float16", 16, 768),
        ("LSTM", "bfloat16", 16, 256),
        ("GRU", "bfloat16", 16, 256),
    }
    assert cases == modules["gpu_run"].gpu_grid.cases(), "the same order every time"
    tenth = cases[: len(cases) // 10]
    for key in (lambda c: c.cell, lambda c: c.dtype, lambda c: c.mode, lambda c: c.shape.hidden):
        assert set(map(key, tenth)) >= set(map(key, cases)) - {"RNN"}


# ------------------------------------------------------------------------------------------------ a rehearsal


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder and the output of rehearse()."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("gpu") / "results"
    return folder, rehearse("gpu_run.py", "results.json", CASES, folder)


def test_a_case_that_hangs_is_named_and_the_run_goes_on_after_it(rehearsal):
    folder, output = rehearsal
    results = json.loads((folder / "results.json").read_text())
    assert list(results["left_out"]) == ["LSTM inference bfloat16 T2 B16 256->256"]
    assert "hung" in results["left_out"]["LSTM inference bfloat16 T2 B16 256->256"]
    assert [r["name"].split()[:2] for r in results["cases"]] == [
        ["LSTM", "training"],
        ["GRU", "inference"],
        ["GRU", "training"],
    ]
    assert (results["planned"], results["complete"], results["dry_run"]) == (4, True, True)
    assert "hung" in output


@pytest.mark.parametrize(("samples", "hangs"), [([0.2] * 4, False), ([0.2, 5.0], True)])
def test_what_hangs_is_a_sample_and_not_a_case_of_many(modules, tmp_path, monkeypatch, samples, hangs):
    class Timer(modules["timers"].HostTimer):
        def sample(self, function, repeats):
            abandoned.wait(function)

    gpu_runner, abandoned = modules["gpu_runner"], threading.Event()
    monkeypatch.setattr(gpu_runner.Run, "file", "results.json")
    monkeypatch.setattr(gpu_runner.Run, "abandon", lambda run, note, why: abandoned.set() or note(why))
    arguments = SimpleNamespace(seconds=100, hang=0.6, dry_run_on_cpu=True, resume=False)
    run_, notes = gpu_runner.Run(arguments, tmp_path, [], "cpu", Timer()), []
    with run_.watched(notes.append):
        for seconds in samples:
            run_.timer.sample(seconds, 1)
    assert abandoned.is_set() == hangs
    assert notes == ["it hung for 0.6 seconds"] * hangs


def test_a_record_tells_what_was_measured(rehearsal):
    results = json.loads((rehearsal[0] / "results.json").read_text())
    record = results["cases"][1]
    assert (record["cell"], record["mode"], record["dtype"]) == ("GRU", "inference", "bfloat16")
    assert (record["steps"], record["batch"], record["input"], record["hidden"]) == (2, 16, 256, 256)
    assert record["ratio_quartiles"][0] <= record["ratio"] <= record["ratio_quartiles"][2]
    for library in ("torch", "fastseq"):
        time = record["milliseconds"][library]
        assert time > 0
        assert record["us_per_step"][library] == pytest.approx(time * 1e3 / 2)
        assert 0 <= record["errors"][library] < 0.1
    assert record["difference"] < 0.1
    assert results["cases"][0]["errors"] is None, "float64 is the measure of outputs, not of gradients"


def test_a_run_tells_where_it_was_measured(rehearsal):
    results = json.loads((rehearsal[0] / "results.json").read_text())
    facts = results["environment"]
    assert facts.keys() >= {
        "gpu",
        "driver",
        "multiprocessors",
        "memory_gib",
        "cuda",
        "cudnn",
        "torch",
        "commit",
    }
    assert facts.keys() >= {"clocks_before", "clocks_after", "tf32"}
    assert facts["tf32"].keys() == {"cudnn", "matmul"}
    assert min(results["ceilings"].values()) > 0


def test_a_run_ends_with_figures_and_goals(rehearsal):
    folder, output = rehearsal
    for name in ("ratio_inference", "ratio_training", "step_inference", "step_training"):
        assert (folder / f"{name}.png").read_bytes().startswith(PNG)
    assert not list(folder.glob("*.partial"))
    summary = re.search(r"^-- grid\n(.*)^-- end of grid$", output, flags=re.S | re.M)[1]
    assert re.search(r"^goal +\| asked +\| measured +\| reached$", summary, flags=re.M)
    assert re.search(r"all sequences, geometric mean +\| >= 1.5x +\| [\d.]+x +\| (yes|no)", summary)
    assert re.search(r"LSTM float16 H768 B16 +\| >= 1x +\| not measured +\| \?", summary)


def test_a_run_that_is_out_of_time_keeps_what_it_has(tmp_path):
    results = run_out_of_time("gpu_run.py", "results.json", CASES, tmp_path)
    assert (results["complete"], results["cases"], results["planned"]) == (False, [], 4)


def test_small_cases_compute_what_torch_does(tmp_path):
    arguments = ("--smoke", "--dry-run-on-cpu", "--case", "T4 B8|T5")
    code, output = run("gpu_run.py", *arguments, cwd=tmp_path)
    assert code == 0, output
    assert "18 of 18 small cases" in output


# ------------------------------------------------------------------------------------------ the calibration

SMALL = ("LSTM", "float32", 2, 24)
TIMES = {
    "": 1.0,
    "cluster:8": 1.0,
    "grid": 3.0,
    "steps": 9.0,
}  # us a step that a planner says; others do not fit


def planner(_call):
    """Stands for fastseq.explain on a GPU."""
    forced = os.environ["FASTSEQ_CUDA_PLAN"]
    if forced.partition(":sums")[0] not in TIMES:
        raise RuntimeError(f"given: a layer, and a forced plan, {forced}")
    kernel = forced.partition(":")[0] or "cluster"
    time = TIMES[forced.partition(":sums")[0]]
    partition = {"microseconds": time, "blocks": 8, "rows": 8, "products": [{"exchange": "sums"}]}
    return SimpleNamespace(kernel=kernel, partition=partition)


class Clock:
    """Every call takes 2 ms, whatever it does; the plans for which it was asked are in `plans`."""

    enough, long = 0.01, 0.05

    def __init__(self):
        self.plans = []

    def sample(self, function, repeats):
        self.plans.append(os.environ["FASTSEQ_CUDA_PLAN"])
        return 2e-3

    def wait(self):
        pass


def test_calibration_times_what_fits_once_beside_what_the_plan_says(modules, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CUDA_PLAN", "grid:4")
    calibration, clock = modules["calibration"], Clock()
    records = []
    for point in calibration.points([SMALL]):
        record = calibration.measure(point, records, "cpu", clock, steps=2, explained=planner)
        records += [record] if record else []
    assert os.environ["FASTSEQ_CUDA_PLAN"] == "grid:4"
    assert set(clock.plans) == {"", "grid", "steps"}, "cluster:8 is the plan as it is"
    assert [(r["direction"], r["forced"]) for r in records] == [
        (direction, forced) for direction in ("forward", "backward") for forced in ("", "grid", "steps")
    ]
    assert [r["predicted_us"] for r in records] == [1, 3, 9] * 2
    # Of a forward pass the time of W x is taken off, which this clock says is all of it.
    assert [r["measured_us"] for r in records] == [0] * 3 + [pytest.approx(1000)] * 3
    assert records[4]["ratio"] == pytest.approx(1000 / 3)
    json.dumps(records)
    records[4]["measured_us"] = 900.0
    text = "\n".join(calibration.lines({"note": "", "records": records}))
    assert re.search(r"steps +backward +111.11 \(111.11 to 111.11\), 1 plan", text)
    assert re.search(
        r"faster than the plan's own: LSTM backward .* grid 8 x 8 sums .*\(that one 1000.00", text
    )


@pytest.fixture
def calibrating(modules, tmp_path):
    """A run in which nothing but the calibration is done."""
    arguments = SimpleNamespace(seconds=100, hang=30, dry_run_on_cpu=True, resume=True)
    return lambda: modules["gpu_run"].RecurrentRun(arguments, tmp_path, [], "cpu", Clock(), 2)


def test_calibration_goes_on_after_a_failure_and_with_resume(modules, calibrating, monkeypatch, capsys):
    points = modules["calibration"].points([SMALL])[:4]

    def measure(point, known, device, timer):
        measured.append(point.forced)
        if point.forced == "cluster:16":
            raise RuntimeError("CUDA says no")
        return {"name": point.name, "forced": point.forced} if point.forced != "cluster:8" else None

    monkeypatch.setattr(modules["calibration"], "line", lambda record: record["name"])
    measured = []
    calibrating().calibrate(points[:3], lambda device: True, measure)
    run = calibrating()
    run.calibrate(points, lambda device: True, measure)
    assert measured == ["", "cluster:8", "cluster:16", "cluster:8", "grid"], (
        "what does not fit is asked again"
    )
    found = json.loads(run.path.read_text())["calibration"]
    assert [r["forced"] for r in found["records"]] == ["", "grid"]
    assert found["left_out"] == {points[2].name: "RuntimeError: CUDA says no"}
    assert "left out: RuntimeError" in capsys.readouterr().out


def test_calibration_is_skipped_where_no_cuda_plan_exists_and_says_so(modules, calibrating, capsys):
    run = calibrating()
    run.calibrate(modules["calibration"].points())
    assert "calibration: skipped, no CUDA plan exists on cpu" in capsys.readouterr().out
    assert "calibration: skipped" in "\n".join(modules["calibration"].lines(run.results["calibration"]))


@pytest.mark.cuda_host
def test_calibration_forces_the_kernels_plans(modules, twin):
    calibration, records = modules["calibration"], []
    with twin.using():
        assert calibration.has_plans("cpu")
        for point in calibration.points([("LSTM", "float32", 2, 64)]):
            record = calibration.measure(point, records, "cpu", Clock(), steps=2)
            records += [record] if record else []
    for direction in ("forward", "backward"):
        kernels = [r["kernel"] for r in records if r["direction"] == direction]
        assert set(kernels) == {"cluster", "grid", "stream", "steps"}
    assert all(r["predicted_us"] > 0 for r in records)


# ------------------------------------------------------------------------------------------------ the goals


def record(cell="LSTM", mode="inference", dtype="bfloat16", batch=16, hidden=256, ratio=2.0, us=1.0, **other):
    return {
        "name": f"{cell} {mode} {dtype} B{batch} H{hidden}",
        "group": "gpu",
        "cell": cell,
        "mode": mode,
        "dtype": dtype,
        "steps": 512,
        "batch": batch,
        "hidden": hidden,
        "layers": 1,
        "ratio": ratio,
        "us_per_step": {"torch": us * ratio, "fastseq": us},
        "milliseconds": {"torch": us * ratio * 0.512, "fastseq": us * 0.512},
        "difference": 1e-3,
        "errors": None,
        "plan": None,
    } | other


def reached(modules, *records):
    return [row["reached"] for row in modules["gpu_summary"].goals(records)]


def test_goals_are_reached_by_what_was_asked_and_missed_by_less(modules):
    good = [record(us=1.2), record("GRU", us=1.2), record(dtype="float16", hidden=768, ratio=1.0)]
    assert reached(modules, *good) == [True] * 6
    assert reached(modules, record(ratio=1.49))[0] is False
    assert reached(modules, record("GRU", ratio=1.99), record(ratio=9.0))[1] is False
    assert reached(modules, record("GRU", hidden=128, ratio=1.0))[1] is None, "only H >= 256 counts"
    assert reached(modules, record(dtype="float16", hidden=768, ratio=0.99))[2] is False
    assert reached(modules, record(us=1.21), record("GRU"))[3] is False
    assert reached(modules, record(us=1.21, mode="training"))[3] is None, "only inference counts"
    assert reached(modules) == [None] * 6


def test_slow_cases_count_unless_the_plan_hands_them_to_cudnn(modules):
    slow = record(ratio=0.89)
    assert reached(modules, record(), slow)[4] is False
    assert reached(modules, record(), slow | {"plan": "cluster 16 x 8"})[4] is False
    assert (
        reached(modules, record(), slow | {"plan": "cuDNN: its persistent kernel is faster here"})[4] is True
    )


def test_one_step_of_a_cell_is_a_group_of_its_own(modules):
    good = [record(us=1.2), record("GRU", us=1.2), record(dtype="float16", hidden=768, ratio=1.0)]
    cell = record("GRU", hidden=256, ratio=0.95, group="cells")
    assert reached(modules, *good, cell) == [True] * 6
    assert reached(modules, *good, cell | {"ratio": 0.5})[4] is False, "but no case may be slow"
    text = "\n".join(modules["gpu_summary"].mean_lines([*good, cell]))
    assert re.search(r"^one step of a cell.*\nGRU one step +inference.* 0.95 \( +0.95\)", text, flags=re.M)
    assert "one step" not in "\n".join(modules["gpu_summary"].mean_lines(good))


def test_one_step_of_a_cell_is_measured_with_its_gradients(modules):
    gpu_run = modules["gpu_run"]
    for cell in ("RNN", "LSTM", "GRU"):
        for mode in ("inference", "training"):
            shape = gpu_run.grid.Shape(1, 3, 8, 8)
            case = gpu_run.gpu_grid.Case("cells", cell, mode, shape)
            found = gpu_run.measure_case(case, "cpu", modules["timers"].HostTimer(), 1e-4, 5)
            assert found["difference"] < 1e-5
            assert found["plan"].startswith("forward cell")
            assert ("backward" in found["plan"]) == (mode == "training")


@pytest.mark.parametrize(
    "wrong",
    [
        {"difference": 0.2},
        {"difference": math.nan},
        {"errors": {"torch": 1e-3, "fastseq": 0.05}},
        {"errors": {"torch": 1e-3, "fastseq": math.nan}},
    ],
)
def test_wrong_results_count(modules, wrong):
    assert reached(modules, record() | wrong)[5] is False
    assert reached(modules, record() | {"errors": {"torch": 1e-3, "fastseq": 2e-3}})[5] is True


# ------------------------------------------------------------------------------------------------ README


def test_readme_says_so_where_nothing_was_timed_on_a_gpu(modules):
    kept = [json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("*/results.json")]
    text = README.read_text(encoding="utf-8")
    block = re.search(r"<!-- gpu:begin -->\n(.*)\n<!-- gpu:end -->", text, flags=re.S)[1]
    timed = any("gpu" in results["environment"] for results in kept)
    assert ("geometric mean" in block) == timed
    assert ("not been timed on a GPU yet" in " ".join(block.split())) == (not timed)
    assert (block == modules["gpu_table"].section([])) == (not timed)


def test_report_puts_the_gpu_table_into_a_readme_and_nothing_else(rehearsal, tmp_path):
    folder, copy = rehearsal[0], tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ("--readme", copy, "--gpu-results", folder)
    code, output = run("report.py", *arguments, "--check", cwd=tmp_path)
    assert code == 1, output
    assert copy.read_text(encoding="utf-8") == README.read_text(encoding="utf-8"), "--check changes nothing"

    code, output = run("report.py", *arguments, cwd=tmp_path)
    assert code == 0, output
    old, new = (
        re.split(r"(<!-- gpu:begin -->|<!-- gpu:end -->)", path.read_text(encoding="utf-8"))
        for path in (README, copy)
    )
    assert [*new[:2], *new[3:]] == [*old[:2], *old[3:]]
    assert "| GRU, H 256 |" in new[2]
    assert "| goal | asked | measured | reached |" in new[2]
    assert "a rehearsal on the CPU" in new[2]

    code, output = run("report.py", *arguments, "--check", cwd=tmp_path)
    assert code == 0, output
