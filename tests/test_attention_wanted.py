"""Attention computes only the gradients that a call of autograd asks for, whatever else is trained."""

import pytest
import torch
from torch.autograd import forward_ad

from attention_harness import Case, call_fastseq, make_data
from fastseq import attention_dual_ops, attention_ops

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("query", "key", "value", "attn_mask", "sinks")
# All of them are trained; large enough that asking torch what it needs takes less time than what it may save.
CASE = Case(torch.float64, queries=100, keys=110, mask="float", sinks=True)
each_tensor = pytest.mark.parametrize("wanted", NAMES)


@pytest.fixture
def asked(monkeypatch):
    """The names of the gradients that the operators were asked for, of each call; tangents have a dash."""
    calls = []
    run, run_dual = attention_ops.attention_backward, attention_dual_ops.attention_dual_backward

    def backward(*arguments):
        calls.append({name for name, want in zip(NAMES, arguments[23], strict=True) if want})
        return run(*arguments)

    def dual_backward(*arguments):
        names, wanted = (*NAMES, *(f"{name}'" for name in NAMES)), (*arguments[35], *arguments[36])
        calls.append({name for name, want in zip(names, wanted, strict=True) if want})
        return run_dual(*arguments)

    monkeypatch.setattr(attention_ops, "attention_backward", backward)
    monkeypatch.setattr(attention_dual_ops, "attention_dual_backward", dual_backward)
    return calls


def call():
    leaves = make_data(CASE)
    return call_fastseq(CASE, leaves)["output"], leaves


@each_tensor
def test_gradients(wanted, asked):
    output, leaves = call()
    everything = torch.autograd.grad(output.sum(), list(leaves.values()), retain_graph=True)
    (alone,) = torch.autograd.grad(output.sum(), leaves[wanted], retain_graph=True)
    output.sum().backward(inputs=[leaves[wanted]], retain_graph=True)
    output.sum().backward()
    assert asked == [{*NAMES}, {wanted}, {wanted}, {*NAMES}]
    assert torch.equal(alone, dict(zip(leaves, everything, strict=True))[wanted])


@each_tensor
def test_second_derivatives(wanted, asked):
    output, leaves = call()
    (grad,) = torch.autograd.grad(output.sin().sum(), leaves["query"], create_graph=True)
    everything = torch.autograd.grad(grad.sum(), list(leaves.values()), retain_graph=True)
    asked.clear()
    (alone,) = torch.autograd.grad(grad.sum(), leaves[wanted])
    # By the gradient itself, and by the output that its own gradient depends on.
    assert asked == [{f"{wanted}'"}, {wanted}]
    assert torch.equal(alone, dict(zip(leaves, everything, strict=True))[wanted])


def test_second_derivative_by_the_gradient_of_the_output_alone(asked):
    output, leaves = call()
    incoming = torch.ones_like(output).requires_grad_()
    (grad,) = torch.autograd.grad(output, leaves["query"], incoming, create_graph=True)
    torch.autograd.grad(grad.sum(), incoming)
    assert asked == [{"query"}]  # for that there is forward mode


@each_tensor
def test_gradients_of_tangents(wanted, asked):
    leaves = make_data(CASE)
    along = {name: torch.randn_like(x).requires_grad_() for name, x in leaves.items()}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, along[name]) for name, x in leaves.items()}
        output = forward_ad.unpack_dual(call_fastseq(CASE, duals)["output"]).tangent
    torch.autograd.grad(output.sum(), leaves[wanted], retain_graph=True)
    torch.autograd.grad(output.sum(), along[wanted])
    assert asked == [{f"{wanted}'"}, {wanted}]


@each_tensor
def test_products_of_the_hessian_with_a_vector(wanted, asked):
    """torch.autograd.functional.hvp differentiates second derivatives by what they are linear in."""
    leaves = make_data(CASE)

    def loss(x):
        return call_fastseq(CASE, {**leaves, wanted: x})["output"].sin().sum()

    torch.autograd.functional.hvp(loss, leaves[wanted].detach(), torch.ones_like(leaves[wanted]))
    assert {name.rstrip("'") for names in asked for name in names} == {wanted}
