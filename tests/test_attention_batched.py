"""Derivatives of attention along batches of tangents and of gradients, which torch hides in tensors without
memory of their own: torch.autograd.functional with vectorize=True, is_grads_batched and gradcheck."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian

import fastseq
from attention_harness import ALL
from test_attention_gradcheck import OPTIONS, SMALL
from test_attention_gradgradcheck import function_of
from tolerances import GRADCHECK, SAME_FLOAT64

pytestmark = pytest.mark.usefixtures("one_thread")

FORWARD = {"strategy": "forward-mode", "vectorize": True}
G = torch.Generator().manual_seed(6)


def randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def case_of(option):
    return replace(SMALL, **OPTIONS[option], returns=("lse",) if "packed" in option else ALL)


def called_in_a_batch(case):
    """Without dropout: torch has no random numbers there."""
    return replace(case, dropout=0.0)


def module_of(**options):
    """MultiheadAttention with everything that has a derivative as an argument, and these arguments."""
    module = fastseq.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True, **options).double()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, mask, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (x, x, x), {"attn_mask": mask})

    return call, (randn(2, 3, 4), randn(3, 3), *(p.detach() for p in parameters))


def total(call):
    """A number that is linear in none of what call(*x) returns."""
    return lambda *x: sum(y.sin().sum() for y in call(*x))


@pytest.mark.parametrize("option", OPTIONS)
def test_batches_of_tangents(option):
    call, tensors = function_of(called_in_a_batch(case_of(option)))
    forward = {"check_forward_ad": True, "check_backward_ad": False}
    assert gradcheck(call, tensors, check_batched_forward_grad=True, **forward, **GRADCHECK)


@pytest.mark.parametrize("option", OPTIONS)
def test_batches_of_gradients(option):
    call, tensors = function_of(case_of(option))
    assert gradcheck(call, tensors, check_batched_grad=True, **GRADCHECK)


@pytest.mark.parametrize("option", ["plain", "float mask of keys", "packed", "everything"])
def test_batches_of_gradients_of_gradients(option):
    call, tensors = function_of(replace(case_of(option), batch=1))
    assert gradgradcheck(call, tensors, check_batched_grad=True, **GRADCHECK)


@pytest.mark.parametrize("option", OPTIONS)
def test_vectorized_hessian_in_forward_mode_is_the_hessian(option):
    call, tensors = function_of(replace(called_in_a_batch(case_of(option)), batch=1))
    tensors = tuple(x.detach() for x in tensors)
    found = hessian(total(call), tensors, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(found, hessian(total(call), tensors), **SAME_FLOAT64)


@pytest.mark.parametrize("add_zero_attn", [False, True])
def test_vectorized_derivatives_of_multihead_attention(add_zero_attn):
    call, tensors = module_of(add_zero_attn=add_zero_attn)
    found, expected = jacobian(call, tensors, **FORWARD), jacobian(call, tensors)
    torch.testing.assert_close(found, expected, **SAME_FLOAT64)
    found = hessian(total(call), tensors, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(found, hessian(total(call), tensors), **SAME_FLOAT64)


@pytest.mark.parametrize("alone", [False, True], ids=["with the query", "alone"])
def test_vectorized_jacobian_has_gradients_for_what_its_tangents_require(alone):
    x, key, value, weight = randn(2, 3, 4), randn(2, 3, 4), randn(2, 3, 4), randn(4, 4).requires_grad_()

    def projected(x):
        x, along = forward_ad.unpack_dual(x @ weight)
        return forward_ad.make_dual(x.detach() if alone else x, along)

    def of(attention):
        found = jacobian(lambda x: attention(projected(x), key, value), x, **FORWARD)
        return found.detach(), *torch.autograd.grad(found.sin().sum(), weight)

    theirs = of(torch.nn.functional.scaled_dot_product_attention)
    torch.testing.assert_close(of(fastseq.scaled_dot_product_attention), theirs, **SAME_FLOAT64)


def test_vectorized_jacobian_has_the_bits_of_each_tangent():
    x, attention = randn(2, 3, 4), fastseq.scaled_dot_product_attention
    found = jacobian(lambda x: attention(x, x, x), x, **FORWARD)
    for i in range(x.numel()):
        tangent = torch.zeros_like(x)
        tangent.view(-1)[i] = 1
        _, along = torch.func.jvp(lambda x: attention(x, x, x), (x,), (tangent,))
        assert torch.equal(found.flatten(3)[..., i], along)
