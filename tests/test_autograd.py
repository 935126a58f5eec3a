"""How the modules sit in autograd: when a graph is built, what it refuses, and torch.compile."""

import pytest
import torch

import fastseq
from harness import Case, as_leaves, cell_class, make_data, make_module, states_of
from reference import MODES


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
def test_gradients_accumulate(mode):
    module, _, output = run(mode)
    output.sum().backward(retain_graph=True)
    once = {name: x.grad.clone() for name, x in module.named_parameters()}
    output.sum().backward()
    assert all(torch.equal(x.grad, 2 * once[name]) for name, x in module.named_parameters())


@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.square().sum()], ids=["sum", "sum of squares"])
@pytest.mark.parametrize("mode", MODES)
def test_double_backward_is_refused_and_never_silently_wrong(mode, loss):
    """Also when the incoming gradient is a constant, so that autograd could believe nothing is to be done."""
    _, data, output = run(mode)

    def differentiate_twice():
        (gradient,) = torch.autograd.grad(loss(output), data["input"], create_graph=True)
        (gradient.square().sum() + output.sum()).backward()

    with pytest.raises(RuntimeError, match=r"(?i)differentiate twice|second deriv|double"):
        differentiate_twice()


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
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-12)


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
