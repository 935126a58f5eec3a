"""Memory grows linearly with the sequence, nothing is written outside the results, little is kept."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastseq
from attention_harness import ALL, Case, call_fastseq, make_data, run_fastseq
from harness import DTYPES, assert_same_bits
from test_memory import SANITIZED, bytes_held

LIMIT = 200e6  # bytes beyond inputs, outputs and gradients

# Prints the bytes of a forward and a backward pass beyond those of arguments, results and gradients.
MEASURE = """
import re, torch, fastseq
queries, keys, dtype, threads = {queries}, {keys}, torch.{dtype}, {threads}
torch.set_num_threads(threads)

def tensors(queries, keys):
    rows = torch.randn(1, 1, queries, 64).to(dtype), torch.randn(1, 1, keys, 64).to(dtype)
    mask = [torch.randn(1, 1, 1, keys)] if {mask} else []
    return [x.requires_grad_() for x in (*rows, rows[1].clone(), *mask)]

def run(leaves, incoming):
    output = fastseq.scaled_dot_product_attention(*leaves[:3], *leaves[3:], {options})
    return [output, *torch.autograd.grad(output, leaves, incoming)] if {backward} else [output.detach()]

def bytes_of(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

run(tensors(64, 64), torch.ones(1, 1, 64, 64, dtype=dtype))  # threads are started, code is read
leaves, incoming = tensors(queries, keys), torch.ones(1, 1, queries, 64, dtype=dtype)
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
except OSError:
    pass  # it starts with the process, and is higher
before = bytes_of("VmRSS")
results = run(leaves, incoming)
print(bytes_of("VmHWM") - before - sum(x.numel() * x.element_size() for x in results))
"""


def bytes_beyond(queries, keys, dtype="float32", options="", mask=False, threads=2, backward=True):
    code = MEASURE.format(**locals())
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    return int(run.stdout)


needs_proc = [
    pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps freed memory for a while"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]


def with_proc(test):
    for mark in needs_proc:
        test = mark(test)
    return test


@with_proc
@pytest.mark.slow
def test_training_step_over_32768_positions_stays_below_the_limit():
    """All scores would take 4 GB."""
    assert bytes_beyond(32_768, 32_768, options="is_causal=True") < LIMIT


WINDOW = "causal='top_left', window=(200, 0)"


@with_proc
@pytest.mark.parametrize(
    ("dtype", "options", "mask"),
    [
        ("float32", WINDOW + ", dropout_p=0.1", False),
        ("bfloat16", WINDOW + ", alibi_slopes=torch.ones(1)", True),
    ],
)
def test_options_stay_below_the_limit_too(dtype, options, mask):
    """Under a window, which takes less time; a mask over the keys with its gradient."""
    assert bytes_beyond(32_768, 32_768, dtype, options, mask) < LIMIT


@with_proc
def test_more_threads_do_not_need_more_than_the_limit():
    assert bytes_beyond(32_768, 32_768, options=WINDOW, threads=8) < LIMIT


@with_proc
def test_decoding_reads_keys_and_values_where_they_lie():
    """Half a million of each, 256 MB together."""
    assert bytes_beyond(4, 500_000, backward=False) < 16e6


def held(case: Case) -> int:
    data = make_data(case)
    return bytes_held(lambda: list(call_fastseq(case, data).values()), list(data.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("options", [{}, {"causal": "top_left"}, {"mask": "float"}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_keeps_its_output_and_two_numbers_for_each_query(dtype, options, dropout):
    """What its weights are computed from. With 16 bits also what rounding took from the output; dropout adds
    its seed."""
    case = Case(dtype, queries=100, keys=300, head_size=16, dropout=dropout, **options)
    rows = case.batch * case.heads * case.queries
    numbers = case.width * dtype.itemsize * (2 if dtype.itemsize == 2 else 1)
    most = rows * (numbers + 2 * case.accumulation.itemsize) + 8
    assert rows * case.width * dtype.itemsize <= held(case) <= most


def test_inference_keeps_nothing_but_its_results():
    case = Case(queries=100, keys=300)
    data = {name: x.detach() for name, x in make_data(case).items()}
    size = data["query"].nbytes
    assert bytes_held(lambda: list(call_fastseq(case, data).values()), list(data.values())) == size
    data = make_data(case)
    with torch.no_grad():
        output = call_fastseq(case, data)["output"]
    assert output.grad_fn is None


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@with_proc
@pytest.mark.parametrize("queries", [1, 400])
def test_repeated_training_steps_do_not_leak(queries):
    case = Case(queries=queries, keys=400, head_size=64, sinks=True, mask="float", mask_dims="K")
    data = make_data(case)
    for _ in range(20):
        run_fastseq(case, data)
    resident = resident_bytes()
    for _ in range(60):
        run_fastseq(case, data)
    assert resident_bytes() - resident < 24e6


@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask", "sinks"])
def test_gradients_that_nobody_wants_are_not_computed(wanted):
    case = Case(mask="float", sinks=True)
    data = make_data(case)
    for name, x in data.items():
        x.requires_grad_(name == wanted)
    call_fastseq(case, data)["output"].sum().backward()
    assert [name for name, x in data.items() if x.grad is not None] == [wanted]


GUARD = 4096  # bytes before and behind each result
PATTERN = 0xA5
ALLOCATIONS = [
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
    (torch.Tensor, "new_zeros"),
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "zeros"),
    (torch, "zeros_like"),
]


@pytest.fixture
def guarded(monkeypatch):
    """Whatever Python allocates lies between guards; the buffers, by the address of what lies in them."""
    buffers, plain = {}, torch.empty

    def between_guards(allocate):
        def call(*args, **kwargs):
            given = allocate(*args, **kwargs)
            if given.device.type != "cpu" or given.layout is not torch.strided:
                return given
            size = given.untyped_storage().nbytes()
            buffer = plain(size + 2 * GUARD, dtype=torch.uint8).fill_(PATTERN)
            inside = buffer[GUARD : GUARD + size].view(given.dtype)
            result = inside.as_strided(given.shape, given.stride(), inside.storage_offset())
            result.copy_(given)
            buffers[result.data_ptr()] = buffer
            return result

        return call

    for owner, name in ALLOCATIONS:
        monkeypatch.setattr(owner, name, between_guards(getattr(owner, name)))
    return buffers


GUARDED = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "mask": {"mask": "float", "mask_dims": "K"},
    "whole mask": {"mask": "float"},
    "sinks and slopes": {"sinks": True, "alibi": "BH"},
    "grouped": {"heads": 6, "kv_heads": 2},
    "lengths": {"lengths": True, "batch": 3},
    "packed": {"packed": True, "batch": 4},
    "layout": {"layout": "BSHD"},
    "weights": {"returns": ALL},
    "dropout": {"dropout": 0.2},
    "everything": {"mask": "float", "lengths": True, "sinks": True, "returns": ALL, "window": (20, 3)},
}
SHAPES = [
    (1, 1, 1, 1),
    (1, 130, 33, 5),
    (70, 75, 17, 33),
    (129, 65, 64, 64),
    (5, 1100, 3, 8),
    (131, 531, 9, 15),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("option", GUARDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nothing_is_written_outside_the_results(guarded, dtype, option, shape):
    case = replace(Case(dtype, 2, 2, 0, *shape), **GUARDED[option])
    data = make_data(case)
    results = run_fastseq(case, data)
    torch.set_num_threads(3)
    assert results.keys() == run_fastseq(case, data).keys()
    between = [x.data_ptr() in guarded for name, x in results.items() if x.numel() and name == "output"]
    assert all(between), "the output is not one of the guarded tensors, so that this test sees nothing"
    for buffer in guarded.values():
        assert (buffer[:GUARD] == PATTERN).all(), "written before a tensor"
        assert (buffer[-GUARD:] == PATTERN).all(), "written behind a tensor"


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_around_the_arguments_is_not_read(dtype, shape):
    """NaN there changes no bit of results and gradients."""
    case = Case(dtype, 2, 2, 0, *shape, mask="float", sinks=True, returns=ALL)
    results = []
    for number in (0.0, math.nan):
        data = {}
        for name, x in make_data(case).items():
            pads = (5, 3) * x.dim()
            wide = torch.nn.functional.pad(x.detach(), pads, value=number)
            data[name] = wide[(slice(5, -3),) * x.dim()].requires_grad_()
        results.append(run_fastseq(case, data))
    assert_same_bits(*results)


def test_results_are_new_tensors():
    case = Case(returns=ALL)
    data = make_data(case)
    first = call_fastseq(case, data)
    second = call_fastseq(case, data)
    addresses = [x.untyped_storage().data_ptr() for x in (*data.values(), *first.values(), *second.values())]
    assert len(set(addresses)) == len(addresses)
    assert fastseq.scaled_dot_product_attention(**data).untyped_storage().data_ptr() not in addresses
