"""The demo, the benchmark and the report of it, run as the README says, each on something small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseq
from tolerances import DEMO_CURVES, DEMO_TABLE

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REPORT = ROOT / "benchmarks" / "report.py"
PNG = b"\x89PNG\r\n\x1a\n"
TEXT = "The quick brown fox jumps over the lazy dog. The five boxing wizards jump quickly.\n" * 40
SMALL = (
    "--threads=1",
    "--steps=12",
    "--batch-size=4",
    "--length=16",
    "--embedding-size=8",
    "--hidden-size=16",
)
SAMPLE = 20
CASE = "table: GRU inference T1000 B4 32->64"


def run(script, *arguments, cwd):
    """Exit status, and what was printed without the progress bar, of a script in another directory."""
    command = [sys.executable, str(script), *map(str, arguments)]
    # `make asan` sets variables that keep a script from the modules beside it.
    kept_out = ("PYTHON", "LD_PRELOAD", "FASTSEQ_PLAN")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(kept_out)}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=250)
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_demo_trains_both_libraries_along_the_same_curve(tmp_path, cell):
    text, figure = tmp_path / "text.txt", tmp_path / "new" / "curves.png"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ("--cell", cell, "--text", text, "--figure", figure, "--sample-length", SAMPLE)
    code, output = run(ROOT / "examples" / "char_lm.py", *SMALL, *arguments, cwd=tmp_path)
    assert code == 0, output
    assert figure.read_bytes().startswith(PNG)

    difference = re.search(r"largest difference at any step (\S+?), mean", output)
    assert difference, output
    torch.testing.assert_close(float(difference[1]), 0.0, **DEMO_CURVES)

    rows = re.findall(r"^(torch\.nn|fastseq) +([\d.,]+) +([\d.]+) +([\d.]+) +([\d.]+)$", output, flags=re.M)
    assert [name for name, *_ in rows] == ["torch.nn", "fastseq"], output
    loss, perplexity = zip(*([float(x) for x in row[3:]] for row in rows), strict=True)
    torch.testing.assert_close(*loss, **DEMO_TABLE)
    torch.testing.assert_close(*perplexity, **DEMO_TABLE)
    assert re.search(r"speed-up +[\d.]+x", output)
    _, sample, _ = re.split(r"^-{80}\n", output, flags=re.M)
    assert sample.startswith("The ")
    assert len(sample) == len("The ") + SAMPLE + len("\n")
    assert set(sample) <= set(TEXT)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder that benchmarks/run.py wrote after one case."""
    folder = tmp_path_factory.mktemp("benchmark") / "results"
    arguments = ("--case", f"^{re.escape(CASE)}$", "--budget", 0.01, "--threads", 1, "--out", folder)
    code, output = run(ROOT / "benchmarks" / "run.py", *arguments, cwd=folder.parent)
    assert code == 0, output
    assert CASE.partition(": ")[2] in output, "the summary names the case"
    return folder


@pytest.mark.slow
def test_benchmark_writes_each_case_and_where_it_was_measured(results):
    written = json.loads((results / "results.json").read_text())
    assert written.keys() == {"environment", "quick", "complete", "cases", "left_out"}
    assert written["left_out"] == []
    assert written["complete"] is True
    assert written["quick"] is False
    for fact in ("date", "cpu", "logical_cpus", "system", "python", "torch_config", "load_at_start"):
        assert written["environment"][fact], fact
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["fastseq"] == fastseq.__version__
    assert written["environment"]["isa"] == fastseq._C.cpu_info()["isa"]
    assert written["environment"]["threads"] == 1

    (case,) = written["cases"]
    assert case["name"] == CASE
    assert (case["group"], case["cell"]) == ("table", "GRU")
    assert (case["mode"], case["dtype"]) == ("inference", "float32")
    for name in ("seconds", "gflops", "share", "samples"):
        assert case[name].keys() == {"torch", "fastseq"}
    assert len(case["samples"]["torch"]) == len(case["samples"]["fastseq"]) >= 5
    assert min(case["peaks"] + case["samples"]["torch"] + case["samples"]["fastseq"]) > 0
    assert min(case["samples"]["torch"]) <= case["seconds"]["torch"] <= max(case["samples"]["torch"])
    assert case["ratio_quartiles"][0] <= case["ratio"] <= case["ratio_quartiles"][2]
    for figure in results.glob("*.png"):
        assert figure.read_bytes().startswith(PNG)
    assert (results / "speedup_table.png").exists()
    assert not list(results.glob("*.partial"))


@pytest.mark.slow
def test_benchmark_names_the_cases_that_take_torch_too_long(tmp_path):
    arguments = ("--case", f"^{re.escape(CASE)}$", "--longest", 1e-9, "--threads", 1, "--out", tmp_path)
    code, output = run(ROOT / "benchmarks" / "run.py", *arguments, cwd=tmp_path)
    assert code == 0, output
    assert CASE in output
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["complete"] is True
    assert (written["cases"], written["left_out"]) == ([], [CASE])


@pytest.mark.slow
def test_report_puts_the_results_into_a_readme_and_nothing_else(results, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ("--readme", copy, "--results", results)
    code, output = run(REPORT, *arguments, "--check", cwd=tmp_path)
    assert code == 1, output
    assert "not up to date" in output
    assert copy.read_text(encoding="utf-8") == README.read_text(encoding="utf-8"), "--check changes nothing"

    code, output = run(REPORT, *arguments, cwd=tmp_path)
    assert code == 0, output
    parts = [
        re.split(r"(<!-- benchmark:begin -->|<!-- benchmark:end -->)", path.read_text(encoding="utf-8"))
        for path in (README, copy)
    ]
    assert [len(part) for part in parts] == [5, 5]
    before, begin, table, end, after = parts[1]
    assert [before, begin, end, after] == [*parts[0][:2], *parts[0][3:]]
    ratio = json.loads((results / "results.json").read_text())["cases"][0]["ratio"]
    assert CASE.rpartition("inference ")[2] in table
    assert f"{ratio:.2f}x" in table

    code, output = run(REPORT, *arguments, "--check", cwd=tmp_path)
    assert code == 0, output


def test_document_shows_the_plans_that_are_made(tmp_path):
    """What `python benchmarks/plans.py --write` would write is what is committed."""
    code, output = run(ROOT / "benchmarks" / "plans.py", "--check", cwd=tmp_path)
    assert code == 0, output


def test_readme_shows_the_latest_results(tmp_path):
    """What `python benchmarks/report.py` would write is what is committed."""
    code, output = run(REPORT, "--check", cwd=tmp_path)
    assert code == 0, output
