"""RNNCell, LSTMCell and GRUCell: one step against the float64 reference, and the worked example."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastseq
import reference
from fastseq import _C
from harness import (
    DTYPES,
    Case,
    as_leaves,
    assert_all_as_accurate_as_torch,
    cell_class,
    keep_relu_off_its_kink,
    states_of,
    threads,
    with_gradients,
)
from reference import MODES
from tolerances import SAME_STATES_FLOAT64, WORKED_EXAMPLE

VARIANTS = [
    Case(),
    Case(states=False),
    Case(bias=False),
    Case(batched=False),
    Case(batched=False, states=False, bias=False),
    Case(batch=1, hidden_size=1, input_size=1),
    Case(batch=33, hidden_size=65, input_size=129),
    Case(input_size=0),
    Case(input_size=0, states=False, batch=1),
    Case(input_size=0, bias=False, batched=False),
]


def make_cell(case, library=fastseq):
    torch.manual_seed(0)
    cls, arguments = cell_class(library, case.mode)
    cell = cls(case.input_size, case.hidden_size, bias=case.bias, dtype=case.dtype, **arguments)
    return keep_relu_off_its_kink(cell, case.mode)


def make_data(case):
    g = torch.Generator().manual_seed(1)
    sizes = {"input": case.input_size}
    if case.states:
        sizes |= {"h0": case.hidden_size} | ({"c0": case.hidden_size} if case.mode == "LSTM" else {})
    data = {}
    for name, size in sizes.items():
        x = torch.randn(case.batch if case.batched else 1, size, generator=g, dtype=torch.float64).to(
            case.dtype
        )
        x = x.abs() if case.mode == "RNN_RELU" else x
        data[name] = (x if case.batched else x[0]).requires_grad_()
    return data


def named(state):
    return {"h": state[0], "c": state[1]} if isinstance(state, tuple) else {"h": state}


def run_cell(case, cell, data):
    return with_gradients(
        named(cell(data["input"], states_of(data))), {**data, **dict(cell.named_parameters())}, case.dtype
    )


def run_reference(case, parameters, data, dtype=torch.float64):
    parameters, data = as_leaves(parameters, dtype), as_leaves(data, dtype)
    input = data["input"]
    zeros = input.new_zeros(*input.shape[:-1], case.hidden_size)
    h, c = data.get("h0", zeros), data.get("c0", zeros)
    h, c = reference.step(
        case.mode, input, h, c if case.mode == "LSTM" else None, reference.Weights(**parameters)
    )
    return with_gradients(named(h if c is None else (h, c)), {**data, **parameters}, case.dtype)


def check(case):
    cell, data = make_cell(case), make_data(case)
    parameters = dict(cell.named_parameters())
    ours = run_cell(case, cell, data)
    exact = run_reference(case, parameters, data)
    if case.mode == "GRU_RESET_BEFORE":
        torchs = run_reference(case, parameters, data, case.dtype)
    else:
        with threads(1):
            torchs = run_cell(case, make_cell(case, nn), data)
    assert_all_as_accurate_as_torch(ours, torchs, exact, case.dtype)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_cell_and_gradients_match_float64_reference(variant, mode, dtype):
    check(replace(variant, mode=mode, dtype=dtype))


@pytest.mark.parametrize("mode", MODES)
def test_cell_in_a_loop_is_the_module(mode):
    case = Case(mode, dtype=torch.float64)
    cell = make_cell(case)
    module = cell_class(fastseq, mode)[0].__name__.removesuffix("Cell")
    arguments = cell_class(fastseq, mode)[1]
    module = getattr(fastseq, module)(case.input_size, case.hidden_size, dtype=case.dtype, **arguments)
    module.load_state_dict({f"{name}_l0": x for name, x in cell.state_dict().items()})
    x = torch.randn(case.steps, case.batch, case.input_size, dtype=case.dtype)
    state, outputs = None, []
    for t in range(case.steps):
        state = cell(x[t], state)
        outputs.append(state[0] if mode == "LSTM" else state)
    torch.testing.assert_close(torch.stack(outputs), module(x)[0], **SAME_STATES_FLOAT64)


def test_batch_of_no_rows():
    for mode in MODES:
        case = Case(mode, batch=0)
        cell, data = make_cell(case), make_data(case)
        results = run_cell(case, cell, data)
        assert results["h"].shape == (0, case.hidden_size)
        assert all(not results[f"grad of {name}"].any() for name, _ in cell.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_accumulated_in_float32_and_rounded_once(dtype):
    """relu(x + h + b) with unit matrices: the sum is exact in float32, so one rounding is all there is."""
    n = 64
    cell = fastseq.RNNCell(n, n, nonlinearity="relu", dtype=dtype)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.eye(n))
        cell.weight_hh.copy_(torch.eye(n))
        cell.bias_hh.zero_()
        x, h = torch.rand(200, n).to(dtype), torch.rand(200, n).to(dtype) / 32
        cell.bias_ih.copy_(torch.rand(n) / 8)
        assert torch.equal(cell(x, h), (x.double() + h.double() + cell.bias_ih.double()).to(dtype))


W = """0.5344613383   0.2340135574  0.6833450257  0.134806233
       0.005400196945 0.3850176626  0.9667685167  0.7758002355
       0.3359488417   0.7829360944  0.1415861303  0.423786741"""
B = "0.6397506561 0.948082303 0.644066256"
U = """0.1524336548   0.8001560108  0.159796803
       0.8479080448   0.6059535281  0.2086256969
       0.2940066967   0.710345277   0.6300805231"""
H = """0.8256177525 0.7413555946 0.7530724405
       0.9649761201 0.9784509017 0.9768607239
       0.9784701503 0.988315444  0.9884511664"""
SOFTMAX = """0.3509740057 0.3226118845 0.3264141098
             0.3305215335 0.3350053806 0.3344730858
             0.3311340611 0.3344102744 0.3344556645"""


def numbers(text):
    return torch.tensor([[float(x) for x in line.split()] for line in text.splitlines()], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["module", "cell"])
def test_worked_example_in_all_its_decimals(kind):
    """The one-hot (1, 0, 0, 0) three times through a tanh RNN of 3 units; ten decimals."""
    weights = {
        "weight_ih": numbers(W),
        "weight_hh": numbers(U),
        "bias_ih": numbers(B)[0],
        "bias_hh": torch.zeros(3),
    }
    x = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    if kind == "module":
        module = fastseq.RNN(4, 3, dtype=torch.float64)
        module.load_state_dict({f"{name}_l0": weight for name, weight in weights.items()})
        h, _ = module(x.expand(3, 4))
    else:
        cell = fastseq.RNNCell(4, 3, dtype=torch.float64)
        cell.load_state_dict(weights)
        h = [cell(x)]
        h += [cell(x, h[-1])]
        h += [cell(x, h[-1])]
        h = torch.stack(h)
    torch.testing.assert_close(h, numbers(H), **WORKED_EXAMPLE)
    torch.testing.assert_close(h.softmax(-1), numbers(SOFTMAX), **WORKED_EXAMPLE)
    assert h.argmax(-1).tolist() == [0, 1, 2]


def cell_arguments(mode):
    """A cell's function and its arguments by name: input (2, 3), states (2, 5)."""
    torch.manual_seed(0)
    rows = 5 * _C.CELLS[mode]["gates"]
    state = {"h": torch.randn(2, 5)} | ({"c": torch.randn(2, 5)} if mode == "LSTM" else {})
    weights = {"w_ih": (rows, 3), "w_hh": (rows, 5), "b_ih": (rows,), "b_hh": (rows,)}
    arguments = {"input": torch.randn(2, 3), **state, **{n: torch.randn(s) for n, s in weights.items()}}
    function = {"LSTM": fastseq.functional.lstm_cell, "GRU": fastseq.functional.gru_cell}.get(
        mode, fastseq.functional.rnn_cell
    )

    def call(input, h, w_ih, w_hh, b_ih, b_hh, c=None):
        result = function(input, h if c is None else (h, c), w_ih, w_hh, b_ih, b_hh)
        return result if isinstance(result, tuple) else (result,)

    return call, arguments


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_negated_views_count_with_their_sign(mode):
    call, arguments = cell_arguments(mode)
    expected = call(**arguments)
    for name, tensor in arguments.items():
        result = call(**arguments | {name: torch._neg_view(-tensor)})
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), name


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_tensors_without_memory_are_zeros_or_an_error_and_never_read(mode):
    call, arguments = cell_arguments(mode)
    for name, tensor in arguments.items():
        without_memory = arguments | {name: torch._efficientzerotensor(tensor.shape)}
        if name in ("input", "w_ih", "w_hh"):
            with pytest.raises(RuntimeError, match="memory"):
                call(**without_memory)
        else:
            expected = call(**arguments | {name: torch.zeros_like(tensor)})
            assert all(torch.equal(a, b) for a, b in zip(call(**without_memory), expected, strict=True)), name


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize("missing", ["input", "w_ih", "w_hh"])
def test_missing_tensor_is_an_error(mode, missing):
    call, arguments = cell_arguments(mode)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        call(**arguments | {missing: None})
