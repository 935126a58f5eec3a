"""The plan is data: a pure function of shape, dtype and thread count, tested without running it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastseq
from fastseq import _C
from harness import (
    Case,
    assert_all_as_accurate_as_torch,
    assert_same_bits,
    make_data,
    make_module,
    run_module,
    run_reference,
    run_torch,
)
from reference import MODES

SIZES = st.sampled_from([1, 2, 3, 8, 31, 64, 100, 129, 512, 1024])


def plan(
    mode="LSTM", dtype="float32", threads=2, steps=100, batch=32, input_size=128, hidden_size=256, **rest
):
    return _C.recurrent_plan(
        _C.CELLS[mode]["code"],
        _C.DTYPES[dtype],
        threads,
        steps,
        batch,
        input_size,
        hidden_size,
        rest.get("proj_size", 0),
        rest.get("directions", 1),
        rest.get("backward", False),
        rest.get("planes", 1),
    )


@given(
    mode=st.sampled_from(list(_C.CELLS)),
    dtype=st.sampled_from(list(_C.DTYPES)),
    threads=st.integers(1, 64),
    steps=st.sampled_from([1, 2, 100, 70_000]),
    batch=st.sampled_from([0, 1, 2, 6, 48, 70_000]),
    input_size=SIZES,
    hidden_size=SIZES,
    directions=st.integers(1, 2),
    backward=st.booleans(),
)
def test_plan_is_a_pure_function_and_uses_no_more_threads_than_given(**arguments):
    first = plan(**arguments)
    torch.randn(3) @ torch.randn(3)  # something else happens between the two
    assert plan(**arguments) == first
    assert isinstance(first, dict)
    assert first
    assert all(isinstance(name, str) and isinstance(value, (int, str)) for name, value in first.items())
    assert 1 <= first["threads"] <= arguments["threads"]
    assert first["threads"] == first["direction_parts"] * first["batch_parts"] * first["unit_parts"]


def test_plan_does_not_depend_on_torchs_thread_setting():
    before = plan(threads=2)
    torch.set_num_threads(1)
    assert plan(threads=2) == before


@pytest.mark.parametrize("mode", _C.CELLS)
def test_one_thread_is_a_plan_for_every_cell(mode):
    assert plan(mode=mode, threads=1)["threads"] == 1


def test_cells_and_dtypes_are_named_as_in_torch():
    assert set(_C.CELLS) == {"RNN_TANH", "RNN_RELU", "LSTM", "GRU", "GRU_RESET_BEFORE"}
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in _C.DTYPES)
    for mode, cell in _C.CELLS.items():
        assert set(cell) == {"code", "gates", "saved", "cell_state"}
        assert cell["cell_state"] == (mode == "LSTM")


PARTITIONS = ["1x1x4", "1x4x1", "1x2x2", "2x1x2", "2x2x1", "2x1x1", "1x3x1"]  # directions x batch x units
BIDIRECTIONAL = Case(steps=9, batch=11, input_size=19, hidden_size=150, bidirectional=True)
ALL_ROWS = BIDIRECTIONAL.steps * BIDIRECTIONAL.batch
# Chunks of less than a step, of no whole number of steps and of all steps, alone and in parts.
CHUNKS = ["1x1x1x1", "1x1x1x8", f"1x1x1x{ALL_ROWS}", "1x2x1x8", "2x1x2x1", f"2x2x1x{ALL_ROWS}"]
NETWORKS = [replace(BIDIRECTIONAL, mode=mode) for mode in MODES] + [replace(BIDIRECTIONAL, proj_size=37)]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_forced_partition_is_the_plan(monkeypatch, partition):
    monkeypatch.setenv("FASTSEQ_PLAN", partition)
    got = plan(threads=4, directions=2)
    assert f"{got['direction_parts']}x{got['batch_parts']}x{got['unit_parts']}" == partition


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rows", [1, 8, ALL_ROWS])
def test_forced_chunk_is_in_the_plan(monkeypatch, rows, backward):
    monkeypatch.setenv("FASTSEQ_PLAN", f"1x2x1x{rows}")
    got = plan(threads=4, backward=backward)
    assert (got["batch_parts"], got["chunk_rows"]) == (2, rows)


@pytest.mark.smoke
@pytest.mark.parametrize("packed", ["", "sorted"])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_partition_gives_the_same_results(monkeypatch, dtype, network, packed):
    """The same bits forward; backward, sums over rows may be cut differently, each as exact as torch's."""
    torch.set_num_threads(4)
    case = replace(network, dtype=dtype, packed=packed)
    module, data = make_module(case), make_data(case)
    parameters = dict(module.named_parameters())
    exact, torchs = run_reference(case, parameters, data), run_torch(case, parameters, data)
    forward = {}
    for forced in ("1x1x1", *PARTITIONS, *CHUNKS):
        monkeypatch.setenv("FASTSEQ_PLAN", forced)
        results, what = run_module(case, module, data), f" with FASTSEQ_PLAN={forced}"
        assert_all_as_accurate_as_torch(results, torchs, exact, dtype, what)
        outputs = {name: x for name, x in results.items() if not name.startswith("grad of")}
        forward = forward or outputs
        assert_same_bits(outputs, forward, what)


@pytest.mark.parametrize("forced", ["2", "axbxc", "1x2x1x", "1x2x1x4x5", "0x1x1"])
def test_malformed_forced_plan_is_an_error_of_the_next_call(monkeypatch, forced):
    """Of modules and of cells, forward and backward, and of the plan itself; never a guess."""
    module, cell, x = fastseq.GRU(3, 5), fastseq.GRUCell(3, 5), torch.randn(4, 2, 3)
    output, state = module(x)[0], cell(x[0])
    monkeypatch.setenv("FASTSEQ_PLAN", forced)
    for call in (
        plan,
        lambda: module(x),
        lambda: cell(x[0]),
        torch.no_grad()(lambda: cell(x[0], state.detach())),
        output.sum().backward,
        state.sum().backward,
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        message = str(error.value)
        assert len(message.splitlines()) == 3, message
        assert "FASTSEQ_PLAN" in message
        assert forced in message
    monkeypatch.delenv("FASTSEQ_PLAN")
    assert torch.equal(module(x)[0], output)
