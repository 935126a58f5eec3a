"""The commands of benchmarks/, run by the tests as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
README = ROOT / "README.md"
PNG = b"\x89PNG\r\n\x1a\n"


def run(script, *arguments, cwd):
    """Exit status and output of a script of benchmarks/, in another directory."""
    # `make asan` sets variables that keep a script from the modules beside it.
    kept_out = ("PYTHON", "LD_PRELOAD", "FASTSEQ_PLAN")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(kept_out)}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=250)
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


def rehearse(script, file, cases, folder):
    """The output of a run on the CPU whose first case hung, and which went on after it; folder/file has the
    results."""
    arguments = ("--dry-run-on-cpu", "--case", cases, "--budget", 0.01, "--out", folder)
    code, output = run(script, *arguments, "--hang", 1e-4, cwd=folder.parent)
    assert code == 75, output
    assert json.loads((folder / file).read_text())["cases"] == [], "the file of before the first case"
    code, output = run(script, *arguments, "--resume", cwd=folder.parent)
    assert code == 1, "a case that hung is a failure\n" + output
    return output


def run_out_of_time(script, file, cases, folder):
    """The results of a run that has time for none of its cases."""
    arguments = ("--dry-run-on-cpu", "--case", cases, "--out", folder, "--seconds", 0.1)
    code, output = run(script, *arguments, cwd=folder)
    assert code == 1, output
    return json.loads((folder / file).read_text())
