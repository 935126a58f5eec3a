"""The commands of benchmarks/, run by the tests as a user would."""

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
