"""Derivatives of attention as torch.func, torch.autograd.functional and dual numbers ask for them, one within
another; and the operators of dual numbers where they are called directly."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

import fastseq
from attention_reference import attention as reference
from test_operators import calls_of
from tolerances import SAME_FLOAT64

pytestmark = pytest.mark.usefixtures("one_thread")

B, H, SQ, SK, D = 2, 2, 3, 4, 3
G = torch.Generator().manual_seed(4)


def randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


X = tuple(randn(B, H, n, D) for n in (SQ, SK, SK))  # query, key, value
ALONG = tuple(randn(*x.shape) for x in X)
ALONG_TOO = tuple(randn(*x.shape) for x in X)
INCOMING = randn(B, H, SQ, D)
MASK, SINKS = randn(H, 1, SK), randn(H)
OPTIONS = {
    "plain": {},
    "causal and softcap": {"causal": "top_left", "softcap": 1.5},
    "mask, sinks and lengths": {"attn_mask": MASK, "sinks": SINKS, "key_lengths": torch.tensor([4, 2])},
}


def ours(options):
    return lambda *x: fastseq.scaled_dot_product_attention(*x, **options)


def theirs(options):
    return lambda *x: reference(*x, **options).output


def loss_of(f):
    return lambda *x: (f(*x) * INCOMING).square().sum()


def pairs(first, second):
    return tuple(map(torch.stack, zip(first, second, strict=True)))


def in_a_level(f, trained):
    with forward_ad.dual_level():
        x = [x.clone().requires_grad_(trained) for x in X]
        return tuple(forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, ALONG))))


def reverse_in_a_level(f):
    with forward_ad.dual_level():
        x = [forward_ad.make_dual(x.clone().requires_grad_(), t) for x, t in zip(X, ALONG, strict=True)]
        grads = torch.autograd.grad(loss_of(f)(*x), x)
        return [tuple(forward_ad.unpack_dual(x)) for x in grads]


def reverse_after_the_level(f):
    x = [x.clone().requires_grad_() for x in X]
    with forward_ad.dual_level():
        loss = forward_ad.unpack_dual(loss_of(f)(*map(forward_ad.make_dual, x, ALONG))).primal
    return torch.autograd.grad(loss, x)


ALL = (0, 1, 2)
TRANSFORMS = {
    "jvp": lambda f: jvp(f, X, ALONG),
    "jvp of one": lambda f: jvp(lambda q: f(q, *X[1:]), X[:1], ALONG[:1]),
    "vjp": lambda f: vjp(f, *X)[1](INCOMING),
    "jvp of grad": lambda f: jvp(grad(loss_of(f), ALL), X, ALONG),
    "jvp of vjp": lambda f: jvp(lambda *x: vjp(f, *x)[1](INCOMING), X, ALONG),
    "grad of jvp": lambda f: grad(lambda *x: (jvp(f, x, ALONG)[1] * INCOMING).sum(), ALL)(*X),
    "grad of jvp for tangents": lambda f: grad(lambda *t: (jvp(f, X, t)[1] * INCOMING).square().sum(), ALL)(
        *ALONG
    ),
    "grad of grad": lambda f: grad(
        lambda *x: sum((g * t).sum() for g, t in zip(grad(loss_of(f), ALL)(*x), ALONG, strict=True)), ALL
    )(*X),
    "vjp of vjp": lambda f: vjp(lambda *x: vjp(f, *x)[1](INCOMING), *X)[1](ALONG),
    "jacfwd": lambda f: jacfwd(f, ALL)(*X),
    "jacrev": lambda f: jacrev(f, ALL)(*X),
    "hessian": lambda f: hessian(loss_of(f), (0, 2))(*X),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(lambda q: f(q, *X[1:]).sum(-1)))(X[0]),
    "jvp of vmap": lambda f: jvp(vmap(f), pairs(X, ALONG), pairs(ALONG, X)),
    "vmap of jvp": lambda f: vmap(lambda *t: jvp(f, X, t)[1])(*pairs(ALONG, ALONG_TOO)),
    "functional.jvp": lambda f: torch.autograd.functional.jvp(f, X, ALONG),
    "functional.hvp": lambda f: torch.autograd.functional.hvp(loss_of(f), X, ALONG),
    "functional.vhp": lambda f: torch.autograd.functional.vhp(loss_of(f), X, ALONG),
    "functional.hessian": lambda f: torch.autograd.functional.hessian(loss_of(f), X),
    "functional.jacobian, vectorized": lambda f: torch.autograd.functional.jacobian(f, X, vectorize=True),
    "functional.hessian, vectorized": lambda f: torch.autograd.functional.hessian(
        loss_of(f), X, vectorize=True
    ),
    "dual numbers": lambda f: in_a_level(f, False),
    "dual numbers that require gradients": lambda f: in_a_level(f, True),
    "reverse mode over dual numbers": reverse_in_a_level,
    "reverse mode after dual numbers": reverse_after_the_level,
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_find_the_derivatives_of_the_equations(transform, option):
    if "vmap" in transform and option.startswith("mask"):
        pytest.skip("the reference has no vmap over lengths")
    found, expected = (TRANSFORMS[transform](f(OPTIONS[option])) for f in (ours, theirs))
    found, expected = (torch.utils._pytree.tree_leaves(x) for x in (found, expected))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_tangents_of_masks_and_sinks_differ_between_entries_of_vmap():
    masks, sinks = randn(3, H, 1, SK), randn(3, H)

    def along(mask, sink):
        def f(*x):
            return fastseq.scaled_dot_product_attention(*X, attn_mask=x[0], sinks=x[1])

        return jvp(f, (MASK, SINKS), (mask, sink))[1]

    found = vmap(along)(masks, sinks)
    for i in range(3):
        torch.testing.assert_close(found[i], along(masks[i], sinks[i]), **SAME_FLOAT64)


def test_weights_that_jvp_drops_are_those_of_the_results():
    """One seed for both: where the weight is dropped, its tangent is 0."""
    torch.manual_seed(0)

    def f(*x):
        return fastseq.scaled_dot_product_attention(*x, dropout_p=0.5, return_weights=True)

    (output, weights), (_, along) = jvp(f, X, ALONG)
    assert (weights == 0).any()
    assert torch.equal(weights == 0, along == 0)
    torch.testing.assert_close(output, weights @ X[2], **SAME_FLOAT64)


def test_multihead_attention_has_second_derivatives():
    """A gradient penalty, against torch.nn's module."""
    ours = fastseq.MultiheadAttention(8, 2, batch_first=True).double()
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x, found = randn(2, 5, 8), []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        output, _ = module(leaf, leaf, leaf, need_weights=True)
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        found.append(
            torch.autograd.grad(gradient.square().sum(), list(module.parameters()), allow_unused=True)
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


# ---------------------------------------------------------------------------------- operators called directly


def calls_over_dual_numbers(**options):
    """Of attention_dual and attention_dual_backward, as a second derivative and forward mode make them."""
    leaves = [x.clone().requires_grad_() for x in X]
    options = {name: x.clone() for name, x in options.items()}
    leaves += [x.requires_grad_() for x in options.values()]

    def second():
        output = fastseq.scaled_dot_product_attention(*leaves[:3], **options)
        grads = torch.autograd.grad(output, leaves, INCOMING, create_graph=True)
        return torch.autograd.grad(grads, leaves, [torch.ones_like(x) for x in grads])

    calls = calls_of(second, differentiate=False)
    return [(op, arguments) for op, arguments in calls if "dual" in op._schema.name]


@pytest.mark.parametrize(
    "options", [{}, {"attn_mask": MASK, "sinks": SINKS}], ids=["plain", "mask and sinks"]
)
def test_opcheck_of_dual_operators(options):
    calls = calls_over_dual_numbers(**options)
    assert {op._schema.name for op, _ in calls} == {
        "fastseq::attention_dual",
        "fastseq::attention_dual_backward",
    }
    for op, arguments in calls:
        opcheck(op, arguments)


def test_attention_dual_called_directly_is_differentiable():
    """Results and tangents, for arguments and tangents."""
    (op, arguments), *_ = calls_over_dual_numbers()
    leaves = [tree_map_only(torch.Tensor, lambda x: x.clone().requires_grad_(), x) for x in (X, ALONG)]
    leaves = [*leaves[0], *leaves[1]]

    def loss(results):
        return sum(x.sin().sum() for x in results)

    results = op(*leaves[:3], *arguments[3:10], *leaves[3:], *arguments[13:])
    found = torch.autograd.grad(loss([results[i] for i in (0, 1, 5, 6)]), leaves)

    def equations(*x):
        def f(*x):
            result = reference(*x)
            return result.output, result.lse

        values, tangents = jvp(f, x[:3], x[3:])
        return loss([*values, *tangents])

    expected = grad(equations, tuple(range(6)))(*leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_attention_dual_backward_called_directly_refuses_third_derivatives():
    *_, (op, arguments) = calls_over_dual_numbers()
    arguments = tree_map_only(torch.Tensor, lambda x: x.requires_grad_(x.is_floating_point()), arguments)
    grads = op(*arguments)
    with pytest.raises(RuntimeError, match="third derivative"):
        grads[0].sum().backward()
