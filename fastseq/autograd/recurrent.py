"""Backpropagation through time, as autograd Functions around the operators of fastseq.ops.

Saved for the backward pass are the input, the weights, the initial states, the output, and the gates of
every step that csrc/fastseq.h lists under `saved`; so none of these may be changed in place before the
backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..dispatch import is_traced
from .function import Backward, Function, gradients, needs_gradient, recording, refuse


def recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    bias: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: output (T, B, D*R), h_n (D, B, R), c_n (D, B, H), the last empty if the cell has none."""
    if recording() and needs_gradient(input, h0, c0, *weights) and not is_traced():
        result = _Recurrent.apply(input, batch_sizes, h0, c0, mode, directions, bias, batch_first, *weights)
    else:
        result = ops.recurrent(
            input, batch_sizes, h0, c0, weights, mode, directions, bias, batch_first, False
        )
    return result[0], result[1], result[2]


def recurrent_cell(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mode: str,
) -> Sequence[Tensor]:
    """One step: the new hidden state and, of an LSTM, the new cell state come first in the result."""
    tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    if recording() and needs_gradient(*tensors) and not is_traced():
        return _RecurrentCell.apply(*tensors, mode)
    return ops.recurrent_cell(*tensors, mode, False)


def _backward_op(
    mode: str, directions: int, bias: bool, wanted: Sequence[bool], *tensors: Any
) -> tuple[Tensor, ...]:
    grad_output, grad_h_n, grad_c_n, input, batch_sizes, h0, c0, output, saved, *weights = tensors
    if mode != "LSTM":  # torch.compile hands a gradient even to what is not differentiable
        grad_c_n = None
    return tuple(
        ops.recurrent_backward(
            grad_output,
            grad_h_n,
            grad_c_n,
            input,
            batch_sizes,
            h0,
            c0,
            weights,
            output,
            saved,
            mode,
            directions,
            bias,
            wanted,
        )
    )


class _Recurrent(Function):
    @staticmethod
    def forward(
        input: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        mode: str,
        directions: int,
        bias: bool,
        batch_first: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        return ops.recurrent(input, batch_sizes, h0, c0, weights, mode, directions, bias, batch_first, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        input, batch_sizes, h0, c0, mode, directions, bias, _, *weights = inputs
        output, _, c_n, saved = outputs
        ctx.save_for_backward(input, batch_sizes, h0, c0, output, saved, *weights)
        ctx.constants = mode, directions, bias
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((saved,) if mode == "LSTM" else (c_n, saved)))

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _: None
    ) -> Any:
        saved_tensors = ctx.saved_tensors  # input, batch_sizes, h0, c0, output, saved, *weights
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[2], needs[3], *needs[8:]]
        grads = gradients(
            _RecurrentBackward, (grad_output, grad_h_n, grad_c_n), saved_tensors, ctx.constants, wanted
        )
        grad_input, grad_h0, grad_c0, *grad_weights = grads
        return grad_input, None, grad_h0, grad_c0, None, None, None, None, *grad_weights


class _RecurrentCell(Function):
    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        mode: str,
    ) -> tuple[Tensor, ...]:
        return tuple(ops.recurrent_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *tensors, mode = inputs
        ctx.save_for_backward(*tensors, outputs[0], outputs[-1])
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[-1])

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, *others: Tensor | None) -> Any:
        input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, h, saved = ctx.saved_tensors
        grad_c = others[0] if len(others) == 2 else None
        bias = bias_ih is not None
        weights = [weight_ih, weight_hh, bias_ih, bias_hh] if bias else [weight_ih, weight_hh]
        wanted = list(ctx.needs_input_grad[: 3 + len(weights)])
        tensors = (input, None, h0, c0, h, saved, *weights)
        grads = gradients(_RecurrentBackward, (grad_h, None, grad_c), tensors, (ctx.mode, 1, bias), wanted)
        return (*grads, *[None] * (8 - len(grads)))


class _RecurrentBackward(Backward):
    forward = staticmethod(_backward_op)
    backward = refuse("a recurrent layer or cell", "torch.nn's module with the same state_dict")
