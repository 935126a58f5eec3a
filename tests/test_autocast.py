"""torch.autocast does to the recurrent modules what it does to torch.nn's: dtypes, casts, gradients."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastseq
from harness import (
    Case,
    assert_all_as_accurate_as_torch,
    call_module,
    cell_class,
    make_data,
    make_module,
    run_module,
    run_reference,
    same_bits,
)
from reference import MODES
from tolerances import SAME_FLOAT32

TORCH_MODES = [mode for mode in MODES if mode != "GRU_RESET_BEFORE"]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LAYERS = [Case(mode, num_layers=2, bidirectional=True) for mode in TORCH_MODES]
LAYERS += [Case("LSTM", proj_size=3), Case("LSTM", packed="sorted"), Case("GRU", packed="sorted", bias=False)]
LAYERS += [Case("RNN_TANH", packed="sorted"), Case("LSTM", packed="sorted", proj_size=3, num_layers=2)]


def dtypes(results):
    return [x.dtype for x in tree_leaves(results) if x is not None]


def outcome(call, *given):
    try:
        return dtypes(call(*given))
    except (RuntimeError, ValueError):
        return "error"


def layer_call(case, library, dtype, of_input, of_weights, of_h, of_c):
    module = make_module(case, library).to(of_weights)
    x = torch.randn(case.steps, case.batch, case.input_size, dtype=of_input)
    if case.packed:
        x = pack_padded_sequence(x, case.lengths())
    rows = case.num_layers * case.directions, case.batch
    hx = None
    if of_h is not None:
        h = torch.randn(*rows, case.width, dtype=of_h)
        hx = (h, torch.randn(*rows, case.hidden_size, dtype=of_c)) if case.mode == "LSTM" else h
    with torch.autocast("cpu", dtype):
        output, state = module(x, hx)
    return output.data, state


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_dtypes_of_layers_are_torchs(case):
    states = (None, None), (F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F64, F64)
    for tensors in ((F32, F32), (F32, BF16), (BF16, F32), (F64, F64), (F64, F32)):
        for state in states:
            given = (BF16, *tensors, *state)
            ours, torchs = (outcome(layer_call, case, library, *given) for library in (fastseq, nn))
            assert ours == torchs, given


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("mode", TORCH_MODES)
def test_dtypes_of_cells_are_torchs(mode, dtype):
    def call(library, of_input, of_weights, of_h, of_c):
        cls, arguments = cell_class(library, mode)
        cell, x = cls(4, 5, **arguments).to(of_weights), torch.randn(3, 4, dtype=of_input)
        h = None if of_h is None else torch.randn(3, 5, dtype=of_h)
        with torch.autocast("cpu", dtype):
            return cell(x, (h, h.to(of_c)) if mode == "LSTM" and h is not None else h)

    states = (None, None), (F32, F32), (dtype, dtype), (F32, dtype), (dtype, F32), (F64, F64)
    for of_input in (F32, dtype, F64):
        for of_weights in (F32, dtype, F64):
            for of_h, of_c in states:
                given = (of_input, of_weights, of_h, of_c)
                assert outcome(call, fastseq, *given) == outcome(call, nn, *given), given


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_results_and_gradients_are_as_accurate_as_torchs(case):
    """Gradients in the dtype of the parameters, float32."""
    module, data = make_module(case), make_data(case)
    theirs = make_module(case, nn)
    theirs.load_state_dict(module.state_dict())
    with torch.autocast("cpu", BF16):
        ours, torchs = run_module(case, module, data), run_module(case, theirs, data)
    exact = run_reference(case, dict(module.named_parameters()), data)
    assert dtypes(ours) == dtypes(torchs)
    assert all(x.dtype is F32 for name, x in ours.items() if name.startswith("grad"))
    ours, torchs = ({name: x.to(BF16) for name, x in results.items()} for results in (ours, torchs))
    assert_all_as_accurate_as_torch(ours, torchs, exact, BF16)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("mode", MODES)
def test_arithmetic_is_that_of_a_module_in_the_dtype_of_autocast(mode, dtype):
    case = Case(mode, num_layers=2, bidirectional=True)
    module, data = make_module(case), make_data(case)
    cls, arguments = cell_class(fastseq, mode)
    cell, x = cls(4, 7, **arguments), data["input"][0]
    with torch.autocast("cpu", dtype):
        ours = tree_leaves(call_module(case, module, data)) + tree_leaves(cell(x))
    data = {name: x.to(dtype) for name, x in data.items()}
    cast = tree_leaves(call_module(case, module.to(dtype), data)) + tree_leaves(cell.to(dtype)(x.to(dtype)))
    for a, b in zip(ours, cast, strict=True):
        assert same_bits(a.to(dtype).detach(), b.detach())


@pytest.mark.parametrize("mode", MODES)
def test_autocast_that_is_off_inside_changes_nothing(mode):
    case = Case(mode)
    module, data = make_module(case), make_data(case)
    expected = call_module(case, module, data)
    with torch.autocast("cpu", BF16):
        with torch.autocast("cpu", enabled=False):
            inside = call_module(case, module, data)
        with torch.autocast("cpu", F16):
            other = call_module(case, module, data)
    with torch.autocast("cuda", F16, enabled=False):
        elsewhere = call_module(case, module, data)
    for name, x in expected.items():
        assert torch.equal(inside[name], x)
        assert torch.equal(elsewhere[name], x)
        assert torch.equal(other[name].half(), call_in(F16, case, module, data)[name].half())


def call_in(dtype, case, module, data):
    with torch.autocast("cpu", dtype):
        return call_module(case, module, data)


@pytest.mark.parametrize("cache_enabled", [False, True])
def test_weights_that_are_used_twice_have_the_sum_of_both_gradients(cache_enabled):
    cell = fastseq.GRUCell(4, 5)
    x = torch.randn(2, 3, 4)

    def gradients(function):
        with torch.autocast("cpu", BF16, cache_enabled=cache_enabled):
            loss = function()
        return torch.autograd.grad(loss, list(cell.parameters()))

    both = gradients(lambda: cell(x[0]).sum() + cell(x[1]).sum())
    apart = [gradients(lambda i=i: cell(x[i]).sum()) for i in (0, 1)]
    for a, b, c in zip(both, *apart, strict=True):
        torch.testing.assert_close(a, b + c, **SAME_FLOAT32)


def test_weights_cast_without_gradients_do_not_lose_them_later():
    module, x = fastseq.LSTM(4, 5), torch.randn(6, 3, 4)
    with torch.autocast("cpu", BF16):
        with torch.no_grad():
            module(x)
        output = module(x)[0]
    output.sum().backward()
    assert all(p.grad.any() for p in module.parameters())


def test_grad_scaler_steps_and_skips_overflows():
    model = nn.ModuleList([fastseq.LSTM(4, 5), nn.Linear(5, 1)])
    optimizer, scaler = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", init_scale=64.0),
    )

    def step(factor):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", F16):
            loss = model[1](model[0](torch.ones(6, 3, 4))[0]).float().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]

    assert all(step(1.0))
    assert scaler.get_scale() == 64.0
    assert not any(step(1e38))
    assert scaler.get_scale() == 32.0


@pytest.mark.parametrize("need_weights", [False, True])
def test_dtypes_of_multihead_attention_are_torchs(need_weights):
    x = torch.randn(2, 5, 8)
    for of_input, of_weights in ((F32, F32), (BF16, F32), (F64, F64)):
        results = []
        for library in (fastseq, nn):
            module = library.MultiheadAttention(8, 2, batch_first=True).to(of_weights)
            with torch.autocast("cpu", BF16):
                results.append(dtypes(module(*[x.to(of_input)] * 3, need_weights=need_weights)))
        assert results[0] == results[1]


def test_functional_forms_are_cast_like_the_modules():
    module, cell, x = fastseq.GRU(4, 5), fastseq.LSTMCell(4, 5), torch.randn(6, 3, 4)
    with torch.autocast("cpu", BF16):
        gru = fastseq.functional.gru(x, module.all_weights)
        ours = gru, fastseq.functional.lstm_cell(x[0], None, *cell.parameters())
        expected = module(x), cell(x[0])
    for a, b in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        assert same_bits(a.detach(), b.detach())
