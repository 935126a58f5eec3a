"""Time loops in Python: for each step torch's matrix product and a kernel for what is left of the cell.

For the *Cell modules, which have one step, and for layers whose product of one step is so large that
launching it costs nothing beside it. loops.py says when; csrc/fastseq.h (CellStepArgs, CellGradArgs) what the
kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from .checks import CELLS

WHOLE, FIRST, REST = range(3)  # parts of a step


class Kernels(NamedTuple):
    """The cell kernels of a device, with what every call of them begins with."""

    module: Any
    cell: int
    dtype: int
    device: int
    stream: int

    def forward(
        self,
        part: int,
        pre: Tensor,
        product: Tensor | None,
        weight_hh: Tensor | None,
        bias_hh: Tensor | None,
        h: Tensor | None,
        c: Tensor | None,
        h_next: Tensor,
        c_next: Tensor | None,
        output: Tensor | None,
        saved: Tensor | None,
    ) -> None:
        rows, hidden = h_next.shape
        if product is not None:
            weight_hh = None
        self.module.cell_forward(
            *(self.cell, self.dtype, part, self.device, self.stream, rows, hidden),
            *(pre.data_ptr(), pre.stride(0)),
            *addresses(product, weight_hh, bias_hh, h, c, h_next, c_next, output),
            0 if output is None else output.stride(0),
            *addresses(saved),
        )

    def backward(
        self,
        part: int,
        saved: Tensor | None,
        previous: Tensor | None,
        grads: tuple[Tensor | None, Tensor | None],
        grad_c: Tensor | None,
        grad_pre: Tensor,
        grad_candidate: Tensor | None,
        direct: Tensor,
        grad_c_previous: Tensor | None,
    ) -> None:
        rows, hidden = direct.shape
        self.module.cell_backward(
            *(self.cell, self.dtype, part, self.device, self.stream, rows, hidden),
            *addresses(saved, previous),
            0 if previous is None else previous.stride(0),
            *(n for grad in grads for n in _address_and_strides(grad)),
            *addresses(grad_c, grad_pre),
            grad_pre.stride(0),
            *addresses(grad_candidate, direct, grad_c_previous),
        )


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _address_and_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride())


class Rows:
    """Which rows each step has: of all rows, one step after another, those of step t are begin[t]:end[t]."""

    def __init__(self, steps: int, batch: int, batch_sizes: Tensor | None) -> None:
        self.sizes = [batch] * steps if batch_sizes is None else batch_sizes.tolist()
        self.offsets = [0]
        for size in self.sizes:
            self.offsets.append(self.offsets[-1] + size)

    def order(self, reverse: bool) -> Iterator[int]:
        steps = range(len(self.sizes))
        return reversed(steps) if reverse else iter(steps)

    def of(self, t: int) -> slice:
        return slice(self.offsets[t], self.offsets[t + 1])

    def before(self, t: int, reverse: bool) -> tuple[int, slice]:
        """How many rows of step t have a state from the step before, and where that step's rows are."""
        other = t + 1 if reverse else t - 1
        if not 0 <= other < len(self.sizes):
            return 0, slice(0, 0)
        return min(self.sizes[t], self.sizes[other]), self.of(other)


class Weights(NamedTuple):
    """Those of one direction that a step multiplies by."""

    hh: Tensor
    bias_hh: Tensor | None
    hr: Tensor | None


def take_step(
    kernels: Kernels,
    mode: str,
    weights: Weights,
    pre: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    h_next: Tensor,
    c_next: Tensor | None,
    output: Tensor | None,
    saved: Tensor | None,
) -> None:
    """One step of n rows: pre (n, G*H), h (n, R) and c (n, H) before and after it; output takes h once more.

    h and c may be None, which means zeros, or be the next ones too. saved is (n, slots, H), or None.
    """
    rows, bias = len(pre), weights.bias_hh
    if mode == "GRU_RESET_BEFORE":
        hidden = h_next.shape[1]
        operand = torch.empty_like(h_next)
        if saved is None:
            saved = pre.new_empty((rows, CELLS[mode].saved, hidden))
        product = None if h is None else h @ weights.hh[: 2 * hidden].t()
        kernels.forward(FIRST, pre, product, None, bias, h, None, operand, None, None, saved)
        product = operand @ weights.hh[2 * hidden :].t()
        kernels.forward(REST, pre, product, None, bias, h, None, h_next, None, output, saved)
    elif weights.hr is not None:
        middle = pre.new_empty((rows, weights.hr.shape[1]))
        product = None if h is None else h @ weights.hh.t()
        kernels.forward(WHOLE, pre, product, None, bias, None, c, middle, c_next, None, saved)
        torch.mm(middle, weights.hr.t(), out=h_next)
        if output is not None:
            output.copy_(h_next)
    else:
        fused = h is not None and h is not h_next and rows <= _C.MOST_FUSED_ROWS
        product = None if h is None or fused else h @ weights.hh.t()
        weight = weights.hh if fused else None
        kernels.forward(WHOLE, pre, product, weight, bias, h, c, h_next, c_next, output, saved)


def forward(
    kernels: Kernels,
    mode: str,
    rows: Rows,
    reverse: bool,
    weights: Weights,
    pre: Tensor,
    h: Tensor,
    c: Tensor | None,
    output: Tensor,
    saved: Tensor | None,
) -> None:
    """One direction: pre (rows, G*H), output (rows, R), saved (rows, slots, H) or None. h (B, R) and c (B, H)
    are the initial states, and the last ones when it returns."""
    for t in rows.order(reverse):
        at, n = rows.of(t), rows.sizes[t]
        h_t, c_t = h[:n], None if c is None else c[:n]
        take_step(
            kernels,
            mode,
            weights,
            pre[at],
            h_t,
            c_t,
            h_t,
            c_t,
            output[at],
            None if saved is None else saved[at],
        )


class Gradients(NamedTuple):
    """What the backward pass of one direction leaves; rows as in the sequence."""

    pre: Tensor  # (rows, G*H)
    candidate: Tensor | None  # (rows, H), GRU: of U_n h + b_n
    hidden: Tensor | None  # (rows, R), projected LSTM: of h_t


def backward(
    kernels: Kernels,
    mode: str,
    rows: Rows,
    reverse: bool,
    weights: Weights,
    h0: Tensor | None,
    c0: Tensor | None,
    output: Tensor,
    saved: Tensor | None,
    grad_output: Tensor | None,
    grad_h: Tensor,
    grad_c: Tensor | None,
    grads: Gradients,
) -> None:
    """One direction. grad_h (B, R) and grad_c (B, H) are the gradients of the last states, and those of the
    initial ones when it returns."""
    hidden = grads.pre.shape[1] // CELLS[mode].gates
    for t in rows.order(not reverse):
        at, n = rows.of(t), rows.sizes[t]
        d_h = grad_h[:n]
        d_output = None if grad_output is None else grad_output[at]
        step = _Step(
            kernels,
            _states_before(mode, rows, t, reverse, h0, c0, output, saved),
            None if saved is None else saved[at],
            None if grad_c is None else grad_c[:n],
            grads.pre[at],
            None if grads.candidate is None else grads.candidate[at],
        )
        d = step.grad_pre
        if mode == "GRU_RESET_BEFORE":
            step.take(FIRST, d_h, d_output, d_h)
            step.take(REST, d[:, 2 * hidden :] @ weights.hh[2 * hidden :], None, d_h)
            d_h.addmm_(d[:, : 2 * hidden], weights.hh[: 2 * hidden])
        elif mode == "GRU":
            step.take(WHOLE, d_h, d_output, d_h)
            d_h.addmm_(d[:, : 2 * hidden], weights.hh[: 2 * hidden])
            d_h.addmm_(step.grad_candidate, weights.hh[2 * hidden :])
        elif weights.hr is None:
            step.take(WHOLE, d_h, d_output, d_h)
            torch.mm(d, weights.hh, out=d_h)
        else:
            if d_output is not None:
                d_h += d_output
            if grads.hidden is not None:
                grads.hidden[at] = d_h
            d_middle = d_h @ weights.hr
            step.take(WHOLE, d_middle, None, d_middle)
            torch.mm(d, weights.hh, out=d_h)


def _states_before(
    mode: str,
    rows: Rows,
    t: int,
    reverse: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    output: Tensor,
    saved: Tensor | None,
) -> list[tuple[slice, Tensor | None]]:
    """What step t's gradients need of c (LSTM) or h (GRU) before it, or of h after it (RNN, which saves
    nothing), for slices of the step's rows: of a reverse direction the last ones may begin with this step."""
    n = rows.sizes[t]
    if saved is None:
        return [(slice(0, n), output[rows.of(t)])]
    going_on, before = rows.before(t, reverse)
    states, initial = (saved[:, -1], c0) if mode == "LSTM" else (output, h0)
    pieces = [
        (slice(0, going_on), states[before][:going_on]),
        (slice(going_on, n), None if initial is None else initial[going_on:n]),
    ]
    return [(piece, state) for piece, state in pieces if piece.start < piece.stop]


def previous_states(rows: Rows, reverse: bool, h0: Tensor | None, output: Tensor, to: Tensor) -> None:
    """to (rows, R): the state before each row of `output`."""
    for t, n in enumerate(rows.sizes):
        going_on, before = rows.before(t, reverse)
        at = to[rows.of(t)]
        at[:going_on] = output[before][:going_on]
        if going_on < n:
            at[going_on:] = 0 if h0 is None else h0[going_on:n]


class _Step(NamedTuple):
    """The gradients of one step, in pieces of its rows."""

    kernels: Kernels
    pieces: list[tuple[slice, Tensor | None]]
    saved: Tensor | None
    grad_c: Tensor | None
    grad_pre: Tensor
    grad_candidate: Tensor | None

    def take(self, part: int, grad: Tensor, more: Tensor | None, direct: Tensor) -> None:
        """From the gradient of the result, grad + more; direct gets what does not pass through weight_hh."""
        for piece, previous in self.pieces:
            saved, grad_c, grad_candidate, second = (
                None if x is None else x[piece] for x in (self.saved, self.grad_c, self.grad_candidate, more)
            )
            self.kernels.backward(
                part,
                saved,
                previous,
                (grad[piece], second),
                grad_c,
                self.grad_pre[piece],
                grad_candidate,
                direct[piece],
                grad_c,
            )
