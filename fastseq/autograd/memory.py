"""Layers that keep less than all gates for the backward pass, which makes them again window by window: see
fastseq.windows.

Of "recompute" the output and c of every step are saved, of "checkpoint:k" h and c every k steps; beside them,
as always, the input, the weights and the initial states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..checks import CELLS
from ..windows import recurrent_checkpoints, recurrent_windows_backward, steps_of
from .function import Function, gradients, needed
from .second import GradientsAlong


def keeps_gates(memory: str, mode: str) -> bool:
    """Whether it is the ordinary pass: "fast", or "recompute" of a cell without gates."""
    return memory == "fast" or (memory == "recompute" and not CELLS[mode].saved)


class RecurrentInWindows(Function):
    """autograd.recurrent's, with `memory` after its other options."""

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
        memory: str,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        sequence, layer = (input, batch_sizes, lengths, resets, h0, c0), (mode, directions, bias)
        of_gradients = (grad_clip, truncate, memory)
        output, h_n, c_n, states = ops.recurrent(
            *sequence, weights, *layer, batch_first, "states", *of_gradients
        )
        if not steps_of(memory):
            return output, h_n, c_n, states
        options = (mode, directions, h_n.shape[1], memory, truncate)
        return output, h_n, c_n, *recurrent_checkpoints(output, states, batch_sizes, lengths, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *sequence, mode, directions, bias, _, grad_clip, truncate, memory = inputs[:13]
        output, _, c_n, *kept = outputs
        ctx.save_for_backward(*sequence, *([output] if len(kept) == 1 else []), *kept, *inputs[13:])
        ctx.constants = mode, directions, bias, grad_clip, truncate, memory
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(kept if mode == "LSTM" else (c_n, *kept)))

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *_: None
    ) -> Any:
        needs = needed(ctx)
        if grad_output is grad_h_n is grad_c_n is None:  # see recurrent.py
            return (None,) * len(needs)
        wanted = [needs[0], needs[4], needs[5], *needs[13:]]
        grads_of = (grad_output, grad_h_n, grad_c_n)
        grads = gradients(WindowsBackward, grads_of, ctx.saved_tensors, ctx.constants, wanted)
        grad_input, grad_h0, grad_c0, *grad_weights = grads
        return grad_input, None, None, None, grad_h0, grad_c0, *[None] * 7, *grad_weights


def _backward_op(
    mode: str,
    directions: int,
    bias: bool,
    grad_clip: float | None,
    truncate: int,
    memory: str,
    wanted: Sequence[bool],
    *tensors: Any,
) -> tuple[Tensor, ...]:
    grads, sequence, (kept_h, kept_c, *weights) = tensors[:3], tensors[3:9], tensors[9:]
    grad_output, grad_h_n, grad_c_n = grads
    if mode != "LSTM":  # torch.compile hands a gradient even to what is not differentiable
        grad_c_n = None
    layer, options = (mode, directions, bias), (grad_clip, truncate, memory)
    kept = (list(weights), kept_h, kept_c)
    return tuple(
        recurrent_windows_backward(
            grad_output, grad_h_n, grad_c_n, *sequence, *kept, *layer, *options, wanted
        )
    )


class WindowsBackward(GradientsAlong):
    forward = staticmethod(_backward_op)
