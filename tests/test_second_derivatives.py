"""Second derivatives and forward mode of modules and cells: against finite differences, against torch's
derivatives of the equations, and that what is not there raises."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import fastseq
import reference
from fastseq import ops
from harness import call_module, call_reference, cell_class, make_data, make_module, states_of
from reference import MODES
from test_gradcheck import CASES, SMALL
from test_operators import Calls
from tolerances import GRADCHECK, SAME_FLOAT64


def bound(module, names):
    """The module as a function of its data and parameters, by name, that call_module may call."""

    class Bound(torch.nn.Module):
        def forward(self, input, hx):
            return functional_call(module, {n: x for n, x in names.items() if n in parameters}, (input, hx))

    parameters = dict(module.named_parameters())
    return Bound()


def as_function(case, module, data):
    """Of all data and parameters, and these."""
    leaves = {**data, **dict(module.named_parameters())}

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return tuple(call_module(case, bound(module, given), given).values())

    return call, tuple(leaves.values())


def cell_as_function(mode, bias=True):
    cls, arguments = cell_class(fastseq, mode)
    cell = cls(2, 3, bias=bias, dtype=torch.float64, **arguments)
    data = make_data(replace(SMALL, mode=mode, batched=False, num_layers=2, steps=2))  # of input [2, 2]
    leaves = {**data, **dict(cell.named_parameters())}

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        parameters = {name: given[name] for name, _ in cell.named_parameters()}
        return functional_call(cell, parameters, (given["input"], states_of(given)))

    return call, tuple(leaves.values())


# In fast mode: a direction, instead of each number. torch's packing has no forward mode; see below.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives_of_modules_are_differences_of_first_ones(case):
    call, leaves = as_function(case, make_module(case), make_data(case))
    assert gradgradcheck(call, leaves, fast_mode=True, check_fwd_over_rev=not case.packed, **GRADCHECK)


@pytest.mark.parametrize("case", [case for case in CASES if not case.packed], ids=str)
def test_forward_mode_of_modules_is_the_difference_of_results(case):
    call, leaves = as_function(case, make_module(case), make_data(case))
    checks = {"check_forward_ad": True, "check_backward_ad": False}
    assert gradcheck(call, leaves, fast_mode=True, **checks, **GRADCHECK)


@pytest.mark.parametrize("pages", [0, 1 << 30], ids=["large", "small"])  # what is kept, see lengths.py
@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_and_lengths(mode, pages, monkeypatch):
    """Packed rows as they are, and lengths of padded ones."""
    monkeypatch.setattr(fastseq.lengths, "_PAGES", pages)
    case = replace(SMALL, mode=mode, bidirectional=True, batch=3)
    module, data = make_module(case), make_data(case)
    rows = torch.randn(6, 2, dtype=torch.float64).abs().requires_grad_()
    sizes, lengths = torch.tensor([3, 2, 1]), torch.tensor([3, 0, 2])

    def packed(rows, *states):
        output, hidden = module(PackedSequence(rows, sizes), states if mode == "LSTM" else states[0])
        return output.data, *(hidden if mode == "LSTM" else (hidden,))

    def padded(input, *states):
        output, hidden = module(input, states if mode == "LSTM" else states[0], lengths=lengths)
        return output, *(hidden if mode == "LSTM" else (hidden,))

    states = [x for name, x in data.items() if name != "input"]
    for call, input in ((packed, rows), (padded, data["input"])):
        assert gradcheck(call, (input, *states), check_forward_ad=True, **GRADCHECK)
        assert gradgradcheck(call, (input, *states), fast_mode=True, check_fwd_over_rev=True, **GRADCHECK)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_and_forward_mode_of_cells(mode, bias):
    call, leaves = cell_as_function(mode, bias)
    assert gradcheck(call, leaves, check_forward_ad=True, **GRADCHECK)
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, **GRADCHECK)


@pytest.mark.parametrize("mode", MODES)
def test_every_second_derivative_exactly(mode):
    """gradgradcheck element by element, where fast mode looks along random directions."""
    case = replace(SMALL, mode=mode, steps=2, batch=1)
    call, leaves = as_function(case, make_module(case), make_data(case))
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, **GRADCHECK)


def both(case):
    """A loss of everything by fastseq, by the equations, and the tensors that it depends on."""
    module, data = make_module(case), make_data(case)
    leaves = {**data, **dict(module.named_parameters())}
    names = list(leaves)

    def loss_of(outputs):
        return sum((x.sin() * (i + 1)).sum() for i, x in enumerate(outputs.values()))

    def ours(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return loss_of(call_module(case, bound(module, given), given))

    def equations(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return loss_of(call_reference(case, given, given))

    return ours, equations, tuple(x.detach() for x in leaves.values())


STACKED = [
    replace(SMALL, mode=mode, num_layers=2, bidirectional=True, proj_size=2 * (mode == "LSTM"))
    for mode in MODES
]


def every(count):
    return tuple(range(count))


def hessian_vector_products(loss, at, along):
    """H u in each way that there is."""
    gradient, all_of_them = grad(loss, argnums=every(len(at))), every(len(at))
    yield "forward over reverse", jvp(gradient, at, along)[1]
    yield "reverse over reverse", vjp(gradient, *at)[1](along)
    yield "reverse over forward", grad(lambda *x: jvp(loss, x, along)[1], argnums=all_of_them)(*at)
    leaves = tuple(x.clone().requires_grad_() for x in at)
    yield "torch.autograd.functional.hvp", torch.autograd.functional.hvp(loss, leaves, along)[1]
    yield "torch.autograd.functional.vhp", torch.autograd.functional.vhp(loss, leaves, along)[1]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    yield "create_graph", torch.autograd.grad(first, leaves, along)
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(x, u) for x, u in zip(leaves, along, strict=True))
        first = torch.autograd.grad(loss(*duals), duals)
        yield "dual numbers through grad", tuple(forward_ad.unpack_dual(x).tangent for x in first)
        tangent = forward_ad.unpack_dual(loss(*duals)).tangent
        yield "grad of a tangent", torch.autograd.grad(tangent, leaves)


@pytest.mark.parametrize("case", STACKED, ids=str)
def test_hessian_vector_products_in_every_way_are_those_of_the_equations(case):
    ours, equations, at = both(case)
    g = torch.Generator().manual_seed(9)
    along = tuple(torch.randn(x.shape, generator=g, dtype=x.dtype) for x in at)
    _, expected = next(hessian_vector_products(equations, at, along))
    for way, products in hessian_vector_products(ours, at, along):
        for a, b in zip(products, expected, strict=True):
            torch.testing.assert_close(a.detach(), b, **SAME_FLOAT64, msg=way)


OVER_FORWARD = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}


def operators_of(call):
    with Calls() as run:
        call()
    return [op._schema.name.removeprefix("fastseq::") for op, _ in run.calls]


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_make_nothing_that_is_known_again(mode):
    case = replace(SMALL, mode=mode)
    module, data = make_module(case), make_data(case)
    leaves = [*data.values(), *module.parameters()]

    def penalty():
        output = call_module(case, module, data)["output"]
        (gradient,) = torch.autograd.grad(output.sum(), data["input"], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves)

    first = ["recurrent", "recurrent_backward"]
    known = ops.KERNELS["cpu"].keeps  # of the rung
    along = "recurrent_tangents" if known else "recurrent_dual"
    assert operators_of(penalty) == [*first, along, "recurrent_dual_backward"]
    call, (x, *rest) = cell_as_function(mode)

    def penalty_of_a_cell():
        output = call(x, *rest)[0] if mode == "LSTM" else call(x, *rest)
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), rest, allow_unused=True)

    of_cell = ["recurrent_cell", "recurrent_backward", along, "recurrent_dual_backward"]
    assert operators_of(penalty_of_a_cell) == of_cell
    ours, _, at = both(case)
    product = operators_of(lambda: jvp(grad(ours, every(len(at))), at, at))
    assert sorted(product) == ["recurrent_backward", "recurrent_dual", "recurrent_dual_backward"]


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_along_many_directions_at_once_are_those_of_each(mode, lengths):
    case = replace(SMALL, mode=mode, bidirectional=True)
    module, data = make_module(case), make_data(case)
    options = {"lengths": torch.tensor([3, 1])} if lengths else {}
    x, leaves = data["input"], [*data.values(), *module.parameters()]
    output, _ = module(x, states_of(data), **options)
    (first,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
    along = torch.randn(3, *first.shape, dtype=first.dtype)

    def second(u, **options):
        return torch.autograd.grad(first, leaves, u, retain_graph=True, **options)

    each = [torch.stack(column) for column in zip(*map(second, along), strict=True)]
    for found in (second(along, is_grads_batched=True), vmap(second)(along)):
        for a, b in zip(found, each, strict=True):
            torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("mode", MODES)
def test_hessians_and_jacobians_are_those_of_the_equations(mode):
    case = replace(SMALL, mode=mode, batch=1)
    ours, equations, at = both(case)
    for transform in (
        hessian,
        jacfwd,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: lambda x: torch.autograd.functional.hessian(f, x),
        lambda f: lambda x: torch.autograd.functional.hessian(f, x, vectorize=True),
        lambda f: lambda x: torch.autograd.functional.hessian(f, x, **OVER_FORWARD),
        lambda f: lambda x: torch.autograd.functional.jacobian(f, x, strategy="forward-mode", vectorize=True),
    ):
        for i in (0, 3):  # the input and a weight
            a, b = (
                transform(lambda x, f=f, i=i: f(*at[:i], x, *at[i + 1 :]))(at[i]) for f in (ours, equations)
            )
            torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("case", STACKED, ids=str)
def test_tangents_of_many_directions_at_once_are_those_of_each(case):
    ours, _, at = both(case)
    along = torch.randn(4, *at[0].shape, dtype=torch.float64)

    def tangent(u):
        return jvp(lambda x: ours(x, *at[1:]), at[:1], (u,))[1]

    torch.testing.assert_close(vmap(tangent)(along), torch.stack([tangent(u) for u in along]), **SAME_FLOAT64)


@pytest.mark.parametrize("case", STACKED, ids=str)
def test_truncation_cuts_second_derivatives_where_detached_states_do(case):
    case = replace(case, steps=7, num_layers=1)
    module, data = make_module(case), make_data(case)
    module.truncate = 3
    leaves = {**data, **dict(module.named_parameters())}
    layers = reference.layers_of(leaves, 1, case.bidirectional)
    states = data["h0"], data.get("c0")
    by_equations = reference.recurrent(
        case.mode, data["input"], *states, layers, None, reference.Crossing(truncate=3)
    )
    seconds = []
    for outputs in (call_module(case, module, data).values(), by_equations):
        outputs = [x for x in outputs if x is not None]
        incoming, wanted = [torch.cos(x.detach()) for x in outputs], list(leaves.values())
        grads = torch.autograd.grad(outputs, wanted, incoming, create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in grads), wanted))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint:2"])
@pytest.mark.parametrize("case", STACKED, ids=str)
def test_second_derivatives_do_not_depend_on_what_is_kept(case, memory):
    case = replace(case, steps=5)
    module, data = make_module(case), make_data(case)
    leaves = [*data.values(), *module.parameters()]
    found = []
    for kept in ("fast", memory):
        module.memory = kept
        outputs = list(call_module(case, module, data).values())
        grads = torch.autograd.grad([x.sin().sum() for x in outputs], leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in grads), leaves))
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(x, torch.ones_like(x)) for name, x in data.items()}
            tangents = [forward_ad.unpack_dual(x).tangent for x in call_module(case, module, duals).values()]
        found[-1] = (*found[-1], *tangents)
    for a, b in zip(*found, strict=True):
        size = b.abs().max().clamp(min=1)
        torch.testing.assert_close(a / size, b / size, **SAME_FLOAT64)


@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.square().sum()], ids=["sum", "sum of squares"])
@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_through_one_of_many_paths(mode, loss):
    """Also when the incoming gradient is a constant, so that autograd could believe nothing is to be done."""
    case = replace(SMALL, mode=mode)
    module, data = make_module(case), make_data(case)
    found = []
    for call in (call_module, call_reference):
        model = module if call is call_module else dict(module.named_parameters())
        output = call(case, model, data)["output"]
        (gradient,) = torch.autograd.grad(loss(output), data["input"], create_graph=True)
        total = gradient.square().sum() + output.sum()
        found.append(torch.autograd.grad(total, [*data.values(), *module.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, **SAME_FLOAT64)


def third_by_reverse_mode(loss, x):
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    second.square().sum().backward()


def third_by_transforms(loss, x):
    def norm(f):
        return lambda x: grad(f)(x).square().sum()

    grad(norm(norm(loss)))(x.detach())


def third_in_forward_mode(loss, x):
    jvp(hessian(loss), (x.detach(),), (torch.ones_like(x),))


def forward_over_forward(loss, x):
    jvp(lambda x: jvp(loss, (x,), (x,))[1], (x.detach(),), (torch.ones_like(x),))


def jacobian_over_forward(loss, x):
    jacfwd(jacfwd(loss))(x.detach())


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "differentiate",
    [
        third_by_reverse_mode,
        third_by_transforms,
        third_in_forward_mode,
        forward_over_forward,
        jacobian_over_forward,
    ],
)
def test_what_is_not_there_raises(mode, cell, differentiate):
    if cell:
        call, (x, *rest) = cell_as_function(mode)
        call = (lambda f: lambda *x: f(*x)[0])(call) if mode == "LSTM" else call
    else:
        case = replace(SMALL, mode=mode)
        call, (x, *rest) = as_function(case, make_module(case), make_data(case))
        call = (lambda f: lambda *x: f(*x)[0])(call)
    with pytest.raises(RuntimeError, match=r"given: .*recurrent layer or cell") as error:
        differentiate(lambda x: call(x, *rest).square().sum(), x)
    assert "first and second derivatives" in str(error.value)


def reverse_over_reverse(loss, x):
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    first.sum().backward()


def reverse_over_dual_numbers(loss, x):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, x.detach()))).tangent
        tangent.backward()


BOUNDED = {
    "reverse over reverse": reverse_over_reverse,
    "reverse over dual numbers": reverse_over_dual_numbers,
    "grad of grad": lambda loss, x: grad(lambda x: grad(loss)(x).sum())(x.detach()),
    "grad of jvp": lambda loss, x: grad(lambda x: jvp(loss, (x,), (x,))[1])(x.detach()),
}


@pytest.mark.parametrize("differentiate", BOUNDED.values(), ids=list(BOUNDED))
@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_with_bounded_gradients_raises(mode, differentiate):
    case = replace(SMALL, mode=mode)
    module, data = make_module(case), make_data(case)
    module.grad_clip = 0.1
    with pytest.raises(RuntimeError, match="grad_clip"):
        differentiate(lambda x: module(x, states_of(data))[0].sum(), data["input"])


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_of_bounded_gradients_is_their_derivative(mode):
    """What is bounded does not change."""
    case = replace(SMALL, mode=mode, steps=5, bidirectional=True)
    module, x = make_module(case), make_data(case)["input"].detach()
    module.grad_clip = 0.05
    gradient = grad(lambda x: module(x)[0].sin().sum())
    eps, v = 1e-6, torch.randn_like(x)
    difference = (gradient(x + eps * v) - gradient(x - eps * v)) / (2 * eps)
    torch.testing.assert_close(jvp(gradient, (x,), (v,))[1], difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"grad_clip": 0.05}, {"truncate": 2}, {"grad_clip": 0.05, "truncate": 2}]
)
@pytest.mark.parametrize("mode", MODES)
def test_transforms_know_of_bounds_and_truncation(mode, options):
    """torch.func's gradients and tangents are those of autograd."""
    case = replace(SMALL, mode=mode, steps=5, bidirectional=True)
    module, x = make_module(case), make_data(case)["input"].detach()
    for name, value in options.items():
        setattr(module, name, value)
    module.requires_grad_(False)

    def loss(x):
        return module(x)[0].sin().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(grad(loss)(x), expected)
    module.grad_clip = module.truncate = None
    assert not torch.allclose(grad(loss)(x), expected)
    for name, value in options.items():
        setattr(module, name, value)
    with forward_ad.dual_level():
        expected = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))[0]).tangent
        recorded = forward_ad.unpack_dual(module(forward_ad.make_dual(leaf, x))[0]).tangent
    assert torch.equal(jvp(lambda x: module(x)[0], (x,), (x,))[1], expected)
    assert torch.equal(recorded, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_penalty_trains_the_parameters(mode):
    """As a critic's: of the norm of the gradient of its input, backward() fills the parameters' .grad."""
    case = replace(SMALL, mode=mode, num_layers=2, packed="unsorted", batch=3)
    module, data = make_module(case), make_data(case)
    outputs = call_module(case, module, data)
    (gradient,) = torch.autograd.grad(outputs["output"].sum(), data["input"], create_graph=True)
    (gradient.norm() - 1).square().backward()
    found = {name: x.grad for name, x in module.named_parameters()}
    exact = call_reference(case, dict(module.named_parameters()), data)
    (gradient,) = torch.autograd.grad(exact["output"].sum(), data["input"], create_graph=True)
    penalty = (gradient.norm() - 1).square()
    expected = torch.autograd.grad(penalty, list(module.parameters()), allow_unused=True)
    for (name, x), y in zip(found.items(), expected, strict=True):
        y = torch.zeros_like(module.get_parameter(name)) if y is None else y
        torch.testing.assert_close(torch.zeros_like(y) if x is None else x, y, **SAME_FLOAT64, msg=name)
