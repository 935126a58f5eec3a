"""Every instruction set that this CPU has gives the right numbers; FASTSEQ_ISA chooses one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import _C

TESTS = Path(__file__).parent
INFO = _C.cpu_info()
FORCED = os.environ.get("FASTSEQ_ISA")


def python(*arguments, isa, timeout=280):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS,
        env={**os.environ, "FASTSEQ_ISA": isa},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def test_cpu_info_is_consistent():
    assert INFO["isa"] in INFO["isas"]
    assert set(INFO["isas"]) <= set(INFO["compiled_isas"])
    assert "portable" in INFO["isas"]


@pytest.mark.smoke
def test_forced_instruction_set_is_used():
    if FORCED:
        assert INFO["isa"] == FORCED
    else:
        assert INFO["isa"] == INFO["isas"][-1]  # listed from the plainest to the best, which is the default


@pytest.mark.slow
@pytest.mark.skipif(FORCED is not None, reason="already within a run with a forced instruction set")
@pytest.mark.parametrize("isa", [isa for isa in INFO["isas"] if isa != INFO["isa"]])
def test_smoke_tests_pass_on_each_instruction_set(isa):
    those = "smoke and not cuda_host and not gpu"
    run = python("-m", "pytest", "-q", "-x", "-m", those, "-p", "no:cacheprovider", str(TESTS), isa=isa)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("isa", ["avx1024", "AVX2 ", "0"])
def test_unknown_instruction_set_is_a_clear_error(isa):
    run = python("-c", "import torch, fastseq", isa=isa)
    assert run.returncode != 0
    assert "ImportError" in run.stdout or "RuntimeError" in run.stdout
    message = run.stdout[run.stdout.rindex("Error: ") :]
    assert "FASTSEQ_ISA" in message
    assert isa.strip() in message
    assert all(name in message for name in INFO["isas"]), "the accepted values are named"


@pytest.mark.parametrize("isa", sorted(set(INFO["compiled_isas"]) - set(INFO["isas"])))
def test_instruction_set_that_this_cpu_lacks_is_a_clear_error(isa):
    """And not an illegal instruction."""
    run = python("-c", "import torch, fastseq", isa=isa)
    assert run.returncode > 0, "killed by a signal"
    assert "FASTSEQ_ISA" in run.stdout
