"""torch.func over the recurrent modules and their cells: vmap, per-sample gradients, ensembles, Jacobians."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastseq
from harness import Case, cell_class, make_data, make_module, same_bits
from reference import MODES
from tolerances import SAME_FLOAT64

ENTRIES = 3
CASES = [Case(mode, torch.float64, states=False) for mode in MODES]
CASES += [
    Case("LSTM", torch.float64, num_layers=2, bidirectional=True, states=False),
    Case("LSTM", torch.float64, proj_size=3, bidirectional=True, states=False),
    Case("GRU", torch.float64, batch_first=True, bias=False, states=False),
    Case("RNN_TANH", torch.float64, batched=False, num_layers=2, states=False),
]


class Operators(TorchDispatchMode):
    """Counts the calls of fastseq's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastseq":
            self.calls.append(func._schema.name.removeprefix("fastseq::"))
        return func(*args, **(kwargs or {}))


def entries_of(case, seed=1):
    """The inputs of all entries, (N, ...)."""
    return torch.stack([make_data(case, seed + i)["input"].detach() for i in range(ENTRIES)])


def loop(function, *batched):
    """What vmap(function)(*batched) is."""
    results = [function(*(tree_map(lambda x, i=i: x[i], b) for b in batched)) for i in range(ENTRIES)]
    return tree_map(lambda *x: torch.stack(x), *results)


def assert_same(a, b):
    a, b = tree_leaves(a), tree_leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **SAME_FLOAT64)


def loss_of(module):
    """A number, as a function of parameters and input."""

    def loss(parameters, x):
        output, state = functional_call(module, parameters, (x,))
        return output.sin().sum() + sum(s.square().sum() for s in tree_leaves(state))

    return loss


def parameters_of(module):
    return {name: x.detach() for name, x in module.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_entries_are_computed_as_one_larger_batch_in_one_call_of_each_layer(case):
    module, x = make_module(case), entries_of(case)
    for recording in (nullcontext(), torch.no_grad()):
        with recording, Operators() as operators:
            output, state = vmap(module)(x)
        assert operators.calls == ["recurrent"] * case.num_layers
        one_by_one = loop(module, x)
        for a, b in zip(tree_leaves((output, state)), tree_leaves(one_by_one), strict=True):
            assert same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autograd_through_vmap_is_that_of_a_loop_in_one_call_of_each_layer(case):
    module, x = make_module(case), entries_of(case).requires_grad_()
    leaves = [x, *module.parameters()]
    outputs = vmap(module)(x), loop(module, x)
    with Operators() as operators:
        ours = torch.autograd.grad(outputs[0][0].sin().sum(), leaves)
    assert operators.calls.count("recurrent_backward") == case.num_layers
    assert_same(ours, torch.autograd.grad(outputs[1][0].sin().sum(), leaves))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_per_sample_gradients_are_those_of_a_loop(case):
    module, x = make_module(case), entries_of(case)
    parameters, derivative = parameters_of(module), grad(loss_of(module), argnums=(0, 1))
    assert_same(
        vmap(derivative, in_dims=(None, 0))(parameters, x), loop(lambda x: derivative(parameters, x), x)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_a_vmap_is_the_sum_over_the_entries(case):
    module, x = make_module(case), entries_of(case)
    loss, parameters = loss_of(module), parameters_of(module)
    ours = grad(lambda p: vmap(loss, in_dims=(None, 0))(p, x).sum())(parameters)
    assert_same(ours, grad(lambda p: loop(lambda x: loss(p, x), x).sum())(parameters))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ensembles_have_the_results_and_gradients_of_their_members(case):
    members = [make_module(case, seed=i) for i in range(ENTRIES)]
    parameters, _ = stack_module_state(members)
    x, loss = entries_of(case), loss_of(members[0])
    of_member = [loss(parameters_of(m), x[0]) for m in members]
    assert_same(vmap(loss, in_dims=(0, None))(parameters, x[0]), torch.stack(of_member))
    parameters = tree_map(torch.Tensor.detach, parameters)
    assert_same(vmap(grad(loss))(parameters, x), loop(grad(loss), parameters, x))


@pytest.mark.parametrize("mapped", [("h",), ("x", "h"), ("h", "c"), ("x", "c")], ids="".join)
def test_states_may_be_of_each_entry_or_shared(mapped):
    module = make_module(Case(dtype=torch.float64))
    sizes = {"x": (5, 3, 4), "h": (1, 3, 7), "c": (1, 3, 7)}
    data = {
        name: torch.randn(*([ENTRIES] if name in mapped else []), *size, dtype=torch.float64)
        for name, size in sizes.items()
    }

    def call(x, h, c):
        return module(x, (h, c))

    in_dims = tuple(0 if name in mapped else None for name in data)
    shared = {name: x if name in mapped else x.expand(ENTRIES, *x.shape) for name, x in data.items()}
    assert_same(vmap(call, in_dims)(*data.values()), loop(call, *shared.values()))


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_of_the_same_lengths(mode):
    module = make_module(Case(mode, torch.float64, bidirectional=True))
    packed = pack_padded_sequence(torch.randn(5, 3, 4, dtype=torch.float64).abs(), torch.tensor([5, 3, 2]))
    data = torch.randn(ENTRIES, *packed.data.shape, dtype=torch.float64).abs()

    def call(data):
        output, state = module(PackedSequence(data, packed.batch_sizes))
        return output.data, state

    def loss(data):
        return call(data)[0].sin().sum()

    assert_same(vmap(call)(data), loop(call, data))
    assert_same(vmap(grad(loss))(data), loop(grad(loss), data))


def test_packed_sequences_of_other_lengths_in_each_entry_by_the_operator():
    weights = [x.detach() for x in fastseq.GRU(4, 5).double().parameters()]
    data, h0 = torch.randn(ENTRIES, 6, 4, dtype=torch.float64), torch.zeros(1, 3, 5, dtype=torch.float64)
    sizes = torch.tensor([[3, 2, 1], [3, 3, 0], [3, 2, 1]])

    def call(data, sizes):
        return torch.ops.fastseq.recurrent(
            data, sizes, None, None, h0, None, weights, "GRU", 1, True, False, "nothing"
        )[:2]

    assert_same(vmap(call)(data, sizes), loop(call, data, sizes))


def test_maps_within_maps_and_other_dimensions():
    module = make_module(Case("GRU", torch.float64))
    parameters, loss = parameters_of(module), loss_of(module)
    x = torch.randn(2, 5, ENTRIES, 3, 4, dtype=torch.float64)

    def rows(function):
        return torch.stack([loop(function, y.transpose(0, 1)) for y in x])

    output = vmap(vmap(lambda x: module(x)[0], in_dims=1, out_dims=2), out_dims=1)(x)
    assert_same(output.movedim((1, 3), (0, 1)), rows(lambda x: module(x)[0]))
    ours = vmap(vmap(grad(loss), in_dims=(None, 1)), in_dims=(None, 0))(parameters, x)
    for name, x_of_name in ours.items():
        assert_same(x_of_name, rows(lambda x, name=name: grad(loss)(parameters, x)[name]))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_are_the_same_bits(chunk_size):
    case = Case("LSTM", torch.float64, states=False)
    module, x = make_module(case), entries_of(case)
    derivative = grad(loss_of(module))
    arguments, in_dims = (parameters_of(module), x), (None, 0)
    whole = vmap(derivative, in_dims)(*arguments)
    chunks = vmap(derivative, in_dims, chunk_size=chunk_size)(*arguments)
    for a, b in zip(tree_leaves(chunks), tree_leaves(whole), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_jacobians_are_torchs(mode):
    case = Case(mode, torch.float64, steps=2, batch=1, hidden_size=2, states=False)
    module, x = make_module(case), make_data(case)["input"].detach()
    parameters = parameters_of(module)

    def of_input(x):
        return module(x)[0]

    assert_same(jacrev(of_input)(x), torch.autograd.functional.jacobian(of_input, x))
    by_name = jacrev(lambda p: functional_call(module, p, (x,))[0])
    chunks = jacrev(lambda p: functional_call(module, p, (x,))[0], chunk_size=1)
    expected = torch.autograd.functional.jacobian(
        lambda *p: functional_call(module, dict(zip(parameters, p, strict=True)), (x,))[0],
        tuple(parameters.values()),
    )
    assert_same(by_name(parameters), expected)
    assert_same(chunks(parameters), expected)


def test_backward_pass_of_vjp_may_be_called_later():
    module, x = make_module(Case("LSTM", torch.float64)), torch.randn(5, 3, 4, dtype=torch.float64)
    output, pull = vjp(lambda x: module(x)[0], x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf)[0], leaf, torch.ones_like(output))
    assert_same(pull(torch.ones_like(output)), expected)
    assert_same(pull(torch.ones_like(output)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_cells(mode):
    cls, arguments = cell_class(fastseq, mode)
    cell = cls(4, 5, dtype=torch.float64, **arguments)
    parameters = parameters_of(cell)
    x, h = torch.randn(ENTRIES, 2, 4).double(), torch.randn(ENTRIES, 2, 5).double()

    def loss(parameters, x, h):
        states = functional_call(cell, parameters, (x, (h, h) if mode == "LSTM" else h))
        return sum(s.sin().sum() for s in tree_leaves(states))

    with Operators() as operators:
        vmap(loss, in_dims=(None, 0, 0))(parameters, x, h)
    assert operators.calls == ["recurrent_cell"]
    derivative = grad(loss, argnums=(0, 1, 2))
    ours = vmap(derivative, in_dims=(None, 0, 0))(parameters, x, h)
    assert_same(ours, loop(lambda x, h: derivative(parameters, x, h), x, h))


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_dropout_between_layers_is_drawn_as_vmap_is_told(randomness):
    module = fastseq.LSTM(4, 5, num_layers=2, dropout=0.5)
    x = torch.randn(5, 3, 4).expand(ENTRIES, 5, 3, 4)
    mapped = vmap(lambda x: module(x)[0], randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            mapped(x)
        return
    output = mapped(x)
    assert torch.equal(output[0], output[1]) == (randomness == "same")


def test_model_of_other_modules_has_per_sample_gradients():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(11, 4), nn.Linear(5, 11)
            self.recurrent = fastseq.GRU(4, 5, batch_first=True)

        def forward(self, tokens):
            return self.linear(self.recurrent(self.embedding(tokens))[0])

    model, tokens = Model().double(), torch.randint(11, (ENTRIES, 7))
    parameters = parameters_of(model)

    def loss(parameters, tokens):
        logits = functional_call(model, parameters, (tokens[:-1].unsqueeze(0),))
        return nn.functional.cross_entropy(logits.squeeze(0), tokens[1:])

    ours = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens)
    assert_same(ours, loop(lambda tokens: grad(loss)(parameters, tokens), tokens))


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_of_each_entry(mode):
    """Of the squared slopes, by torch.func within and without vmap, and by autograd."""
    module = make_module(Case(mode, torch.float64)).requires_grad_(False)
    x = torch.randn(ENTRIES, 5, 3, 4, dtype=torch.float64)

    def slope(x):
        return grad(lambda x: module(x)[0].sin().sum())(x).square().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(sum(module(y)[0].sin().sum() for y in leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(vmap(grad(slope))(x), expected, **SAME_FLOAT64)
    torch.testing.assert_close(torch.stack([grad(slope)(y) for y in x]), expected, **SAME_FLOAT64)


def slope_of(f, x, step=1e-6):
    """Of f along x itself, by a difference."""
    return (f(x * (1 + step)) - f(x * (1 - step))) / (2 * step)


def gradient_of(f):
    return grad(lambda x: f(x).square().sum())


FORWARD_MODE = {
    "jvp": lambda f, x: jvp(f, (x,), (x,))[1],
    "jacfwd": lambda f, x: torch.tensordot(jacfwd(f)(x), x, x.dim()),
    "jvp of vmap": lambda f, x: jvp(vmap(f), (x.expand(2, *x.shape),), (x.expand(2, *x.shape),))[1][1],
    "vmap of jvp": lambda f, x: vmap(lambda x: jvp(f, (x,), (x,)))(x.expand(2, *x.shape))[1][0],
}


@pytest.mark.parametrize("what", FORWARD_MODE)
def test_forward_mode_and_vmap_within_one_another_match_differences(what):
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    for module in (fastseq.LSTM(4, 5).double(), fastseq.GRU(4, 5).double().requires_grad_(False)):

        def f(x, module=module):
            return module(x)[0]

        torch.testing.assert_close(FORWARD_MODE[what](f, x), slope_of(f, x), rtol=1e-6, atol=1e-8)


def test_forward_mode_of_gradients_matches_differences():
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    module = fastseq.LSTM(4, 5).double()
    g = gradient_of(lambda x: module(x)[0])
    expected = slope_of(g, x)
    torch.testing.assert_close(jvp(g, (x,), (x,))[1], expected, rtol=1e-6, atol=1e-8)
    twice = vmap(lambda x: jvp(g, (x,), (x,))[1])(x.expand(2, *x.shape))
    torch.testing.assert_close(twice[1], expected, rtol=1e-6, atol=1e-8)
