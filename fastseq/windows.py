"""The backward pass of a layer that did not keep its gates, as operators torch.ops.fastseq.*:

    recurrent_checkpoints         the states between windows, of those of all steps
    recurrent_windows_backward    the gradients

The steps are cut into windows, which are taken in the order of the backward pass: the gates of a window are
made again, then recurrent_backward runs on the window, with the gradients of the states that the window
before it left. What is made again depends on what was kept:

    recompute      the output and, of an LSTM, c of every step. The gates of all steps of a window follow from
                   these without a loop over time: they are one step of a batch of all the window's rows.
    checkpoint:k   h and c every k steps. The forward pass of a window runs again, from its first state.

So only the gates of one window exist at a time. The arithmetic is that of the pass that keeps all gates; only
sums over steps (the gradients of weights) are rounded in other places, and the gradients of 16-bit states
once a window.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import CELLS, Layer, check_layer, problem, unsupported
from .dispatch import library, register
from .lengths import Packing, packing

# output and states are those of recurrent with save="states". Returns h and c of the bounds between windows,
# (D, windows, B, size), the last one zero, c empty if there is none; the order of rows with lengths is that
# of the kernels.
library.define(
    "recurrent_checkpoints(Tensor output, Tensor states, Tensor? batch_sizes, Tensor? lengths, str mode, "
    "int directions, int batch, str memory, int truncate) -> (Tensor kept_h, Tensor kept_c)"
)
# The arguments are those of recurrent_backward, but for kept_h and kept_c instead of output and saved: the
# output and the states of all steps for "recompute", else what recurrent_checkpoints returns.
library.define(
    "recurrent_windows_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor? batch_sizes, Tensor? lengths, Tensor? resets, Tensor? h0, Tensor? c0, Tensor[] weights, "
    "Tensor kept_h, Tensor kept_c, str mode, int directions, bool bias, float? grad_clip, int truncate, "
    "str memory, bool[] wanted) -> Tensor[]"
)

# A window of "recompute" has so many bytes of gates, or this part of all of them if that is more.
WINDOW_BYTES, WINDOW_PART = 8 << 20, 32


def steps_of(memory: str) -> int | None:
    """Of "checkpoint:k" k, of "recompute" 0, of "fast" None. Raises ValueError for anything else."""
    if memory == "fast":
        return None
    if memory == "recompute":
        return 0
    given = re.fullmatch("checkpoint:([1-9][0-9]*)", memory) if isinstance(memory, str) else None
    if given is None:
        raise ValueError(
            problem(
                f"memory={memory!r}",
                "'fast', 'recompute', or 'checkpoint:k' with a number of steps k, at least 1",
                "memory='recompute', or memory='checkpoint:32'",
            )
        )
    return int(given[1])


def _bounds(steps: int, size: int, truncate: int) -> list[int]:
    """The first steps of all windows, and the number of steps. A window ends where gradients do not cross, or
    begins at such a step: within it they do not cross every `truncate` steps from its beginning."""
    if not truncate:
        return [*range(0, steps, size), steps]
    if size >= truncate:
        return [*range(0, steps, size // truncate * truncate), steps]
    starts = (range(piece, min(piece + truncate, steps), size) for piece in range(0, steps, truncate))
    return [*(start for some in starts for start in some), steps]


def steps_of_window(layer: Layer, itemsize: int, memory: str) -> int:
    """At most so many."""
    if size := steps_of(memory):
        return size
    of_all = layer.rows * layer.cell.saved * layer.hidden_size * itemsize  # bytes
    if of_all == 0:
        return max(1, layer.steps)
    part = max(WINDOW_BYTES, of_all / WINDOW_PART) / of_all
    return max(1, min(layer.steps, int(layer.steps * part)))


def count_of(steps: int, size: int, truncate: int) -> int:
    """How many windows there are, of a symbolic number of steps too."""
    if not truncate:
        return (steps - 1) // size + 1
    if size >= truncate:
        return (steps - 1) // (size // truncate * truncate) + 1
    whole_pieces = (steps - 1) // truncate * ((truncate - 1) // size + 1)
    return whole_pieces + (steps - 1) % truncate // size + 1


class _Rows(NamedTuple):
    """Which rows each step has, and how a window of a tensor is cut out.

    Tensors of steps are (T, B, features), or (rows, features) of a packed sequence, in which the rows of a
    step follow those of the step before. With `there` a padded tensor's rows are taken in packed order.
    """

    sizes: list[int] | None  # rows of each step, None: all have `batch`
    offsets: list[int]
    batch: int
    batch_sizes: Tensor | None
    there: Packing | None
    lengths: Tensor | None  # of rows of a padded tensor that nothing is gathered from

    @property
    def steps(self) -> int:
        return len(self.offsets) - 1

    def count(self, t: int) -> int:
        return self.batch if self.sizes is None else self.sizes[t]

    def cut(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """The steps from begin to end: (steps, B, features), or (rows, features)."""
        if self.sizes is None:
            return tensor[begin:end]
        rows = slice(self.offsets[begin], self.offsets[end])
        if self.there is None or tensor.dim() != 3:
            return tensor[rows]
        return tensor[self.there.steps[rows], self.there.rows[rows]]

    def flat(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        return self.cut(tensor, begin, end).reshape(-1, tensor.shape[-1])

    def put(self, window: Tensor, tensor: Tensor, begin: int, end: int, add: bool) -> None:
        """Stores what cut() would give, or adds it to what is there."""
        if self.there is None:
            to = self.cut(tensor, begin, end)
            to.add_(window) if add else to.copy_(window)
            return
        rows = slice(self.offsets[begin], self.offsets[end])
        at = (self.there.steps[rows], self.there.rows[rows])
        tensor.index_put_(at, tensor[at] + window if add else window)

    def continued(self, t: int, count: int, device: torch.device) -> Tensor:
        """Of the first rows those that have the steps t - 1 and t."""
        if self.lengths is not None:
            return (self.lengths > t)[:count]
        return torch.arange(count, device=device) < self.count(t)

    def previous(self, tensor: Tensor, first: Tensor, begin: int, end: int, reverse: bool) -> Tensor:
        """For each row of the window that of the step before, in the order of the direction; `first` (B,
        features) for rows that begin. (rows, features)"""
        width, last = tensor.shape[-1], self.steps
        if self.sizes is not None:
            shift = 1 if reverse else -1
            low, high = max(begin + shift, 0), min(end + shift, last)
            near = self.cut(tensor, low, high)
            parts = []
            for t in range(begin, end):
                before, n = t + shift, self.sizes[t]
                m = min(n, self.sizes[before]) if 0 <= before < last else 0
                at = self.offsets[before] - self.offsets[low] if m else 0
                parts += [near[at : at + m], first[m:n]]
            return torch.cat(parts)
        if not reverse:
            if begin > 0:
                return tensor[begin - 1 : end - 1].reshape(-1, width)
            return torch.cat([first.unsqueeze(0), tensor[: end - 1]]).view(-1, width)
        near = tensor[begin + 1 : end + 1]
        if end == last:
            near = torch.cat([near, first.unsqueeze(0)])
        if self.lengths is not None:
            at = torch.arange(begin + 1, end + 1, device=self.lengths.device).unsqueeze(1)
            near = torch.where((at < self.lengths).unsqueeze(2), near, first)
        return near.reshape(-1, width)

    def first_of(self, before: Tensor | None, first: Tensor, begin: int, end: int, reverse: bool) -> Tensor:
        """The states (rows, features) with which a window begins: `before` (B, or rows of one step), which
        the window before it in the order of the direction left, and `first` of rows that begin."""
        n = self.count(begin)
        if before is None:
            return first[:n]
        if not reverse:
            return before[:n]
        if self.lengths is not None:
            return torch.where((self.lengths > end).unsqueeze(1), before, first)
        m = self.count(end)
        return torch.cat([before[:m], first[m:n]]) if m < n else before[:m]


def _gathers(device: torch.device) -> bool:
    """Whether rows with lengths are made a packed sequence there; else kernels leave them out as they lie."""
    return device.type == "cpu"


def _rows_of(
    steps: int, batch: int, batch_sizes: Tensor | None, lengths: Tensor | None, device: torch.device
) -> _Rows:
    there = packing(lengths, steps) if lengths is not None and _gathers(device) else None
    if there is not None:
        batch_sizes = there.batch_sizes
    if batch_sizes is None:
        masked = None if lengths is None or _gathers(device) else lengths.to(device)
        return _Rows(None, [batch * t for t in range(steps + 1)], batch, None, None, masked)
    sizes = batch_sizes.tolist()
    return _Rows(sizes, [0, *accumulate(sizes)], sizes[0] if sizes else 0, batch_sizes, there, None)


def _columns(output: Tensor, direction: int, width: int) -> Tensor:
    return output[..., direction * width : (direction + 1) * width]


def _by_step(states: Tensor, rows: _Rows) -> Tensor:
    """c of every step, (rows, H), as the tensors of steps are."""
    return states.view(rows.steps, rows.batch, states.shape[-1]) if rows.sizes is None else states


def _allocate_checkpoints(
    output, states, batch_sizes, lengths, mode, directions, batch, memory, truncate
) -> tuple[Tensor, Tensor]:
    """Room for the states between windows, and one more: torch.export knows that no dimension is 0 then."""
    steps = output.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    count = count_of(steps, steps_of(memory) or 1, truncate)
    lead, cell_state = (directions, count, batch), CELLS[mode].cell_state
    kept_h = output.new_zeros((*lead, output.shape[-1] // directions))
    kept_c = output.new_zeros((*lead, states.shape[-1]) if cell_state else (0,))
    return kept_h, kept_c


def _checkpoints(
    output, states, batch_sizes, lengths, mode, directions, batch, memory, truncate
) -> tuple[Tensor, Tensor]:
    kept_h, kept_c = _allocate_checkpoints(
        output, states, batch_sizes, lengths, mode, directions, batch, memory, truncate
    )
    steps = output.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    between = _bounds(steps, steps_of(memory) or 1, truncate)[1:-1]
    rows, width = _rows_of(steps, batch, batch_sizes, lengths, output.device), kept_h.shape[-1]
    for d in range(directions):
        for i, bound in enumerate(between):
            t = bound if d == 1 else bound - 1
            if t >= rows.steps:
                break
            n = rows.count(t)
            kept_h[d, i, :n] = rows.flat(_columns(output, d, width), t, t + 1)
            if kept_c.dim() == 4:
                kept_c[d, i, :n] = rows.flat(_by_step(states[d], rows), t, t + 1)
    return kept_h, kept_c


class _Carried:
    """The gradient of a state (B, size) on its way from window to window."""

    def __init__(self, of_last: Tensor | None, like: Tensor) -> None:
        self.grad = torch.zeros_like(like) if of_last is None else of_last.clone()

    def take(self, rows: int) -> Tensor:
        return self.grad[:rows].unsqueeze(0)

    def leave(self, grad: Tensor, cut: Tensor | None) -> None:
        """grad (1, rows, size); zero where `cut` (rows)."""
        if cut is not None:
            grad = grad.masked_fill(cut.unsqueeze(1), 0)
        self.grad[: grad.shape[1]] = grad[0]


class _Sum:
    """A sum over windows, of 16-bit tensors in float32."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None

    def add(self, part: Tensor) -> None:
        if self.sum is None:
            self.sum = part.float() if part.element_size() == 2 else part
        else:
            self.sum.add_(part)


class Call(NamedTuple):
    """The arguments of recurrent_windows_backward."""

    grad_output: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    input: Tensor
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    kept_h: Tensor
    kept_c: Tensor
    mode: str
    directions: int
    bias: bool
    grad_clip: float | None
    truncate: int
    memory: str
    wanted: Sequence[bool]


def check(call: Call) -> Layer:
    a = call
    return check_layer(a.input, a.batch_sizes, a.h0, a.c0, a.weights, a.mode, a.directions, a.bias)


def _fake(*arguments: Any) -> list[Tensor]:
    call = Call(*arguments)
    check(call)
    grads = ops.allocate_gradients(call.input, call.h0, call.c0, call.weights, call.wanted)
    return [grad for grad in grads if grad is not None]


def _run(*arguments: Any) -> list[Tensor]:
    call = Call(*arguments)
    layer = check(call)
    grads = ops.allocate_gradients(call.input, call.h0, call.c0, call.weights, call.wanted)
    rows = _rows_of(layer.steps, layer.batch, call.batch_sizes, call.lengths, call.input.device)
    if rows.there is not None:
        order = rows.there.of_state
        states = {name: order(getattr(call, name)) for name in ("h0", "c0", "grad_h_n", "grad_c_n")}
        resets = None if call.resets is None else rows.there.packed(call.resets)
        call = call._replace(**states, resets=resets)
        if grads[0] is not None:
            grads[0].zero_()
    count = len(call.weights) // layer.directions
    for d in range(layer.directions):
        own = slice(d * count, (d + 1) * count)
        made = _Direction(call, layer, rows, d, call.weights[own]).run(grads[0], call.wanted[3:][own])
        for grad, sum in zip(grads[3:][own], made.sums, strict=True):
            if grad is not None:
                grad.zero_() if sum.sum is None else grad.copy_(sum.sum)
        for grad, carried, of_last in (
            (grads[1], made.grad_h, arguments[1]),
            (grads[2], made.grad_c, arguments[2]),
        ):
            if grad is None:
                continue
            if rows.there is None:
                grad[d] = carried.grad
            else:
                grad[d] = 0 if of_last is None else of_last[d]  # of rows without a step
                grad[d].index_copy_(0, rows.there.order, carried.grad)
    return [grad for grad in grads if grad is not None]


class _Direction:
    """The way back through one direction's windows."""

    def __init__(self, call: Call, layer: Layer, rows: _Rows, d: int, weights: Sequence[Tensor]) -> None:
        self.call, self.layer, self.rows, self.d, self.weights = call, layer, rows, d, weights
        self.reverse = d == 1 or layer.reverse
        self.cell_state = layer.cell.cell_state

        def state(tensor: Tensor | None, size: int) -> Tensor:
            return call.input.new_zeros((rows.batch, size)) if tensor is None else tensor[d]

        self.h0 = state(call.h0, layer.width)
        self.c0 = state(call.c0, layer.hidden_size) if self.cell_state else self.h0
        self.grad_h = _Carried(None if call.grad_h_n is None else call.grad_h_n[d], self.h0)
        self.grad_c = _Carried(None if call.grad_c_n is None else call.grad_c_n[d], self.c0)
        self.sums = [_Sum() for _ in weights]
        self.recomputes = steps_of(call.memory) == 0
        # Of every step, or of every bound between windows.
        self.h = _columns(call.kept_h, d, layer.width) if self.recomputes else call.kept_h[d]
        self.c = self.h
        if self.cell_state:
            self.c = _by_step(call.kept_c[d], rows) if self.recomputes else call.kept_c[d]

    def run(self, grad_input: Tensor | None, wanted: Sequence[bool]) -> _Direction:
        call = self.call
        size = steps_of_window(self.layer, call.input.element_size(), call.memory)
        windows = list(enumerate(pairwise(_bounds(self.rows.steps, size, call.truncate))))
        for i, (begin, end) in windows if self.reverse else reversed(windows):
            self._window(i, begin, end, grad_input, wanted)
        return self

    def _window(
        self, i: int, begin: int, end: int, grad_input: Tensor | None, wanted: Sequence[bool]
    ) -> None:
        call, rows, cut = self.call, self.rows, self.rows.cut
        input = cut(call.input, begin, end)
        resets = None if call.resets is None else cut(call.resets, begin, end)
        lengths = None if rows.lengths is None else (rows.lengths - begin).clamp(0, end - begin)
        batch_sizes = None if rows.batch_sizes is None else rows.batch_sizes[begin:end]
        h0, c0 = self._first(self.h, self.h0, i, begin, end), None
        if self.cell_state:
            c0 = self._first(self.c, self.c0, i, begin, end)
        sequence = (input, batch_sizes, lengths, resets, h0, c0)
        layer = (call.mode, -1 if self.reverse else 1, call.bias)
        if self.recomputes:
            output, saved = cut(self.h, begin, end), self._gates(input, begin, end)
        else:
            output, _, _, saved = ops.recurrent(*sequence, self.weights, *layer, False, "gates")
        grad_output = call.grad_output
        if grad_output is not None:
            grad_output = cut(_columns(grad_output, self.d, self.layer.width), begin, end)
        n = rows.count(begin)
        grads = iter(
            ops.recurrent_backward(
                grad_output,
                self.grad_h.take(n),
                self.grad_c.take(n) if self.cell_state else None,
                *sequence,
                self.weights,
                output,
                saved,
                *layer,
                call.grad_clip,
                call.truncate,
                [grad_input is not None, True, self.cell_state, *wanted],
            )
        )
        if grad_input is not None:
            rows.put(next(grads), grad_input, begin, end, add=self.d == 1)
        ends = self._cut(begin, end, n)
        self.grad_h.leave(next(grads), ends)
        if self.cell_state:
            self.grad_c.leave(next(grads), ends)
        for sum, want in zip(self.sums, wanted, strict=True):
            if want:
                sum.add(next(grads))

    def _first(self, states: Tensor, first: Tensor, i: int, begin: int, end: int) -> Tensor:
        """The states (1, rows, size) with which the window begins. The kernels see to a reset before the
        first step; one at `end`, from where the backward direction comes, they do not see."""
        rows, bound = self.rows, end if self.reverse else begin
        before = None
        if 0 < bound < rows.steps:
            if self.recomputes:
                at = bound if self.reverse else bound - 1
                before = rows.flat(states, at, at + 1)
            else:
                before = states[i if self.reverse else i - 1]
        state = rows.first_of(before, first, begin, end, self.reverse)
        if before is not None and self.reverse and self.call.resets is not None:
            state = state.masked_fill(self._resets_at(end, len(state)).unsqueeze(1), 0)
        return state.unsqueeze(0)

    def _resets_at(self, t: int, count: int) -> Tensor:
        """Of the first rows, whether an episode begins at step t."""
        resets = self.rows.cut(self.call.resets, t, t + 1).reshape(-1)
        if self.rows.lengths is not None:
            resets = resets & (self.rows.lengths > t)
        return torch.nn.functional.pad(resets, (0, count - len(resets)))

    def _cut(self, begin: int, end: int, count: int) -> Tensor | None:
        """Of the window's rows those whose gradient does not go on to the next window; None: all do."""
        bound = end if self.reverse else begin
        if not 0 < bound < self.rows.steps:
            return None
        cut = None
        if self.call.truncate and bound % self.call.truncate == 0:
            cut = self.rows.continued(bound, count, self.h0.device)
        if self.reverse and self.call.resets is not None:
            resets = self._resets_at(bound, count)
            cut = resets if cut is None else cut | resets
        return cut

    def _gates(self, input: Tensor, begin: int, end: int) -> Tensor:
        """The gates of all steps of the window, made as one step of a batch of all its rows."""
        call, rows = self.call, self.rows
        h = rows.previous(self.h, self.h0, begin, end, self.reverse)
        c = rows.previous(self.c, self.c0, begin, end, self.reverse) if self.cell_state else None
        if call.resets is not None:
            new = self._new_states(begin, end).unsqueeze(1)
            h, c = h.masked_fill(new, 0), None if c is None else c.masked_fill(new, 0)
        x = input.reshape(1, -1, input.shape[-1])
        states = (h.unsqueeze(0), None if c is None else c.unsqueeze(0))
        layer = (call.mode, 1, call.bias)
        return ops.recurrent(x, None, None, None, *states, self.weights, *layer, False, "gates")[3]

    def _new_states(self, begin: int, end: int) -> Tensor:
        """For each row of the window whether its step begins with a new state."""
        resets = self.call.resets.unsqueeze(-1)
        if not self.reverse:
            return self.rows.cut(resets, begin, end).reshape(-1)
        none = resets.new_zeros((self.rows.batch, 1))
        return self.rows.previous(resets, none, begin, end, True).reshape(-1)


_DEVICES = ("cpu", "cuda")
recurrent_checkpoints = register(
    "recurrent_checkpoints", dict.fromkeys(_DEVICES, _checkpoints), _allocate_checkpoints, unsupported
)
recurrent_windows_backward = register(
    "recurrent_windows_backward", dict.fromkeys(_DEVICES, _run), _fake, unsupported
)
