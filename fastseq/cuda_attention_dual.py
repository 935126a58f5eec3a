"""The operators of attention over dual numbers on CUDA: a plan, and what it says.

A pass has kernels, or blocks of torch's operations do it: where weights are returned or have a gradient,
for then as many numbers as there are scores are in memory anyway; where the mask has a gradient; and where no
tile fits. The backward pass's kernels make tangents of gradients; the gradients are attention_backward's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import attention_blocks, attention_numbers, cuda_attention
from .attention_checks import Arguments, Attention, check_attention
from .attention_ops import Gradients, Incoming
from .loops import Engine

if TYPE_CHECKING:
    from .attention_dual_ops import DualGradients, DualIncoming, DualResults, Tangents


def _plan(engine: Engine, problem: cuda_attention.Problem, a: Arguments) -> dict[str, Any]:
    return cuda_attention.plan_of(engine, problem, a.query.device).describe()


def forward(engine: Engine, sizes: Attention, a: Arguments, tangents: Tangents, results: DualResults) -> None:
    if not sizes.heads:
        return
    problem = cuda_attention.problem_of_dual(sizes, a, False, False, bool(a.return_weights))
    if _plan(engine, problem, a)["kernel"] == "blocks":
        attention_blocks.forward(sizes, a, tangents, results)
        return
    numbers = attention_numbers.of_dual_forward(sizes, a, tangents, results, 0, cuda_attention.seed_of(a))
    cuda_attention.run(engine, engine.module.cuda_attention_dual_forward, problem, a, numbers)


def backward(
    engine: Engine,
    sizes: Attention,
    a: Arguments,
    tangents: Tangents,
    incoming: DualIncoming,
    grads: DualGradients,
) -> None:
    primal, tangent = grads
    of_weights = incoming.grads.weights is not None or incoming.grad_tangents.weights is not None
    of_mask = primal.attn_mask is not None or tangent.attn_mask is not None
    problem = cuda_attention.problem_of_dual(sizes, a, True, of_mask, of_weights)
    if _plan(engine, problem, a)["kernel"] == "blocks":
        attention_blocks.backward(sizes, a, tangents, incoming, grads)
        return
    grad_output, grad_lse, _ = incoming.grads
    if grad_output is None:
        grad_output = torch.zeros_like(incoming.output)
    of_primal = Incoming(
        grad_output, grad_lse, None, incoming.output, incoming.normalizer, incoming.remainder, True
    )
    if any(grad is not None for grad in primal):
        cuda_attention.backward(engine, sizes, a, of_primal, primal)
    if any(grad is not None for grad in tangent):
        numbers = attention_numbers.of_dual_backward(
            sizes,
            a,
            tangents,
            of_primal,
            incoming,
            grads._replace(primal=Gradients(None, None, None, None, None)),
            0,
            cuda_attention.seed_of(a),
        )
        cuda_attention.run(engine, engine.module.cuda_attention_dual_backward, problem, a, numbers)


def plan_in_data(
    engine: Engine,
    longest: Attention,
    a: Arguments,
    of_mask: tuple[bool, ...] | None,
    of_weights: bool,
    backward: bool,
) -> dict[str, Any]:
    """See attention_dual_ops.Kernels. Gradients that are wanted beside their tangents are made by kernels of
    the backward pass, which cuda_attention.plan_in_data tells of."""
    sizes = check_attention(a)
    problem = cuda_attention.problem_of_dual(sizes, a, backward, of_mask is not None, of_weights)
    facts = engine.facts(a.query.device.index or 0)
    plan = {"engine": "cuda_attention", "facts": facts, "partition": {}, "tf32": problem.tf32}
    if not sizes.heads:
        return plan | {"kernel": "none"}
    chosen = _plan(engine, problem, a)
    if chosen["kernel"] == "blocks":
        return attention_blocks.plan_in_data(longest, a, chosen["not_tiles"])
    return plan | {"kernel": chosen.pop("kernel"), "partition": chosen}
