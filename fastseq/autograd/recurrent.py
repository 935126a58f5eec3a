"""Backpropagation through time, as autograd Functions around the operators of fastseq.ops.

Saved for the backward pass are the input, the weights, the initial states, the output, and the gates of
every step that csrc/fastseq.h lists under `saved`; so none of these may be changed in place before the
backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from ..checks import CELLS
from ..dispatch import is_traced
from . import dual
from .function import Function, gradients, needed, needs_gradient, recording
from .memory import RecurrentInWindows, keeps_gates
from .second import Gradients, GradientsAlong, gradients_along


def recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    bias: bool,
    batch_first: bool,
    grad_clip: float | None,
    truncate: int,
    memory: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: output (T, B, D*R), h_n (D, B, R), c_n (D, B, H), the last empty if the cell has none.

    What the arguments are, fastseq.ops says of its operators, and fastseq.windows of `memory`.
    """
    sequence = (input, batch_sizes, lengths, resets, h0, c0)
    layer = (mode, directions, bias)
    options = (batch_first, grad_clip, truncate)
    if not is_traced() and _is_recorded(input, h0, c0, *weights):
        result = None
        if _duals():
            options_along = (batch_first, truncate, False, grad_clip)
            result = dual.in_one_pass(sequence, weights, layer, *options_along)
        if result is None and _duals():  # which keeps gates, whatever `memory` is
            result = _RecurrentAlong.apply(*sequence, *layer, *options, *weights)
        elif result is None and keeps_gates(memory, mode):
            result = _Recurrent.apply(*sequence, *layer, *options, *weights)
        elif result is None:
            result = RecurrentInWindows.apply(*sequence, *layer, *options, memory, *weights)
    else:
        of_gradients = (grad_clip, truncate, memory)
        result = ops.recurrent(*sequence, weights, *layer, batch_first, "nothing", *of_gradients)
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
    if not is_traced() and _is_recorded(*tensors):
        return (_RecurrentCellAlong if _duals() else _RecurrentCell).apply(*tensors, mode)
    return ops.recurrent_cell(*tensors, mode, False)


def _is_recorded(*tensors: Tensor | None) -> bool:
    return recording() and needs_gradient(*tensors)


def _duals() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def _backward_op(
    mode: str,
    directions: int,
    bias: bool,
    grad_clip: float | None,
    truncate: int,
    wanted: Sequence[bool],
    *tensors: Any,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    grads, sequence, (output, saved, *weights) = tensors[:3], tensors[3:9], tensors[9:]
    grad_output, grad_h_n, grad_c_n = grads
    if mode != "LSTM":  # torch.compile hands a gradient even to what is not differentiable
        grad_c_n = None
    return tuple(
        ops.recurrent_backward(
            grad_output,
            grad_h_n,
            grad_c_n,
            *sequence,
            weights,
            output,
            saved,
            mode,
            directions,
            bias,
            grad_clip,
            truncate,
            wanted,
            *((True,) if keep else ()),
        )
    )


def _backward_function() -> type[Function]:
    return _RecurrentBackwardAlong if _duals() else _RecurrentBackward


def _keeps(input: Tensor, grad_clip: float | None) -> bool:
    """Whether second derivatives will be made of what both passes keep. torch.func and torch.compile see
    operators, which keep nothing."""
    recorded = torch.is_grad_enabled() and not is_traced()
    return recorded and grad_clip is None and dual.are_readable(input)


class _Recurrent(Function):
    @staticmethod
    def forward(
        input: Tensor,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        mode: str,
        directions: int,
        bias: bool,
        batch_first: bool,
        grad_clip: float | None,
        truncate: int,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        sequence, layer = (input, batch_sizes, lengths, resets, h0, c0), (mode, directions, bias)
        return ops.recurrent(*sequence, weights, *layer, batch_first, "gates", grad_clip, truncate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *sequence, mode, directions, bias, _, grad_clip, truncate = inputs[:12]
        output, _, c_n, saved = outputs
        ctx.save_for_backward(*sequence, output, saved, *inputs[12:])
        ctx.constants = mode, directions, bias, grad_clip, truncate
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((saved,) if mode == "LSTM" else (c_n, saved)))

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _: None
    ) -> Any:
        needs = needed(ctx)
        if grad_output is grad_h_n is grad_c_n is None:  # as where a second derivative read the output
            return (None,) * len(needs)
        # input, batch_sizes, lengths, resets, h0, c0, output, saved, *weights
        saved_tensors = ctx.saved_tensors
        wanted = [needs[0], needs[4], needs[5], *needs[12:]]
        function = _backward_function()
        if function is _RecurrentBackward and _keeps(saved_tensors[0], ctx.constants[3]):
            function = _RecurrentBackwardKept
        grads_of = (grad_output, grad_h_n, grad_c_n)
        grads = gradients(function, grads_of, saved_tensors, ctx.constants, wanted)
        grad_input, grad_h0, grad_c0, *grad_weights = grads
        return grad_input, None, None, None, grad_h0, grad_c0, *[None] * 6, *grad_weights


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
        if all(grad is None for grad in (grad_h, *others)):
            return (None,) * 8
        input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, h, saved = ctx.saved_tensors
        grad_c = others[0] if len(others) == 2 else None
        bias = bias_ih is not None
        weights = [weight_ih, weight_hh, bias_ih, bias_hh] if bias else [weight_ih, weight_hh]
        wanted = list(needed(ctx)[: 3 + len(weights)])
        tensors = (input, None, None, None, h0, c0, h, saved, *weights)
        constants = (ctx.mode, 1, bias, None, 0)
        grads = gradients(_backward_function(), (grad_h, None, grad_c), tensors, constants, wanted)
        return (*grads, *[None] * (8 - len(grads)))


class _RecurrentBackward(Gradients):
    forward = staticmethod(_backward_op)


class _RecurrentBackwardKept(Gradients):
    forward = staticmethod(partial(_backward_op, keep=True))


# ---- the same in forward mode ----
#
# These take dual tensors, where gradients may be wanted as well. What is saved for the backward pass has
# tangents too, so that its own jvp finds them.


class _RecurrentAlong(_Recurrent):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        _Recurrent.setup_context(ctx, inputs, outputs)
        ctx.batch_first = inputs[9]
        ctx.save_for_forward(*inputs[:6], *inputs[12:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        mode, directions, bias, grad_clip, truncate = ctx.constants
        along = [tangents[0], *tangents[4:6], *tangents[12:]]
        options = (ctx.batch_first, truncate, False, grad_clip)
        made = _tangents(ctx, along, (mode, directions, bias), *options)
        return made[4], made[5], made[6] if CELLS[mode].cell_state else None, None


class _RecurrentCellAlong(_RecurrentCell):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        _RecurrentCell.setup_context(ctx, inputs, outputs)
        input, h0, c0, *weights, _ = inputs
        ctx.save_for_forward(input, None, None, None, h0, c0, *(x for x in weights if x is not None))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        bias = len(ctx.saved_tensors) == 10
        along = tangents[: 7 if bias else 5]
        made = _tangents(ctx, along, (ctx.mode, 1, bias), False, 0, False, None)
        h, c = made[4].squeeze(0), made[6]
        return (h, c.squeeze(0), None) if CELLS[ctx.mode].cell_state else (h, None)


class _RecurrentBackwardAlong(GradientsAlong):
    forward = staticmethod(_backward_op)
    jvp = staticmethod(partial(gradients_along, of_gates=True))


def _tangents(
    ctx: Any,
    along: Sequence[Tensor | None],
    layer: tuple[str, int, bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    """What recurrent_dual makes of the tensors saved for the forward mode."""
    with forward_ad._set_fwd_grad_enabled(True):  # for the levels outside of this one
        values, _ = dual.unpack(ctx.saved_tensors)
        return dual.forward(values[:6], values[6:], along, layer, *options)
