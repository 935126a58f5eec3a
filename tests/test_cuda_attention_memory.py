"""Attention's CUDA kernels read nothing behind the memory that is theirs, and find what lies far apart."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_host
from attention_harness import Case, make_data, run_fastseq
from devices import in_use, twin_device
from harness import assert_same_bits
from test_cuda_attention import WAYS, case_of, run
from test_cuda_bits import far_apart
from test_cuda_memory import before_a_guard

SIZES = [(1, 1, 8), (3, 5, 3), (17, 33, 40), (70, 65, 64), (5, 700, 129)]  # queries, keys, head size


def in_front_of_a_guard(x):
    """The same numbers, the last of which is followed by a page that may not be touched."""
    size = max(x.numel() * x.element_size(), 1)
    memory = before_a_guard(-(-size // 16) * 16)[-size:] if x.numel() else before_a_guard(16)
    if memory.data_ptr() % x.element_size():
        return x
    there = memory[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
    with torch.no_grad():
        there.copy_(x)
    return there.requires_grad_(x.requires_grad)


def run_all(kind: str):
    """Every way, announced by a line."""
    with in_use(twin_device()):
        for way in WAYS:
            for queries, keys, head_size in SIZES:
                case = case_of(way, kind, queries=queries, keys=keys, head_size=head_size, batch=2)
                print(kind, case, flush=True)
                data = make_data(case)
                run_fastseq(case, {name: in_front_of_a_guard(x) for name, x in data.items()})


@pytest.mark.cuda_host
@pytest.mark.skipif(cuda_host.SANITIZED, reason="AddressSanitizer sees it in every test")
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
def test_nothing_behind_the_arguments_is_read(kind):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    script += f"import test_cuda_attention_memory as test; test.run_all({kind!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[-3000:]}"
    assert done.stdout.count("\n") == len(WAYS) * len(SIZES)


@pytest.mark.cuda_host
@pytest.mark.parametrize(
    "strides", [(3 * 2**30, 50, 100, 1), (1000, 2**31, 8, 1), (8, 16, 2**29, 1)], ids=str
)
def test_strides_beyond_32_bits(twin, tmp_path, strides):
    """Of query, key, value and a mask."""
    case = Case(torch.float32, 2, 2, 0, 5, 9, 8, mask="float")
    data = make_data(case)
    lie = dict.fromkeys(("query", "key", "value"), strides) | {"attn_mask": (3 * 2**30, 2**30, 50, 1)}
    far = {
        name: far_apart(tmp_path / name, data[name].shape, lie[name]).copy_(x.detach())
        for name, x in data.items()
    }
    results = run_fastseq(case, {name: x.requires_grad_() for name, x in far.items()})
    assert_same_bits(results, run(twin, case, data))
