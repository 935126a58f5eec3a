"""Time loops in Python: for each step torch's matrix product and a kernel for what is left of the cell.

For the *Cell modules, which have one step, for layers whose product of one step is so large that launching it
costs nothing beside it, and for all layers over dual numbers. loops.py and dual_loops.py say when;
csrc/fastseq.h (CellStepArgs, CellGradArgs and those of dual numbers) what the kernels do.

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

# Of each direction (t, offset, rows) of a step, the same of the one after it, or before it in the backward
# pass, and whether no gradient of a state crosses between them.
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
    truncate: int = 0  # no gradient, or tangent, of a state crosses before every such step; 0: all do

    @property
    def packed(self) -> bool:
        return self.batch_sizes is not None


class Rows:
    """Which rows each step has: (t, offset, rows), those of step t being offset:offset + rows of all."""

    def __init__(self, layout: Layout) -> None:
        steps, batch, sizes = layout.steps, layout.batch, layout.batch_sizes
        sizes = [batch] * steps if sizes is None else sizes.tolist()
        self.steps = list(zip(range(steps), accumulate(sizes, initial=0), sizes, strict=False))
        self.first, self.truncate = int(layout.reverse), layout.truncate

    def forward(self, directions: int) -> Iterator[Now]:
        """Each step with the one after it; direction 0 from the first step to the last, direction 1 from the
        last to the first."""
        return self._of((self.steps, self.steps[::-1]), directions)

    def backward(self, directions: int) -> Iterator[Now]:
        """The other way round, each step with the one before it."""
        return self._of((self.steps[::-1], self.steps), directions)

    def _of(self, ways: Sequence[Sequence[tuple[int, int, int]]], directions: int) -> Iterator[Now]:
        ways = ways[self.first : self.first + directions]
        pairs = [zip(way, [*way[1:], NOTHING], strict=True) for way in ways]
        return zip(*([(*a, *b, self._truncated(a, b)) for a, b in way] for way in pairs), strict=True)

    def _truncated(self, now: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
        return bool(self.truncate and other[2]) and max(now[0], other[0]) % self.truncate == 0


Planes = Sequence[Tensor | None]  # a tensor, or one and its tangent, None where it is zero or not wanted


class Matrix(NamedTuple):
    """What a product reads or makes, of each direction. Of dual numbers one product makes both planes, with
    each row of numbers followed by the row of their tangents: then the weight is read once. Where the weight
    has a tangent too, there are three matrices for a direction, also one product: numbers and tangents with
    the weight, and the numbers again with the weight's tangent, so that nothing is multiplied in vain."""

    whole: Tensor  # (D, B, size); (D, 2 B, size); (3 D, B, size)
    planes: tuple[Tensor, ...]  # (D, B, size) of numbers, of tangents, of the third

    def narrow(self, begin: int, end: int) -> Matrix:
        """These columns; for a product to read."""
        return self._replace(whole=self.whole[:, :, begin:end])

    @property
    def of_weight_tangent(self) -> Tensor | None:
        return self.planes[2] if len(self.planes) == 3 else None

    @property
    def row_step(self) -> int:
        return 2 if len(self.planes) == 2 else 1


def new_matrix(like: Tensor, directions: int, batch: int, size: int, planes: int) -> Matrix:
    """Of uninitialized memory."""
    if planes == 2:
        memory = like.new_empty((directions, batch, 2, size))
        return Matrix(memory.view(directions, 2 * batch, size), memory.unbind(2))
    memory = like.new_empty((directions, planes, batch, size))
    return Matrix(memory.view(planes * directions, batch, size), memory.unbind(1))


class Product:
    """result = operand @ weight, of every direction and the step's rows."""

    def __init__(self, operand: Matrix, weight: Tensor, result: Matrix) -> None:
        self.all, self.weight, self.row_step = (operand.whole, result.whole), weight, result.row_step
        (self.operand, self.result), self.rows = self.all, self.all[1].shape[1]

    def __call__(self, now: Now) -> None:
        rows = max(step[2] for step in now) * self.row_step
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

    hh: Tensor  # (D, G*H, R); as the third of three matrices its tangent
    bias_hh: Sequence[Sequence[Tensor] | None]  # of numbers and of tangents: (G*H) of each direction
    hr: Tensor | None  # (D, R, H), or three matrices


def _common(kernels: Kernels, part: int, layout: Layout, wide: bool, units: int) -> tuple[Any, ...]:
    """What the arguments of every kernel begin with."""
    return (*kernels[1:], part, layout.packed, wide, units, *addresses(layout.lengths, layout.resets))


def forward_step(
    kernels: Kernels,
    mode: str,
    layout: Layout,
    weights: Weights,
    pre: Planes,
    h: Matrix | None,
    c: Planes,
    h_next: Matrix,
    c_next: Planes,
    output: Planes,
    saved: Planes,
    saves_states: bool = False,
) -> list[Operation]:
    """What a step does: h (D, B, R) and c (D, B, H) before it, which may be None for zeros, h_next and c_next
    after it, which may be the same; c_next and c may be wide. pre (rows, D*G*H), output (T, B, D*R) and saved
    (D, rows, slots, H), or if `saves_states` (D, rows, H) of c. What lies behind lengths is left alone."""
    directions, batch, width = h_next.planes[0].shape
    hidden, planes = weights.hh.shape[1] // CELLS[mode].gates, len(h_next.planes)
    operations: list[Operation] = []
    none: Planes = [None, None]

    def new(size: int) -> Matrix:
        return new_matrix(h_next.whole, directions, batch, size, planes)

    def multiply(operand: Matrix | None, weight: Tensor) -> Matrix | None:
        if operand is None:
            return None
        result = new(weight.shape[1])
        operations.append(Product(operand, weight.transpose(1, 2), result))
        return result

    def finish(
        part: int,
        product: Matrix | None,
        h: Matrix | None,
        c: Planes,
        h_next: Matrix,
        c_next: Planes,
        output: Planes,
    ) -> None:
        units, dtype = h_next.planes[0].shape[2], h_next.whole.dtype
        wide = any(state is not None and state.dtype is not dtype for state in (c[0], c_next[0]))
        common = (*_common(kernels, part, layout, wide, units), saves_states, 0)
        common += (*addresses(pre[0], output[0]), *strides(output[0], 2))
        of_h, of_product = none if h is None else h.planes, none if product is None else product.planes
        tensors: list[Any] = []
        for p in range(min(planes, 2)):
            tensors += [of_product[p], weights.bias_hh[p], of_h[p], c[p]]
            tensors += [h_next.planes[p], c_next[p], saved[p]]
        kernel = kernels.module.cell_forward
        if planes > 1:
            kernel = kernels.module.cell_dual_forward
            common += (*addresses(pre[1], output[1]), *strides(output[1], 2), h_next.row_step)
            tensors += [None if product is None else product.of_weight_tangent, h_next.of_weight_tangent]
        operations.append(Launch(kernel, common, directions, *tensors))

    if mode == "GRU_RESET_BEFORE":
        wide = wide_dtype(h_next.whole)
        z = [torch.empty_like(plane, dtype=wide) for plane in h_next.planes[:2]]
        operand = new(width)
        product = multiply(h, weights.hh[:, : 2 * hidden])
        finish(FIRST, product, h, none, operand, z, none)
        product = multiply(operand, weights.hh[:, 2 * hidden :])
        finish(REST, product, h, z, h_next, none, output)
    elif weights.hr is not None:
        operand = new(hidden)
        product = multiply(h, weights.hh)
        finish(WHOLE, product, None, c, operand, c_next, none)
        product = multiply(operand, weights.hr)
        finish(REST, product, None, none, h_next, none, output)
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
    now = ((0, 0, batch, *NOTHING, False),)
    if mode == "GRU_RESET_BEFORE":
        layout = Layout(1, batch, None, False, None, None)
        weights = Weights(weight_hh.unsqueeze(0), [None if bias_hh is None else [bias_hh]], None)
        of_h, of_c, of_h_next, of_c_next, of_saved = (
            None if t is None else t.unsqueeze(0) for t in (h, c, h_next, c_next, saved)
        )
        states = (None if of_h is None else Matrix(of_h, (of_h,)), [of_c], Matrix(of_h_next, (of_h_next,)))
        for operation in forward_step(
            kernels, mode, layout, weights, [pre], *states, [of_c_next], [None], [of_saved]
        ):
            operation(now)
        return
    fused = h is not None and may_fuse(CELLS[mode], batch)
    product = None if fused or h is None else h @ weight_hh.t()
    of_rows_and_output = (0, 0), (0, 0, 0)  # no lengths or resets, and no output beside h_next
    common = (*kernels[1:], WHOLE, False, False, hidden, *of_rows_and_output[0], False)
    common += (*addresses(weight_hh if fused else None, pre), *of_rows_and_output[1])
    tensors = addresses(product, bias_hh, h, c, h_next, c_next, saved)
    kernels.module.cell_forward(common, (tensors,), now)


def forward(
    kernels: Kernels,
    mode: str,
    layout: Layout,
    weights: Weights,
    pre: Planes,
    h: Matrix,
    c: Planes,
    output: Planes,
    saved: Planes,
    saves_states: bool,
) -> None:
    """All steps. h (D, B, R) and c (D, B, H), wide, are the initial states, and the last ones afterwards;
    the rest as in forward_step."""
    operations = forward_step(kernels, mode, layout, weights, pre, h, c, h, c, output, saved, saves_states)
    for now in Rows(layout).forward(len(h.planes[0])):
        for operation in operations:
            operation(now)


class Gradients(NamedTuple):
    """What the backward pass fills, D directions and all rows; None: not wanted."""

    pre: Tensor  # (rows, D, G*H)
    previous: Tensor | None  # (D, rows, R) the states before each row
    candidate: Tensor | None  # (D, rows, H) of U_n h + b_n, GRU
    hidden: Tensor | None  # (D, rows, R) of h_t, projected LSTM
    h0: Tensor | None
    c0: Tensor | None
    operand: Tensor | None = None  # (D, rows, H) of the second product


class Given(NamedTuple):
    """What the backward pass reads of a plane, and the states' gradients, wide, that it carries along; what
    these hold when it returns is of no use."""

    h0: Tensor | None
    c0: Tensor | None
    output: Tensor
    saved: Tensor | None
    grad_output: Tensor | None
    grad_h: Tensor  # (D, B, R) of the last states
    grad_c: Tensor | None  # (D, B, H)


def backward(
    kernels: Kernels,
    mode: str,
    layout: Layout,
    weights: Weights,
    given: Sequence[Given],
    grad_clip: float,
    grads: Sequence[Gradients],
    planes: int = 1,
) -> None:
    """All steps. grad_clip bounds the gradients of states at each step; infinite: nothing does. Of dual
    numbers there are two `given` and two `grads`, and 2 or 3 `planes` of matrices: see Matrix."""
    output, none = given[0].output, [None] * len(given)
    grad_h, grad_output = [a.grad_h for a in given], [a.grad_output for a in given]
    previous, operand = [made.previous for made in grads], [made.operand for made in grads]
    directions, batch, width = grad_h[0].shape
    gates = grads[0].pre.shape[2]
    hidden, wide = gates // CELLS[mode].gates, grad_h[0].dtype is not output.dtype
    operations: list[Operation] = []

    def new(size: int) -> Matrix:
        return new_matrix(output, directions, batch, size, planes)

    def multiply(operand: Matrix, weight: Tensor) -> Matrix:
        result = new(weight.shape[2])
        operations.append(Product(operand, weight, result))
        return result

    def finish(
        part: int,
        units: int,
        grad: Planes,
        product: Matrix,
        grad_output: Planes,
        grad_product: Matrix,
        direct: Planes,
        previous: Planes = none,
        hidden: Planes = none,
        operand: Planes = none,
    ) -> None:
        common = (*_common(kernels, part, layout, wide, units), grad_clip)
        tensors: list[Any] = []
        for p, (a, made) in enumerate(zip(given, grads, strict=True)):
            common += (*addresses(made.pre, a.output), *strides(a.output, 2))
            common += (*addresses(grad_output[p]), *strides(grad_output[p], 3))
            tensors += [a.saved, a.h0, a.c0, grad[p], product.planes[p], a.grad_c, grad_product.planes[p]]
            tensors += [direct[p], a.grad_c, previous[p], made.candidate, hidden[p], operand[p]]
        kernel = kernels.module.cell_backward
        if planes > 1:
            kernel = kernels.module.cell_dual_backward
            common += (product.row_step,)
            tensors += [product.of_weight_tangent, grad_product.of_weight_tangent]
        operations.append(Launch(kernel, common, directions, *tensors))

    # What the step before made, but for rows that it did not have: zeros, or what their last step left.
    product, grad_product = new(width), new(gates)
    product.whole.zero_()
    whole = grad_product, weights.hh
    if mode == "GRU_RESET_BEFORE":
        split = 2 * hidden
        finish(FIRST, hidden, grad_h, product, grad_output, grad_product, grad_h, previous)
        of_operand = multiply(grad_product.narrow(split, gates), weights.hh[:, split:])
        finish(REST, hidden, none, of_operand, none, grad_product, grad_h, operand=operand)
        whole = grad_product.narrow(0, split), weights.hh[:, :split]
    elif weights.hr is not None:
        of_h, of_hidden = new(width), [made.hidden for made in grads]
        finish(FIRST, width, grad_h, product, grad_output, of_h, grad_h, previous, of_hidden)
        of_cell = multiply(of_h, weights.hr)
        finish(WHOLE, hidden, none, of_cell, none, grad_product, none, operand=operand)
    else:
        finish(WHOLE, hidden, grad_h, product, grad_output, grad_product, grad_h, previous)
    operations.append(Product(*whole, product))
    of_h0 = any(made.h0 is not None for made in grads)
    for s, now in enumerate(Rows(layout).backward(directions)):
        if s + 1 == layout.steps and not of_h0:
            operations.pop()
        for operation in operations:
            operation(now)
    for p, (a, made) in enumerate(zip(given, grads, strict=True)):
        if made.h0 is not None:
            total = a.grad_h.add_(product.planes[p])
            if p == 1 and product.of_weight_tangent is not None:
                total.add_(product.of_weight_tangent)
            made.h0.copy_(total)
        if made.c0 is not None and a.grad_c is not None:
            made.c0.copy_(a.grad_c)
