"""The CUDA kernels read and write nothing beyond the memory that they are given: behind it lies a page that
may not be touched, or the process ends."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_host
from devices import AMPERE, ARITHMETIC, HOPPER, TIGHT_AMPERE, plans_of, twin_device
from fastseq import loops
from harness import make_data, make_module
from test_cuda_recurrent import NETWORKS, network

FACTS = {"HOPPER": HOPPER, "AMPERE": AMPERE, "TIGHT_AMPERE": TIGHT_AMPERE}
BLOCKS = {"cluster": (1, 2), "grid": (1, 3), "stream": (1, 3)}
KEPT = []  # of memory, until the process ends


def before_a_guard(size: int) -> torch.Tensor:
    """Bytes that end where a page begins that may not be touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    whole = mmap.mmap(-1, -(-size // page) * page + page)
    KEPT.append(whole)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    end = start + len(whole) - page
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(end - size), dtype=torch.uint8)


def run_all(name: str):
    """Runs every arithmetic and kernel, each announced by a line."""
    loops._workspace = lambda plan, like: before_a_guard(plan.workspace_bytes)
    device = twin_device()
    torch.set_num_threads(1)
    for arithmetic, (_, tf32) in ARITHMETIC.items():
        case = network(name, arithmetic, bidirectional=True, batch=37, hidden_size=70, steps=3)
        module, data = make_module(case), make_data(case)
        for plan in plans_of(case, arithmetic, BLOCKS):
            for key, facts in FACTS.items():
                print(arithmetic, plan, key, flush=True)
                if plan.startswith("cluster") and facts[0] < 9:
                    continue
                with device.using(plan, facts, tf32):
                    try:
                        device.run(case, module, data)
                    except RuntimeError as error:
                        if "a forced plan" not in str(error):  # too little shared memory
                            raise


@pytest.mark.cuda_host
@pytest.mark.skipif(cuda_host.SANITIZED, reason="AddressSanitizer sees it in every test")
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_behind_the_workspace_is_touched(name):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cuda_memory as t; "
    command = [sys.executable, "-c", script + f"t.run_all({name!r})"]
    child = subprocess.run(command, capture_output=True, text=True)
    last = child.stdout.splitlines()[-1:]
    status = child.returncode
    assert status == 0, f"{last}, exit status {status}\n{child.stderr[-2000:]}"
