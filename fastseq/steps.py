"""Time loops in Python: for each step torch's matrix product and a kernel for what is left of the cell.

For the *Cell modules, which have one step, and for layers whose product of one step is so large that
launching it costs nothing beside it. loops.py says when; csrc/fastseq.h (CellStepArgs, CellGradArgs) what the
kernels do.

Both directions of a layer take their steps at the same time: every launch, of a product or of a kernel, is
for both. What a step launches is put together once, as operations on buffers that all steps share; a step
then calls each of them with its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from .addresses import addresses, strides
from .checks import CELLS, Cell

WHOLE, FIRST, REST = range(3)  # parts of a step

# Of each direction (t, offset, rows) of a step; in the backward pass the same of the step before it too.
Now = tuple[tuple[int, ...], ...]
Operation = Callable[[Now], None]

NOTHING = (0, 0, 0)


class Layout(NamedTuple):
    """The rows of a sequence; lengths and resets as loops.Rows has them."""

    steps: int
    batch: int
    batch_sizes: Tensor | None
    reverse: bool  # whether the only direction runs from the last step to the first
    lengths: Tensor | None
    resets: Tensor | None

    @property
    def packed(self) -> bool:
        return self.batch_sizes is not None


class Rows:
    """Which rows each step has: (t, offset, rows), those of step t being offset:offset + rows of all."""

    def __init__(self, layout: Layout) -> None:
        steps, batch, sizes = layout.steps, layout.batch, layout.batch_sizes
        sizes = [batch] * steps if sizes is None else sizes.tolist()
        self.steps = list(zip(range(steps), accumulate(sizes, initial=0), sizes, strict=False))
        self.first = int(layout.reverse)

    def forward(self, directions: int) -> Iterator[Now]:
        """Direction 0 from the first step to the last, direction 1 from the last to the first."""
        ways = self.steps, self.steps[::-1]
        return zip(*ways[self.first : self.first + directions], strict=True)

    def backward(self, directions: int) -> Iterator[Now]:
        """The other way round, each step with the one before it."""
        steps = self.steps[::-1], self.steps
        ways = [[a + b for a, b in zip(way, [*way[1:], NOTHING], strict=True)] for way in steps]
        return zip(*ways[self.first : self.first + directions], strict=True)


class Bounds(NamedTuple):
    grad_clip: float  # of the gradients of states at each step; infinite: none
    truncate: int  # the gradients do not cross before every such step; 0: they do


class Cut:
    """Clears the rows of `states` (D, B, size) that do not cross between two steps."""

    def __init__(self, layout: Layout, truncate: int, *states: Tensor | None) -> None:
        self.layout, self.truncate = layout, truncate
        self.states = [state for state in states if state is not None]

    def __call__(self, direction: int, t: int, rows: slice) -> None:
        """Between t - 1 and t, whose rows lie there."""
        everything = self.truncate and t % self.truncate == 0
        if not everything and self.layout.resets is None:
            return
        count, lengths = rows.stop - rows.start, self.layout.lengths
        if not everything:
            cut = self.layout.resets.reshape(-1)[rows]
        else:
            cut = None if lengths is None else lengths[:count] > t
        for state in self.states:
            own = state[direction, :count]
            own.zero_() if cut is None else own.masked_fill_(cut.unsqueeze(1), 0)


class Product:
    """result = operand @ weight, of every direction and the step's rows."""

    def __init__(self, operand: Tensor, weight: Tensor, result: Tensor) -> None:
        self.all, self.weight = (operand, result), weight
        self.operand, self.result, self.rows = operand, result, result.shape[1]

    def __call__(self, now: Now) -> None:
        rows = max(step[2] for step in now)
        if rows != self.rows:
            self.operand, self.result = (tensor[:, :rows] for tensor in self.all)
            self.rows = rows
        torch.bmm(self.operand, self.weight, out=self.result)


class Kernels(NamedTuple):
    """The cell kernels of a device, with what every call of them begins with."""

    module: Any
    cell: int
    dtype: int
    device: int
    stream: int


class Launch:
    """A kernel on the step's rows. `tensors`: of all directions, each a sequence of one for each, or None."""

    def __init__(
        self,
        kernel: Callable[..., None],
        common: tuple[int, ...],
        directions: int,
        *tensors: Sequence[Tensor] | Tensor | None,
    ) -> None:
        self.kernel, self.common, self.buffers = kernel, common, tensors  # as long as their addresses
        self.directions = tuple(
            addresses(*(None if t is None else t[i] for t in tensors)) for i in range(directions)
        )

    def __call__(self, now: Now) -> None:
        self.kernel(self.common, self.directions, now)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Of what adds up over the steps, c and the gradients of the states: 16 bits would lose what is small."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class Weights(NamedTuple):
    """Those that a step multiplies by, of all directions."""

    hh: Tensor  # (D, G*H, R)
    bias_hh: Sequence[Tensor] | None  # (G*H) of each
    hr: Tensor | None  # (D, R, H)


def forward_step(
    kernels: Kernels,
    mode: str,
    packed: bool,
    weights: Weights,
    pre: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    h_next: Tensor,
    c_next: Tensor | None,
    output: Tensor | None,
    saved: Tensor | None,
    saves_states: bool = False,
    lengths: Tensor | None = None,
) -> list[Operation]:
    """What a step does: h (D, B, R) and c (D, B, H) before it, which may be None for zeros, h_next and c_next
    after it, which may be the same; c_next and c may be wide. pre (rows, D*G*H), output (T, B, D*R) and saved
    (D, rows, slots, H), or if `saves_states` (D, rows, H) of c. What lies behind `lengths` is left alone."""
    directions, batch = h_next.shape[:2]
    hidden = weights.hh.shape[1] // CELLS[mode].gates
    operations: list[Operation] = []

    def multiply(operand: Tensor | None, weight: Tensor) -> Tensor | None:
        if operand is None:
            return None
        result = h_next.new_empty((directions, batch, weight.shape[1]))
        operations.append(Product(operand, weight.transpose(1, 2), result))
        return result

    def finish(
        part: int,
        product: Tensor | None,
        h: Tensor | None,
        c: Tensor | None,
        h_next: Tensor,
        c_next: Tensor | None,
        output: Tensor | None,
    ) -> None:
        wide = any(state is not None and state.dtype is not h_next.dtype for state in (c, c_next))
        common = (*kernels[1:], part, packed, wide, h_next.shape[2], saves_states)
        common += (*addresses(lengths, pre, None, output), *strides(output, 2))
        tensors = (product, weights.bias_hh, h, c, h_next, c_next, saved)
        operations.append(Launch(kernels.module.cell_forward, common, directions, *tensors))

    if mode == "GRU_RESET_BEFORE":
        z, operand = torch.empty_like(h_next, dtype=wide_dtype(h_next)), torch.empty_like(h_next)
        product = multiply(h, weights.hh[:, : 2 * hidden])
        finish(FIRST, product, h, None, operand, z, None)
        product = multiply(operand, weights.hh[:, 2 * hidden :])
        finish(REST, product, h, z, h_next, None, output)
    elif weights.hr is not None:
        operand = h_next.new_empty((directions, batch, hidden))
        product = multiply(h, weights.hh)
        finish(WHOLE, product, None, c, operand, c_next, None)
        product = multiply(operand, weights.hr)
        finish(REST, product, None, None, h_next, None, output)
    else:
        product = multiply(h, weights.hh)
        finish(WHOLE, product, h, c, h_next, c_next, output)
    return operations


def may_fuse(cell: Cell, batch: int) -> bool:
    """Whether a kernel makes one step's product with weight_hh too, instead of torch."""
    return cell != CELLS["GRU_RESET_BEFORE"] and batch <= _C.MOST_FUSED_ROWS


def cell(
    kernels: Kernels,
    mode: str,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    pre: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    h_next: Tensor,
    c_next: Tensor | None,
    saved: Tensor | None,
) -> None:
    """One step of one direction: pre (B, G*H), h and c (B, H) before it, None for zeros, and after it, saved
    (B, slots, H). With few rows the kernel makes the product too."""
    batch, hidden = h_next.shape
    now = ((0, 0, batch),)
    if mode == "GRU_RESET_BEFORE":
        weights = Weights(weight_hh.unsqueeze(0), None if bias_hh is None else [bias_hh], None)
        states = [None if t is None else t.unsqueeze(0) for t in (h, c, h_next, c_next, None, saved)]
        for operation in forward_step(kernels, mode, False, weights, pre, *states):
            operation(now)
        return
    fused = h is not None and may_fuse(CELLS[mode], batch)
    product = None if fused or h is None else h @ weight_hh.t()
    of_output = (0, 0, 0)  # none beside h_next
    common = (*kernels[1:], WHOLE, False, False, hidden, False)
    common += addresses(None, pre, weight_hh if fused else None)
    tensors = addresses(product, bias_hh, h, c, h_next, c_next, saved)
    kernels.module.cell_forward((*common, *of_output), (tensors,), now)


def forward(
    kernels: Kernels,
    mode: str,
    layout: Layout,
    weights: Weights,
    pre: Tensor,
    h: Tensor,
    c: Tensor | None,
    output: Tensor,
    saved: Tensor | None,
    saves_states: bool,
) -> None:
    """All steps. h (D, B, R) and c (D, B, H), wide, are the initial states, and the last ones afterwards;
    the rest as in forward_step."""
    states, kept = (h, c, h, c), (output, saved, saves_states, layout.lengths)
    operations = forward_step(kernels, mode, layout.packed, weights, pre, *states, *kept)
    rows, cut = Rows(layout), Cut(layout, 0, h, c)
    for now in rows.forward(len(h)):
        for operation in operations:
            operation(now)
        if layout.resets is None:
            continue
        for d, (t, offset, count) in enumerate(now):
            if d == 1 or layout.reverse:
                if t > 0:
                    cut(d, t, slice(offset, offset + count))
            elif t + 1 < layout.steps:
                t, offset, count = rows.steps[t + 1]
                cut(d, t, slice(offset, offset + count))


class Gradients(NamedTuple):
    """What the backward pass fills, D directions and all rows; None: not wanted."""

    pre: Tensor  # (rows, D, G*H)
    previous: Tensor | None  # (D, rows, R) the states before each row
    candidate: Tensor | None  # (D, rows, H) of U_n h + b_n, GRU
    hidden: Tensor | None  # (D, rows, R) of h_t, projected LSTM
    h0: Tensor | None
    c0: Tensor | None


def backward(
    kernels: Kernels,
    mode: str,
    layout: Layout,
    weights: Weights,
    h0: Tensor | None,
    c0: Tensor | None,
    output: Tensor,
    saved: Tensor | None,
    grad_output: Tensor | None,
    grad_h: Tensor,
    grad_c: Tensor | None,
    bounds: Bounds,
    grads: Gradients,
) -> None:
    """All steps. grad_h (D, B, R) and grad_c (D, B, H), wide, are the gradients of the last states; what they
    hold when it returns is of no use."""
    directions, batch, width = grad_h.shape
    hidden = grads.pre.shape[2] // CELLS[mode].gates
    wide = grad_h.dtype is not output.dtype
    operations: list[Operation] = []
    grad_product = output.new_empty((directions, batch, grads.pre.shape[2]))
    # What the step before made, but for rows that it did not have: zeros, or what their last step left.
    product = output.new_zeros(grad_h.shape)

    def multiply(operand: Tensor, weight: Tensor) -> Tensor:
        result = output.new_empty((directions, batch, weight.shape[2]))
        operations.append(Product(operand, weight, result))
        return result

    def finish(
        part: int,
        units: int,
        grad: Tensor | None,
        product: Tensor,
        grad_output: Tensor | None,
        grad_product: Tensor,
        direct: Tensor | None,
        previous: Tensor | None,
        hidden: Tensor | None = None,
    ) -> None:
        common = (*kernels[1:], part, layout.packed, wide, units)
        common += (*addresses(layout.lengths, layout.resets), bounds.grad_clip)
        common += (*addresses(grads.pre, output), *strides(output, 2))
        common += (*addresses(grad_output), *strides(grad_output, 3))
        tensors = (saved, h0, c0, grad, product, grad_c, grad_product, direct, grad_c)
        tensors += (previous, grads.candidate, hidden)
        operations.append(Launch(kernels.module.cell_backward, common, directions, *tensors))

    whole = grad_product, weights.hh
    if mode == "GRU_RESET_BEFORE":
        split = 2 * hidden
        finish(FIRST, hidden, grad_h, product, grad_output, grad_product, grad_h, grads.previous)
        of_operand = multiply(grad_product[:, :, split:], weights.hh[:, split:])
        finish(REST, hidden, None, of_operand, None, grad_product, grad_h, None)
        whole = grad_product[:, :, :split], weights.hh[:, :split]
    elif weights.hr is not None:
        operand = torch.empty_like(product)
        finish(FIRST, width, grad_h, product, grad_output, operand, grad_h, grads.previous, grads.hidden)
        of_cell = multiply(operand, weights.hr)
        finish(WHOLE, hidden, None, of_cell, None, grad_product, None, None)
    else:
        finish(WHOLE, hidden, grad_h, product, grad_output, grad_product, grad_h, grads.previous)
    operations.append(Product(*whole, product))
    cut = Cut(layout, bounds.truncate, grad_h, grad_c, product)
    cuts = bounds.truncate or layout.resets is not None
    for s, now in enumerate(Rows(layout).backward(directions)):
        if s + 1 == layout.steps and grads.h0 is None:
            operations.pop()
        for operation in operations:
            operation(now)
        for d, (t, offset, count, t_before, offset_before, count_before) in enumerate(now):
            if cuts and count_before:
                later = (t, offset, count) if t > t_before else (t_before, offset_before, count_before)
                cut(d, later[0], slice(later[1], later[1] + min(count, count_before)))
    if grads.h0 is not None:
        grads.h0.copy_(grad_h.add_(product))
    if grads.c0 is not None and grad_c is not None:
        grads.c0.copy_(grad_c)
