"""The plan is data: a pure function of shape, dtype and thread count, tested without running it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    assert 1 <= first.get("threads", 1) <= arguments["threads"]


def test_plan_does_not_depend_on_torchs_thread_setting():
    before = plan(threads=2)
    torch.set_num_threads(1)
    assert plan(threads=2) == before


@pytest.mark.parametrize("mode", _C.CELLS)
def test_one_thread_is_a_plan_for_every_cell(mode):
    assert plan(mode=mode, threads=1).get("threads", 1) == 1


def test_cells_and_dtypes_are_named_as_in_torch():
    assert set(_C.CELLS) == {"RNN_TANH", "RNN_RELU", "LSTM", "GRU", "GRU_RESET_BEFORE"}
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in _C.DTYPES)
    for mode, cell in _C.CELLS.items():
        assert set(cell) == {"code", "gates", "saved", "cell_state"}
        assert cell["cell_state"] == (mode == "LSTM")
