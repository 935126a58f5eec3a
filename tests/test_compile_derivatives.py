"""torch.compile and torch.export of functions that differentiate: torch.func and forward mode in them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils._pytree import tree_leaves

import fastseq
from tolerances import SAME_FLOAT64

BACKENDS = ["eager", "aot_eager"]
# What only gradients know of.
OF_GRADIENTS = [
    {"grad_clip": 1e-3},
    {"truncate": 2},
    {"memory": "recompute"},
    {"memory": "checkpoint:2", "grad_clip": 1e-3, "truncate": 3},
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(cls=fastseq.GRU, **options):
    """Its parameters are constants: a graph with gradients for them would have one derivative more."""
    torch.manual_seed(1)
    return cls(3, 3, **options).double().requires_grad_(False)


def sequence(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def assert_compiles_to_the_same(function, *arguments, backend):
    expected = function(*arguments)
    compiled = torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    for a, b in zip(tree_leaves(compiled), tree_leaves(expected), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def attend(x):
    return fastseq.scaled_dot_product_attention(x, x, x, is_causal=True)


LAYER, CELL = layer(), layer(fastseq.LSTMCell)
HEADS = fastseq.MultiheadAttention(3, 1).double().requires_grad_(False)
FUNCTIONS = {
    "layer": lambda x: LAYER(x)[0],
    "cell": lambda x: sum(CELL(x[0])),
    "attention": attend,
    "multi-head attention": lambda x: HEADS(x, x, x)[0],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_within_a_compiled_function_keeps_the_tangent(name, backend):
    def along(x, v):
        return jvp(lambda x: FUNCTIONS[name](x).square() + x.mean(), (x,), (v,))

    x, v = sequence(5, 2, 3), sequence(5, 2, 3) + 1
    assert_compiles_to_the_same(along, x, v, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_numbers_within_a_compiled_function_keep_the_tangent(backend):
    module = layer()

    def along(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))[0] + 1).tangent

    assert_compiles_to_the_same(along, sequence(5, 2, 3), backend=backend)


SECOND = {
    "forward over reverse": lambda f: lambda x: jvp(grad(f), (x,), (x,))[1],
    "reverse over forward": lambda f: grad(lambda x: jvp(f, (x,), (x,))[1]),
    "reverse over reverse": lambda f: grad(lambda x: grad(f)(x).square().sum()),
    "hessian": hessian,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", SECOND)
@pytest.mark.parametrize("name", ["layer", "attention"])
def test_second_derivatives_within_a_compiled_function(name, order, backend):
    derivative = SECOND[order](lambda x: FUNCTIONS[name](x).square().sum())
    assert_compiles_to_the_same(derivative, sequence(3, 2, 3), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OF_GRADIENTS, ids=str)
@pytest.mark.parametrize("cls", [fastseq.GRU, fastseq.LSTM])
def test_options_of_gradients_within_a_compiled_function(cls, options, backend):
    module = layer(cls, **options)
    parameters = {name: x.detach() for name, x in module.named_parameters()}

    def gradients(parameters, x):
        def loss(parameters, x):
            return functional_call(module, parameters, (x,))[0].square().sum()

        return grad(loss, argnums=(0, 1))(parameters, x)

    assert_compiles_to_the_same(gradients, parameters, sequence(5, 2, 3), backend=backend)


def test_forward_mode_within_an_exported_function_keeps_the_tangent():
    class Along(torch.nn.Module):
        def forward(self, x):
            return jvp(lambda x: attend(x) + x, (x,), (x,))[1]

    x = sequence(2, 5, 3)
    for strict in (True, False):
        exported = export(Along(), (x,), strict=strict).module()(x)
        torch.testing.assert_close(exported, Along()(x), **SAME_FLOAT64)


@pytest.mark.parametrize("options", OF_GRADIENTS, ids=str)
def test_a_dynamic_length_is_compiled_once_whatever_options_gradients_have(options):
    module = fastseq.LSTM(3, 4, **options).double()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for i, steps in enumerate(range(5, 17)):
        x = sequence(steps, 2, 3).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            (a,), (b,) = (torch.autograd.grad(m(x)[0].square().sum(), x) for m in (compiled, module))
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("options", OF_GRADIENTS, ids=str)
def test_export_with_a_dynamic_length_whatever_options_gradients_have(options):
    module = fastseq.LSTM(3, 4, **options).double()
    exported = export(module, (sequence(7, 2, 3),), dynamic_shapes=({0: Dim("T")},)).module()
    for steps in (2, 3, 20):
        x = sequence(steps, 2, 3)
        assert torch.equal(exported(x)[0], module(x)[0])


@pytest.mark.parametrize("options", OF_GRADIENTS, ids=str)
def test_tied_tensors_in_a_compiled_layer(options):
    module = fastseq.GRU(4, 4, **options)
    module.bias_hh_l0, module.weight_hh_l0 = module.bias_ih_l0, module.weight_ih_l0
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(m(x)[0].sum(), list(module.parameters())) for m in (module, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OF_GRADIENTS, ids=str)
def test_maps_of_layers_whatever_options_gradients_have(options):
    module, x = fastseq.GRU(3, 4, **options).double(), sequence(2, 5, 2, 3)
    out, tangent = jvp(lambda x: vmap(module)(x)[0], (x,), (x.cos(),))
    expected = [jvp(lambda x: module(x)[0], (x[i],), (x[i].cos(),)) for i in range(2)]
    torch.testing.assert_close((out, tangent), tuple(map(torch.stack, zip(*expected, strict=True))))
    x.requires_grad_()
    loss = sum(module(x[i])[0].square().sum() for i in range(2))
    grads = [torch.autograd.grad(y, x)[0] for y in (vmap(module)(x)[0].square().sum(), loss)]
    torch.testing.assert_close(*grads, **SAME_FLOAT64)
