"""The operators of dual_ops.py on CUDA: as loops.py, with time loops in steps (steps.py) over dual numbers.

    forward   pre = x W_ih^T + b_ih and its tangent x' W_ih^T + x W_ih'^T + b_ih' for all steps, then the loop
    backward  the loop, which makes the gradients of pre and of U h and their tangents, then the products that
              give the gradients of input and weights, and by the product's rule their tangents

A plane is what belongs to the numbers, or to their tangents; dual_ops.py says what is in one, and has checked
it. What has no tangent is in no product. Nothing in here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import precision, steps
from .checks import Layer
from .loops import (
    Engine,
    Rows,
    _by_direction,
    _cell_kernels,
    _Direction,
    _if_any,
    _joined,
    _layout,
    _plainly,
    _rows_of,
    _stacked,
    _without,
)

Pair = Sequence[Tensor | None]  # a tensor and its tangent


def plan_in_data(
    engine: Engine,
    layer: Layer,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    of_weights: bool,
    backward: bool,
) -> dict[str, Any]:
    """What the engine does with a call; see dual_ops.Kernels.plan."""
    partition = {"planes": 3 if of_weights else 2}
    kernel = "steps" if layer.rows else "none"
    facts = engine.facts(device.index or 0)
    return {"engine": "dual_loop", "kernel": kernel, "partition": partition, "facts": facts}


def forward(engine: Engine, layer: Layer, sequences: Any, planes: Sequence[Any], truncate: int) -> None:
    """Fills output, h_n, c_n and saved of each plane."""
    if layer.rows:
        _forward(engine, layer, planes[0][0].input, sequences, planes, truncate)


@_plainly
def _forward(
    engine: Engine,
    layer: Layer,
    input: Tensor,
    sequences: Any,
    planes: Sequence[Any],
    truncate: int,
) -> None:
    batch_sizes, lengths, resets = sequences
    given = _rows_of(layer, lengths, resets, input.device)
    arguments, results = zip(*planes, strict=True)
    if lengths is not None:
        for output, _, _, saved in results:
            output.zero_()
            saved.zero_()  # what lies behind the ends is multiplied by gradients of zero
    directions = [_by_direction(a.weights, layer) for a in arguments]
    weights, count = _weights(directions)
    h = steps.new_matrix(input, layer.directions, layer.batch, layer.width, count)
    c: steps.Planes = [None, None]
    if layer.cell.cell_state:
        c = [torch.empty_like(c_n, dtype=steps.wide_dtype(c_n)) for _, _, c_n, _ in results]
    for p, a in enumerate(arguments):
        _fill(h.planes[p], given.first(a.h0, layer))
        _fill(c[p], given.first(a.c0, layer))
    _fill(h.of_weight_tangent, h.planes[0])
    kernels, layout = _cell_kernels(engine, layer, input), _layout(layer, batch_sizes, given, truncate)
    kept = [r[0] for r in results], [_if_any(r[3]) for r in results], False
    with precision.products(precision.of_recurrent_networks(input.dtype)):
        pre = _projected_inputs(layer, [a.input for a in arguments], directions)
        steps.forward(kernels, layer.mode, layout, weights, pre, h, c, *kept)
    for p, (_, h_n, c_n, _) in enumerate(results):
        h_n.copy_(h.planes[p])
        if c[p] is not None:
            c_n.copy_(c[p])


def _fill(to: Tensor | None, from_: Tensor | None) -> None:
    if to is not None:
        to.zero_() if from_ is None else to.copy_(from_)


def _tangents(parts: Sequence[Tensor | None], of: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Those of tensors that belong together, zeros where one has none; None if all have none."""
    if all(part is None for part in parts):
        return None
    return [torch.zeros_like(x) if t is None else t for t, x in zip(parts, of, strict=True) if x is not None]


def _of_weights(directions: Sequence[Sequence[_Direction]], name: str) -> tuple[Any, Any]:
    """Of each direction, and their tangents; None if there are none."""
    values, tangents = ([getattr(d, name) for d in plane] for plane in directions)
    return None if values[0] is None else values, _tangents(tangents, values)


def _weights(directions: Sequence[Sequence[_Direction]]) -> tuple[steps.Weights, int]:
    """Those of the loop, and how many planes its matrices have: see steps.Matrix."""
    hh, bias_hh, hr = (_of_weights(directions, name) for name in ("weight_hh", "bias_hh", "weight_hr"))
    if hh[1] is None and hr[1] is None:
        return steps.Weights(_stacked(hh[0]), bias_hh, None if hr[0] is None else _stacked(hr[0])), 2

    def three(values: Sequence[Tensor] | None, tangents: Sequence[Tensor] | None) -> Tensor | None:
        if values is None:
            return None
        tangents = [torch.zeros_like(x) for x in values] if tangents is None else tangents
        return torch.stack([x for u, t in zip(values, tangents, strict=True) for x in (u, u, t)])

    return steps.Weights(three(*hh), bias_hh, three(*hr)), 3


def _projected_inputs(
    layer: Layer, inputs: Pair, directions: Sequence[Sequence[_Direction]]
) -> list[Tensor | None]:
    """pre (rows, D*G*H) and its tangent."""
    x, along = (None if x is None else x.reshape(layer.rows, layer.input_size) for x in inputs)
    weight, of_weight = (None if w is None else _joined(w) for w in _of_weights(directions, "weight_ih"))
    bias, of_bias = (None if b is None else _joined(b) for b in _of_weights(directions, "bias_ih"))
    pre = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    tangent = of_bias
    for a, b in ((along, weight), (x, of_weight)):
        if a is not None and b is not None:
            tangent = a @ b.t() if tangent is None else torch.addmm(tangent, a, b.t())
    if tangent is not None and tangent.dim() == 1:
        tangent = tangent.expand_as(pre).contiguous()
    return [pre, tangent]


def backward(
    engine: Engine,
    layer: Layer,
    sequences: Any,
    planes: Sequence[Any],
    grad_clip: float | None,
    truncate: int,
    _: Tensor | None,
) -> None:
    """Fills the gradients of each plane, those of numbers too, whether or not that of h is known."""
    if layer.rows:
        _backward(engine, layer, planes[0][1].input, sequences, planes, grad_clip, truncate)
        return
    for grad in (*planes[0][3], *planes[1][3]):
        _fill(grad, None)


@_plainly
def _backward(
    engine: Engine,
    layer: Layer,
    input: Tensor,
    sequences: Any,
    planes: Sequence[Any],
    grad_clip: float | None,
    truncate: int,
) -> None:
    batch_sizes, lengths, resets = sequences
    given = _rows_of(layer, lengths, resets, input.device)
    cotangents, arguments, results, grads = zip(*planes, strict=True)
    directions = [_by_direction(a.weights, layer) for a in arguments]
    wanted = [_by_direction(of_plane[3:], layer) for of_plane in grads]
    made = _allocate(layer, input, grads, wanted, lengths is not None)
    wide = input.new_empty(0, dtype=steps.wide_dtype(input))
    of_loop = []
    for of_last, a, (output, saved) in zip(cotangents, arguments, results, strict=True):
        h0, c0 = given.first(a.h0, layer), given.first(a.c0, layer)
        grad_h, grad_c = wide.new_empty((layer.directions, layer.batch, layer.width)), None
        _fill(grad_h, of_last.h_n)
        if layer.cell.cell_state:
            grad_c = wide.new_empty((layer.directions, layer.batch, layer.hidden_size))
            _fill(grad_c, of_last.c_n)
        of_loop.append(steps.Given(h0, c0, output, _if_any(saved), of_last.output, grad_h, grad_c))
    kernels, layout = _cell_kernels(engine, layer, input), _layout(layer, batch_sizes, given, truncate)
    weights, count = _weights(directions)
    clip = math.inf if grad_clip is None else grad_clip
    with precision.products(precision.of_recurrent_networks(input.dtype)):
        steps.backward(kernels, layer.mode, layout, weights, of_loop, clip, made, count)
        _gradients_of_arguments(layer, given, arguments, directions, made, wanted, grads)


def _allocate(
    layer: Layer,
    like: Tensor,
    grads: Sequence[Sequence[Tensor | None]],
    wanted: Sequence[Sequence[_Direction]],
    zero: bool,
) -> list[steps.Gradients]:
    """What the loop leaves of each plane. A tangent of a gradient needs what the gradient does of numbers."""
    rows, count, hidden, width = layer.rows, layer.directions, layer.hidden_size, layer.width
    gates, mode = layer.cell.gates * hidden, layer.mode

    def any_wanted(p: int, *names: str) -> bool:
        return any(getattr(d, name) is not None for of in wanted[p:] for d in of for name in names)

    def new(when: bool, *shape: int) -> Tensor | None:
        if not when:
            return None
        # Nothing is made behind the ends.
        return like.new_zeros(shape) if zero else like.new_empty(shape)

    made = []
    for p, (_, grad_h0, grad_c0, *_) in enumerate(grads):
        hh, hr = any_wanted(p, "weight_hh"), any_wanted(p, "weight_hr")
        of_u = mode == "GRU" and any_wanted(p, "weight_hh", "bias_hh")
        two = hr or (mode == "GRU_RESET_BEFORE" and hh)
        made.append(
            steps.Gradients(
                new(True, rows, count, gates),
                new(hh, count, rows, width),
                new(of_u, count, rows, hidden),
                new(hr, count, rows, width),
                grad_h0,
                grad_c0,
                new(two, count, rows, hidden),
            )
        )
    return made


def _gradients_of_arguments(
    layer: Layer,
    given: Rows,
    arguments: Sequence[Any],
    directions: Sequence[Sequence[_Direction]],
    made: Sequence[steps.Gradients],
    wanted: Sequence[Sequence[_Direction]],
    grads: Sequence[Sequence[Tensor | None]],
) -> None:
    rows = layer.rows
    for _, grad_h0, grad_c0, *_ in grads:
        given.finish(grad_h0, layer)
        given.finish(grad_c0, layer)
    to = [of_plane[0] for of_plane in grads]
    if to[0] is not None or to[1] is not None:
        weight = [None if w is None else _joined(w) for w in _of_weights(directions, "weight_ih")]
        _products([of_plane.pre.view(rows, -1) for of_plane in made], weight, to)
        for grad in to:
            if grad is not None and given.behind is not None:
                grad.masked_fill_(given.behind.unsqueeze(2), 0)
    inputs = [None if a.input is None else _without(a.input, given.behind) for a in arguments]
    x = [None if x is None else x.reshape(rows, layer.input_size) for x in inputs]
    for i in range(layer.directions):
        _weight_gradients(layer.mode, i, x, made, [of_plane[i] for of_plane in wanted])


def _weight_gradients(
    mode: str, direction: int, x: Pair, made: Sequence[steps.Gradients], wanted: Sequence[_Direction]
) -> None:
    def of(name: str) -> Pair:
        tensors = [getattr(of_plane, name) for of_plane in made]
        return [None if tensor is None else tensor[direction] for tensor in tensors]

    def part(pair: Pair, begin: int, end: int, dim: int) -> Pair:
        return [None if tensor is None else tensor.narrow(dim, begin, end - begin) for tensor in pair]

    d = [of_plane.pre[:, direction] for of_plane in made]
    _products(_transposed(d), x, [w.weight_ih for w in wanted])
    _sums(d, [w.bias_ih for w in wanted])
    # The candidate of a GRU has its own gradient, or its own operand, on the recurrent side.
    gates = d[0].shape[1]
    split = gates // 3 * 2 if mode.startswith("GRU") else gates
    h, hh, bias_hh = of("previous"), [w.weight_hh for w in wanted], [w.bias_hh for w in wanted]
    first = part(d, 0, split, 1)
    _products(_transposed(first), h, part(hh, 0, split, 0))
    _sums(first, part(bias_hh, 0, split, 0))
    if split < gates:
        last = of("candidate") if mode == "GRU" else part(d, split, gates, 1)
        _products(_transposed(last), h if mode == "GRU" else of("operand"), part(hh, split, gates, 0))
        _sums(last, part(bias_hh, split, gates, 0))
    _products(_transposed(of("hidden")), of("operand"), [w.weight_hr for w in wanted])


def _transposed(pair: Pair) -> Pair:
    return [None if tensor is None else tensor.t() for tensor in pair]


def _sums(pair: Pair, to: Pair) -> None:
    for tensor, out in zip(pair, to, strict=True):
        if out is not None:
            torch.sum(tensor, 0, out=out)


def _products(a: Pair, b: Pair, to: Pair) -> None:
    """a b, and its tangent a' b + a b', where wanted; b' may be None. `to` may have more dimensions."""
    if to[0] is not None:
        _sum_of_products([(a[0], b[0])], to[0])
    if to[1] is not None:
        _sum_of_products([(a[1], b[0]), (a[0], b[1])], to[1])


def _sum_of_products(factors: Sequence[tuple[Any, Any]], out: Tensor) -> None:
    (a, b), *others = factors
    total = torch.mm(a, b, out=out.view(len(a), b.shape[1])) if out.is_contiguous() else a @ b
    for a, b in others:
        if b is not None:
            total.addmm_(a, b)
    if not out.is_contiguous():
        out.copy_(total.view(out.shape))
