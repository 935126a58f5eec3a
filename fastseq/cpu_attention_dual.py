"""The operators of attention over dual numbers on the CPU: one call of the compiled module for each.

Where weights are returned, or have a gradient, blocks of torch's operations do it: then as many numbers as
there are scores are in memory anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _C, attention_blocks, attention_numbers, cpu_attention
from .attention_checks import Arguments, Attention
from .attention_ops import Incoming
from .cpu_attention import threads_and_seed

if TYPE_CHECKING:
    from .attention_dual_ops import DualGradients, DualIncoming, DualResults, Tangents


def forward(sizes: Attention, a: Arguments, tangents: Tangents, results: DualResults) -> None:
    if a.return_weights:
        attention_blocks.forward(sizes, a, tangents, results)
        return
    numbers = attention_numbers.of_dual_forward(sizes, a, tangents, results, *threads_and_seed(a))
    _C.attention_dual_forward(*numbers)


def backward(
    sizes: Attention, a: Arguments, tangents: Tangents, incoming: DualIncoming, grads: DualGradients
) -> None:
    if incoming.grads.weights is not None or incoming.grad_tangents.weights is not None:
        attention_blocks.backward(sizes, a, tangents, incoming, grads)
        return
    output, lse, _ = incoming.grads
    of_primal = Incoming(output, lse, None, incoming.output, incoming.normalizer, incoming.remainder, True)
    numbers = attention_numbers.of_dual_backward(
        sizes, a, tangents, of_primal, incoming, grads, *threads_and_seed(a)
    )
    _C.attention_dual_backward(*numbers)


def plan_in_data(
    longest: Attention, a: Arguments, of_mask: tuple[bool, ...] | None, of_weights: bool, backward: bool
) -> dict[str, Any]:
    """See attention_dual_ops.Kernels."""
    if of_weights:
        why = "a gradient of the weights" if backward else "weights that are returned"
        return attention_blocks.plan_in_data(longest, a, why)
    plan = cpu_attention.plan_in_data(longest, a, backward, of_mask, None)
    plan["partition"] |= {"key_parts": 1, "split": False}  # these kernels cut no keys
    return plan
