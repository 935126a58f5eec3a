"""RNN, LSTM and GRU: results and all gradients against the float64 reference, no worse than torch.nn's."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from harness import (
    DTYPES,
    Case,
    assert_all_as_accurate_as_torch,
    call_reference,
    check,
    make_data,
    make_module,
    named_outputs,
    run_module,
    run_reference,
    threads,
)
from reference import MODES
from tolerances import DIFFERENT_NETWORKS, SAME_EQUATION_FLOAT64, SAME_STATES_FLOAT64, largest

# One case per feature, then the features together.
VARIANTS = [
    Case(),
    Case(states=False),
    Case(bias=False),
    Case(batch_first=True, batch=4),
    Case(batched=False),
    Case(batched=False, batch_first=True, states=False, bidirectional=True),
    Case(bidirectional=True),
    Case(num_layers=3),
    Case(packed="sorted"),
    Case(packed="unsorted", batch_first=True, batch=5),
    Case(packed="unsorted", states=False, bias=False, bidirectional=True),
    Case(num_layers=2, bidirectional=True, batch_first=True, batch=4),
    Case(num_layers=2, bidirectional=True, packed="unsorted", batch=5),
    Case(steps=1, batch=1),
    Case(steps=9, batch=17, input_size=33, hidden_size=65),
    Case(mode="LSTM", proj_size=2),
    Case(mode="LSTM", proj_size=6, bias=False, batched=False),
    Case(mode="LSTM", proj_size=3, num_layers=2, bidirectional=True, batch_first=True),
    Case(mode="LSTM", proj_size=3, num_layers=2, bidirectional=True, packed="unsorted", batch=5),
]
CASES = [replace(v, mode=mode) for v in VARIANTS for mode in (["LSTM"] if v.proj_size else MODES)]
SMOKE = [
    Case(mode, packed=packed, bidirectional=True, steps=4, batch=batch, input_size=9, hidden_size=hidden)
    for mode in MODES
    for packed, batch, hidden in [("", 33, 17), ("unsorted", 5, 129)]
]
SMOKE += [
    Case(proj_size=19, num_layers=2, hidden_size=37, batch=7),
    Case(batch=1, hidden_size=1, input_size=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_match_float64_reference(case, dtype):
    check(replace(case, dtype=dtype))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_every_kernel_matches_float64_reference(case, dtype):
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("mode", MODES)
def test_long_contractions_match_float64_reference(mode):
    """Hidden and input sizes of several cache blocks; also in bfloat16, whose dot products go in pairs."""
    case = Case(mode, steps=3, batch=9, input_size=257, hidden_size=513)
    check(case)
    check(replace(case, dtype=torch.bfloat16))


@pytest.mark.parametrize("mode", set(MODES) - {"GRU_RESET_BEFORE"})
def test_reference_is_torch(mode):
    """The reference itself: in float64 it gives torch.nn's numbers."""
    for case in (v for v in VARIANTS if v.mode == mode or not v.proj_size):
        case = replace(case, mode=mode, dtype=torch.float64)
        module, data = make_module(case, nn), make_data(case)
        with threads(1):
            torchs = run_module(case, module, data)
        exact = run_reference(case, dict(module.named_parameters()), data)
        assert_all_as_accurate_as_torch(torchs, exact, exact, torch.float64)


def test_reset_before_and_after_are_different_networks():
    before, after = Case("GRU_RESET_BEFORE"), Case("GRU")
    x = make_data(before)["input"]
    module = make_module(before)
    other = make_module(after)
    other.load_state_dict(module.state_dict())
    assert largest(module(x)[0] - other(x)[0]) > DIFFERENT_NETWORKS


def test_reset_gate_of_ones_makes_the_two_grus_equal():
    """With r = 1 both read n = tanh(W_n x + b + U_n h + b')."""
    outputs = []
    for mode in ("GRU", "GRU_RESET_BEFORE"):
        case = Case(mode, dtype=torch.float64)
        module = make_module(case)
        with torch.no_grad():
            module.bias_ih_l0[: case.hidden_size] = 100.0
        outputs.append(module(make_data(case)["input"])[0])
    torch.testing.assert_close(*outputs, **SAME_EQUATION_FLOAT64)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequence_keeps_its_indices(mode):
    case = Case(mode)
    rows = [torch.randn(n, case.input_size) for n in (2, 5, 3)]
    packed = pack_sequence(rows, enforce_sorted=False)
    output, _ = make_module(case)(packed)
    assert type(output) is type(packed)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, name), getattr(packed, name))


@pytest.mark.parametrize("mode", MODES)
def test_states_of_an_unsorted_packed_sequence_belong_to_its_rows(mode):
    """Row b of hx and of h_n is row b of what was packed, although the kernel sees rows sorted by length."""
    case = Case(mode, dtype=torch.float64, packed="unsorted", batch=4)
    module, data = make_module(case), make_data(case)
    hx = (data["h0"], data["c0"]) if mode == "LSTM" else data["h0"]
    rows = [data["input"][:n, b] for b, n in enumerate(case.lengths().tolist())]
    _, hidden = module(pack_sequence(rows, enforce_sorted=False), hx)
    for b, row in enumerate(rows):
        alone = replace(case, packed="", batched=False, steps=len(row))
        states = {name: data[name][:, b] for name in ("h0", "c0") if name in data}
        exact = call_reference(alone, dict(module.named_parameters()), {"input": row, **states})
        h_n = hidden[0] if mode == "LSTM" else hidden
        torch.testing.assert_close(h_n[:, b], exact["h_n"], **SAME_STATES_FLOAT64)


def test_lstm_states_may_come_in_a_list():
    case = Case("LSTM")
    module, data = make_module(case), make_data(case)
    in_tuple, _ = module(data["input"], (data["h0"], data["c0"]))
    in_list, _ = module(data["input"], [data["h0"], data["c0"]])
    assert torch.equal(in_tuple, in_list)


@pytest.mark.parametrize("mode", MODES)
def test_inference_and_training_give_the_same_numbers(mode):
    """Saving for the backward pass changes nothing in the results."""
    case = Case(mode, batch=9, hidden_size=33)
    module, data = make_module(case), make_data(case)
    trained = named_outputs(*module(data["input"]))
    with torch.no_grad():
        inferred = named_outputs(*module(data["input"]))
    for name in trained:
        assert torch.equal(trained[name], inferred[name])
