"""The gradients of attention, as an autograd Function around the operators of fastseq.attention_ops.

Saved for the backward pass are all tensors that the operator takes, output, remainder, normalizer and, if
asked for, weights; so none of these may be changed in place before the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from .. import attention_ops
from ..attention_checks import Arguments
from ..dispatch import is_traced
from .function import Backward, Function, gradients, needs_gradient, recording, refuse


def attention(*arguments: Any) -> tuple[Tensor, ...]:
    """Output, lse, weights, empty if not asked for, remainder and normalizer: see attention_ops.

    The arguments are those of attention_checks.Arguments, and in place of the last, `save`, whether the
    backward pass has to be deterministic.
    """
    tensors, (*rest, average_weights, deterministic) = arguments[:9], arguments[9:]
    query, key, value, attn_mask, *_, sinks = tensors
    differentiates = recording() and needs_gradient(query, key, value, attn_mask, sinks)
    if not differentiates or (deterministic and is_traced()):
        return attention_ops.attention(*arguments[:-1])
    if is_compiling():
        tensors = _each_once(tensors)
    output, lse, weights, *saved = _Attention.apply(*tensors, *rest, deterministic)
    if average_weights:  # a gradient of the mean needs each head's
        weights = weights.mean(dim=1, keepdim=True)
    return output, lse, weights, *saved


def _each_once(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """With a view in place of what is there already: torch.compile takes no argument of a Function twice."""
    seen: list[Tensor] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in seen):
            tensor = tensor.view_as(tensor)
        seen.append(tensor)
    return tuple(seen)


def _backward_op(
    scale: float,
    softcap: float,
    dropout_p: float,
    left: int,
    right: int,
    bottom_right: bool,
    deterministic: bool,
    wanted: Sequence[bool],
    *tensors: Tensor | None,
) -> tuple[Tensor, ...]:
    if tensors[15] is None:  # torch.compile hands a gradient even to what is not differentiable
        tensors = (*tensors[:2], None, *tensors[3:])
    numbers = (scale, softcap, dropout_p, left, right, bottom_right)
    return tuple(attention_ops.attention_backward(*tensors, *numbers, wanted, deterministic))


class _Attention(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return attention_ops.attention(*arguments[:-1], False, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        output, _, weights, remainder, normalizer = outputs
        return_weights = Arguments(*inputs[:-1]).return_weights
        kept = weights if return_weights else None
        remainder_kept = remainder if remainder.dim() > 1 else None
        ctx.save_for_backward(*inputs[:10], output, normalizer, kept, remainder_kept)
        ctx.constants = (*inputs[10:16], inputs[-1])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(remainder, normalizer, *([] if return_weights else [weights]))

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_lse: Tensor | None,
        grad_weights: Tensor | None,
        *_: Tensor | None,
    ) -> Any:
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[1], needs[2], needs[3], needs[8]]
        incoming = (grad_output, grad_lse, grad_weights)
        grads = gradients(_AttentionBackward, incoming, ctx.saved_tensors, ctx.constants, wanted)
        of_query, of_key, of_value, of_mask, of_sinks = grads
        return of_query, of_key, of_value, of_mask, None, None, None, None, of_sinks, *[None] * 9


class _AttentionBackward(Backward):
    forward = staticmethod(_backward_op)
    backward = refuse(
        "attention",
        "torch.nn.functional.scaled_dot_product_attention within sdpa_kernel(SDPBackend.MATH)",
    )
