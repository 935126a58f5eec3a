"""The plan is data: a pure function of shape, dtype and thread count, tested without running it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import _C

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


PARTITIONS = ["1x1x4", "1x4x1", "1x2x2", "2x1x2", "2x2x1", "2x1x1", "1x3x1"]
MODULES = {
    "LSTM": lambda: fastseq.LSTM(19, 150, bidirectional=True),
    "projected LSTM": lambda: fastseq.LSTM(19, 150, proj_size=37, bidirectional=True),
    "GRU": lambda: fastseq.GRU(19, 150, bidirectional=True),
    "reset-before GRU": lambda: fastseq.GRU(19, 150, bidirectional=True, reset_after=False),
    "RNN": lambda: fastseq.RNN(19, 150, bidirectional=True),
}


@pytest.mark.parametrize("partition", PARTITIONS)
def test_forced_partition_is_the_plan(monkeypatch, partition):
    monkeypatch.setenv("FASTSEQ_PLAN", partition)
    got = plan(threads=4, directions=2)
    assert f"{got['direction_parts']}x{got['batch_parts']}x{got['unit_parts']}" == partition


@pytest.mark.smoke
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_every_partition_gives_the_same_results(monkeypatch, dtype, tolerance, name, packed):
    """The same bits forward; backward, sums over rows may be cut differently."""
    torch.set_num_threads(4)
    module, lengths = MODULES[name]().to(dtype), torch.tensor([9, 9, 8, 7, 7, 5, 4, 2, 1, 1, 1])
    x = torch.randn(9, 11, 19, dtype=dtype, requires_grad=True)

    def run(partition):
        monkeypatch.setenv("FASTSEQ_PLAN", partition)
        output, state = module(pack_padded_sequence(x, lengths) if packed else x)
        output = output.data if packed else output
        states = state if isinstance(state, tuple) else (state,)
        loss = output.square().sum() + sum(s.sum() for s in states)
        return [output, *states], torch.autograd.grad(loss, [x, *module.parameters()])

    outputs, gradients = run("1x1x1")
    for partition in PARTITIONS:
        other_outputs, other_gradients = run(partition)
        for other, expected in zip(other_outputs, outputs, strict=True):
            assert torch.equal(other, expected), partition
        for other, expected in zip(other_gradients, gradients, strict=True):
            atol = tolerance * float(expected.abs().max())
            torch.testing.assert_close(other, expected, rtol=tolerance, atol=atol)
