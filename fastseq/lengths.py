"""Rows of unequal lengths on the CPU: the rows that exist, longest first, are a packed sequence.

The kernels then run real steps only. Rows are copied, once each way, which takes a small part of a step's
time; where no row is shorter than the input nothing is copied at all.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import Layer, check_lengths

_PAGES = 32 << 20  # From so many bytes on the system's allocator takes new pages too.


class Packing(NamedTuple):
    """Where the steps of a padded (T, B, ..) tensor lie in its packed form."""

    batch_sizes: Tensor  # int64 (steps of the longest row)
    order: Tensor  # the rows of the batch that have a step, longest first
    steps: Tensor  # of each packed row
    rows: Tensor  # of the batch, of each packed row

    @property
    def size(self) -> int:
        return len(self.rows)

    def packed(self, tensor: Tensor) -> Tensor:
        """(rows, features) of (T, B, features), of any strides; of (T, B) alone (rows)."""
        return tensor[self.steps, self.rows]

    def pad(self, packed: Tensor, to: Tensor) -> None:
        """Fills (T, B, features) from (rows, features), with zeros behind the ends."""
        to.zero_()
        to.index_put_((self.steps, self.rows), packed)

    def clear_rest(self, saved: Tensor) -> None:
        """Of (D, T * B, ...), before the kernels fill it, what no row does: nothing reads it, but it is a
        result, and the same in each call."""
        if saved.dim() == 1:  # of an RNN, nothing
            return
        if saved.nbytes < _PAGES:
            saved[:, self.size :].zero_()
            return
        # New pages are zeros, which take neither time nor memory until something is written to them.
        pages = mmap.mmap(-1, saved.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        saved.set_(torch.frombuffer(pages, dtype=saved.dtype).view_as(saved))

    def of_state(self, state: Tensor | None) -> Tensor | None:
        """(D, B, size) with the rows of `order`."""
        return None if state is None else state.index_select(1, self.order)


def packing(lengths: Tensor, steps: int) -> Packing | None:
    """None if every row has all steps. Raises RuntimeError for lengths that are not in 0..steps."""
    values = lengths.tolist()
    check_lengths(values, steps)
    if min(values, default=steps) == steps:
        return None
    lengths, order = lengths.to("cpu", torch.int64).sort(descending=True, stable=True)
    alive = lengths > torch.arange(int(lengths[0]), device="cpu").unsqueeze(1)
    batch_sizes = alive.sum(1)
    at_step, rank = alive.nonzero(as_tuple=True)
    order = order[: int(batch_sizes[0]) if len(batch_sizes) else 0]
    return Packing(batch_sizes, order, at_step, order[rank])


def _of_rows(layer: Layer, packing: Packing) -> Layer:
    """The layer as the kernels see it."""
    return layer._replace(steps=len(packing.batch_sizes), batch=len(packing.order), rows=packing.size)


def padded_forward(
    run: Callable[..., None],
    layer: Layer,
    mode: str,
    input: Tensor,
    lengths: Tensor,
    resets: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    save: str,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    saved: Tensor,
) -> None:
    """Has run(...), which takes what this does and batch_sizes before lengths, fill the results."""
    p = packing(lengths, layer.steps)
    if p is None:
        run(layer, mode, input, None, None, resets, h0, c0, weights, save, output, h_n, c_n, saved)
        return
    p.clear_rest(saved)
    results = output.new_empty((p.size, output.shape[2])), p.of_state(h_n), c_n
    if layer.cell.cell_state:
        results = (*results[:2], p.of_state(c_n))
    run(
        _of_rows(layer, p),
        mode,
        p.packed(input),
        p.batch_sizes,
        None,
        None if resets is None else p.packed(resets),
        p.of_state(h0),
        p.of_state(c0),
        weights,
        save,
        *results,
        saved,
    )
    p.pad(results[0], output)
    for state, first, last in ((h_n, h0, results[1]), (c_n, c0, results[2])):
        if state.dim() == 3:
            state.zero_() if first is None else state.copy_(first)  # of rows without a step
            state.index_copy_(1, p.order, last)


def padded_backward(
    run: Callable[..., None],
    layer: Layer,
    mode: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    lengths: Tensor,
    resets: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    saved: Tensor,
    grad_clip: float | None,
    truncate: int,
    grads: Sequence[Tensor | None],
    *kept: Tensor | None,
) -> None:
    """Has run(...), which takes what this does and batch_sizes before lengths, fill `grads`, and what is
    `kept`, whose rows lie as those of saved."""
    p = packing(lengths, layer.steps)
    bounds: tuple[Any, ...] = (grad_clip, truncate)
    if p is None:
        gradients = (grad_output, grad_h_n, grad_c_n)
        states = (resets, h0, c0, weights, output, saved)
        run(layer, mode, *gradients, input, None, None, *states, *bounds, grads, *kept)
        return
    grad_input, grad_h0, grad_c0, *grad_weights = grads
    for tensor in kept:
        if tensor is not None:
            p.clear_rest(tensor)
    packed_input = p.packed(input)
    run(
        _of_rows(layer, p),
        mode,
        None if grad_output is None else p.packed(grad_output),
        p.of_state(grad_h_n),
        p.of_state(grad_c_n),
        packed_input,
        p.batch_sizes,
        None,
        None if resets is None else p.packed(resets),
        p.of_state(h0),
        p.of_state(c0),
        weights,
        p.packed(output),
        saved,
        *bounds,
        packed := [
            None if grad_input is None else torch.empty_like(packed_input),
            p.of_state(grad_h0),
            p.of_state(grad_c0),
            *grad_weights,
        ],
        *kept,
    )
    if grad_input is not None:
        p.pad(packed[0], grad_input)
    for of_first, of_last, made in ((grad_h0, grad_h_n, packed[1]), (grad_c0, grad_c_n, packed[2])):
        if of_first is not None:
            of_first.zero_() if of_last is None else of_first.copy_(of_last)  # of rows without a step
            of_first.index_copy_(1, p.order, made)
