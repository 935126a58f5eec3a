"""How the modules sit in autograd: when a graph is built, what it refuses, and torch.compile."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import fastseq
from fastseq import ops
from fastseq.checks import CELLS
from harness import (
    Case,
    as_leaves,
    assert_same_bits,
    cell_class,
    check,
    make_data,
    make_module,
    run_module,
    states_of,
    with_gradients,
)
from reference import GATES, MODES
from tolerances import SAME_FLOAT64


def run(mode, **fields):
    case = Case(mode, torch.float64, **fields)
    module, data = make_module(case), make_data(case)
    return module, data, module(data["input"], states_of(data))[0]


@pytest.mark.parametrize("mode", MODES)
def test_no_graph_is_built_when_no_gradient_is_needed(mode):
    case = Case(mode)
    module, x = make_module(case), make_data(case)["input"].detach()
    assert module(x)[0].requires_grad, "the weights want gradients"
    with torch.no_grad():
        assert module(x)[0].grad_fn is None
    with torch.inference_mode():
        assert module(x)[0].is_inference()
    module.requires_grad_(False)
    assert module(x)[0].grad_fn is None
    assert not module(x)[0].requires_grad
    assert module(x.requires_grad_())[0].grad_fn is not None


@pytest.mark.parametrize("mode", MODES)
def test_graph_of_a_cell_is_built_only_when_needed(mode):
    cls, arguments = cell_class(fastseq, mode)
    cell, x = cls(3, 4, **arguments), torch.randn(2, 3)
    first = (lambda out: out[0]) if mode == "LSTM" else (lambda out: out)
    assert first(cell(x)).requires_grad
    with torch.no_grad():
        assert first(cell(x)).grad_fn is None
    cell.requires_grad_(False)
    assert first(cell(x)).grad_fn is None


@pytest.mark.parametrize("mode", MODES)
def test_inputs_made_in_inference_mode_can_be_used_outside(mode):
    with torch.inference_mode():
        x = torch.randn(5, 3, 4)
    with torch.no_grad():
        assert make_module(Case(mode))(x)[0].shape == (5, 3, 7)


@pytest.mark.parametrize("mode", MODES)
def test_backward_twice_through_a_retained_graph(mode):
    module, data, output = run(mode, num_layers=2, bidirectional=True)
    leaves = [*data.values(), *module.parameters()]
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(output.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(output.sum(), leaves)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_gradients_that_a_call_asks_for_are_computed(mode, monkeypatch):
    """torch.autograd.grad(y, x) of a layer whose parameters are trained; all are there when asked for."""
    asked = []
    monkeypatch.setattr(
        ops, "recurrent_backward", lambda *a, run=ops.recurrent_backward: (asked.append(a[-1]), run(*a))[1]
    )
    module, data, output = run(mode)
    parameters = list(module.parameters())
    everything = torch.autograd.grad(output.sum(), [*data.values(), *parameters], retain_graph=True)
    for i, leaf in enumerate([*data.values(), *parameters]):
        (grad,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
        assert torch.equal(grad, everything[i])
        assert sum(asked[-1]) == 1
    output.sum().backward(inputs=parameters[:1], retain_graph=True)
    assert sum(asked[-1]) == 1
    output.sum().backward()
    assert sum(asked[-1]) == len(data) + len(parameters)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate(mode):
    module, _, output = run(mode)
    output.sum().backward(retain_graph=True)
    once = {name: x.grad.clone() for name, x in module.named_parameters()}
    output.sum().backward()
    assert all(torch.equal(x.grad, 2 * once[name]) for name, x in module.named_parameters())


@pytest.mark.parametrize("changed", ["input", "weight_hh_l0", "h0", "output"])
@pytest.mark.parametrize("mode", MODES)
def test_change_in_place_before_backward_is_detected(mode, changed):
    module, data, output = run(mode)
    tensor = output if changed == "output" else {**data, **dict(module.named_parameters())}[changed]
    loss = output.sum()
    with torch.no_grad():
        tensor.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_detached_states_cut_the_graph(mode):
    """Truncated backpropagation: a piece's gradient does not reach back into the piece before."""
    module, data, _ = run(mode)
    first = data["input"]
    second = torch.randn_like(first)
    _, hidden = module(first)
    hidden = tuple(x.detach() for x in hidden) if mode == "LSTM" else hidden.detach()
    output, _ = module(second, hidden)
    (gradient,) = torch.autograd.grad(output.sum(), first, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("mode", MODES)
def test_gradient_layout_matches_its_tensor(mode):
    module, data, output = run(mode, batch_first=True)
    output.sum().backward()
    for x in [*data.values(), *module.parameters()]:
        assert x.grad.shape == x.shape
        assert x.grad.dtype == x.dtype
        assert x.grad.is_contiguous()


def laid_out_anew(x):
    """The same values in another layout, as a hook that keeps saved tensors elsewhere may return them."""
    if x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.repeat_interleave(2)[::2]


LAYERS = [Case(mode, bidirectional=True, num_layers=2, packed=p) for mode in MODES for p in ("", "unsorted")]
LAYERS += [Case(proj_size=3, bidirectional=True, packed=packed) for packed in ("", "unsorted")]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_saved_tensors_may_come_back_in_another_layout(case):
    module, data = make_module(case), make_data(case)
    expected = run_module(case, module, data)
    with saved_tensors_hooks(lambda x: x, laid_out_anew):
        assert_same_bits(run_module(case, module, data), expected)


@pytest.mark.parametrize("mode", MODES)
def test_saved_tensors_of_a_cell_may_come_back_in_another_layout(mode):
    case = Case(mode)
    cell, data, leaves = cell_with_data(case)
    expected = with_gradients(call_cell(cell, data), leaves, case.dtype)
    with saved_tensors_hooks(lambda x: x, laid_out_anew):
        assert_same_bits(with_gradients(call_cell(cell, data), leaves, case.dtype), expected)


def cell_with_data(case):
    """A cell, its input and its states, and all of them with the parameters by name."""
    cls, arguments = cell_class(fastseq, case.mode)
    cell = cls(case.input_size, case.hidden_size, dtype=case.dtype, **arguments)
    data = {name: x[0].detach().requires_grad_() for name, x in make_data(case).items()}
    return cell, data, {**data, **dict(cell.named_parameters())}


def call_cell(cell, data):
    result = cell(data["input"], states_of(data))
    return dict(zip("hc", result, strict=True)) if isinstance(result, tuple) else {"h": result}


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "GRU_RESET_BEFORE"])
def test_backward_operator_takes_an_expanded_saved_tensor(mode, one_step):
    """One number with strides of 0 in the place of all gates."""
    shape, rows, hidden, gates = ((6,), 6, 5, GATES[mode]) if one_step else ((2, 3), 6, 5, GATES[mode])
    lead = () if one_step else (1,)
    x, output, grad = torch.randn(*shape, 4), torch.randn(*shape, hidden), torch.randn(*shape, hidden)
    h0 = torch.randn(*lead, shape[-1], hidden)
    c0 = torch.randn_like(h0) if mode == "LSTM" else None
    weights = [torch.randn(gates * hidden, n) for n in (4, hidden)] + [torch.randn(gates * hidden)] * 2
    expanded = torch.tensor([0.3]).expand(*lead, rows, CELLS[mode].saved, hidden)

    def gradients(operator, saved):
        wanted = [True, True, c0 is not None, True, True, True, True]
        tensors = (grad, None, None, x, None, None, None, h0, c0, weights, output, saved)
        return {str(i): g for i, g in enumerate(operator(*tensors, mode, 1, True, None, 0, wanted))}

    for operator in (ops.recurrent_backward, torch.ops.fastseq.recurrent_backward):
        expected = gradients(operator, expanded.contiguous())
        assert all(g.any() for g in expected.values())
        assert_same_bits(gradients(operator, expanded), expected)


# One step, where the initial state is all of the recurrent product's input.
ONE_STEP = [
    replace(Case(steps=1, proj_size=proj_size), mode=mode, packed=packed, bidirectional=both, batch=batch)
    for mode, proj_size in [*((mode, 0) for mode in MODES), ("LSTM", 3)]
    for packed in ("", "unsorted")
    for both in (False, True)
    for batch in (1, 7)
]


def choices_of_states(data):
    """None of the initial states, each, and both if there are two: which of them want a gradient."""
    states = [name for name in ("h0", "c0") if name in data]
    return [(), *((name,) for name in states), tuple(states)]


@pytest.mark.parametrize("case", ONE_STEP, ids=str)
def test_one_step_is_right_whether_or_not_the_initial_state_wants_a_gradient(case):
    """What costs nothing where it is not wanted must not be missing elsewhere."""
    module, data = make_module(case), make_data(case)
    everything = run_module(case, module, data)
    check(case, module, data)
    for wanted in choices_of_states(data):
        for name in {"h0", "c0"} & data.keys():
            data[name].requires_grad_(name in wanted)
        results = run_module(case, module, data)
        missing = {f"grad of {name}" for name in {"h0", "c0"} & data.keys() - set(wanted)}
        assert everything.keys() - results.keys() == missing
        assert_same_bits(results, {name: everything[name] for name in results})


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("mode", MODES)
def test_cell_is_right_whether_or_not_its_state_wants_a_gradient(mode, batch):
    """That the gradients of all are right is tested in test_cells.py."""
    case = Case(mode, batch=batch)
    cell, data, leaves = cell_with_data(case)
    everything = with_gradients(call_cell(cell, data), leaves, case.dtype)
    for wanted in choices_of_states(data):
        for name in {"h0", "c0"} & data.keys():
            data[name].requires_grad_(name in wanted)
        results = with_gradients(call_cell(cell, data), leaves, case.dtype)
        missing = {f"grad of {name}" for name in {"h0", "c0"} & data.keys() - set(wanted)}
        assert everything.keys() - results.keys() == missing
        assert_same_bits(results, {name: everything[name] for name in results})


@pytest.mark.parametrize("mode", ["LSTM", "GRU_RESET_BEFORE"])
def test_torch_compile_sees_one_graph(mode):
    """fullgraph=True fails at any graph break; forward and backward are compared with the eager call."""
    case = Case(mode, torch.float64, num_layers=2, bidirectional=True)
    module, data = make_module(case), make_data(case)

    def call(data):
        output, _ = module(data["input"], states_of(data))
        return output.sin()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = as_leaves(data)
        output = function(leaves)
        gradients = torch.autograd.grad(output.sum(), [*leaves.values(), *module.parameters()])
        results.append([output, *gradients])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **SAME_FLOAT64)


def test_torch_compile_of_a_cell_in_a_loop():
    cell = fastseq.GRUCell(4, 5)

    def call(x):
        h = None
        for t in range(3):
            h = cell(x[t], h)
        return h

    x = torch.randn(3, 2, 4)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_meta_tensors_get_the_shapes_and_strides_of_real_ones(mode, batch_first):
    case = Case(mode, num_layers=2, bidirectional=True, batch_first=batch_first, batch=4)
    x = make_data(case)["input"].detach()
    real, meta = make_module(case), make_module(case).to("meta")
    for a, b in zip(real(x), meta(x.to("meta")), strict=True):
        for y, z in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
            assert z.is_meta
            assert y.shape == z.shape
            assert y.stride() == z.stride()


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_batched_gradients_are_those_of_each_entry(name):
    module = getattr(fastseq, name)(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    output, grads = module(x)[0], torch.randn(3, 4, 2, 5)
    wanted = [x, *module.parameters()]
    batched = torch.autograd.grad(output, wanted, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(output, wanted, grad, retain_graph=True)
        assert all(torch.equal(a[i], b) for a, b in zip(batched, one, strict=True))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_vectorized_jacobian_is_the_jacobian(name):
    module = getattr(fastseq, name)(3, 5)
    x = torch.randn(2, 3)

    def call(x):
        result = module(x)
        return result[0] if isinstance(result, tuple) else result

    jacobian = torch.autograd.functional.jacobian
    assert torch.equal(jacobian(call, x, vectorize=True), jacobian(call, x))
