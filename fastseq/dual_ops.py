"""The operators of derivatives along a direction.

    recurrent_dual            what `recurrent` returns, and its tangent J(x) x' for tangents x' of arguments
    recurrent_tangents        that tangent alone, where what `recurrent` returned is known
    recurrent_dual_backward   what `recurrent_backward` returns, and its tangent; that alone, where the
                              gradient of h at every step is known

The first and the last run the kernels over numbers and tangents in one pass over time. With y = F(x) and its
gradients B(x, v) = J(x)^T v they are what first and second derivatives of F consist of; fastseq.autograd puts
them together. A tangent has the shape, dtype and device of its tensor, or is None where it is zero, and then
costs nothing.

The step of a cell is a sequence of one step. What else the arguments are, ops.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, cpu_dual, dual_loops, loops
from .checks import (
    Layer,
    check_batch_sizes,
    check_bounds,
    check_layer,
    check_like,
    check_rows,
    problem,
    unsupported,
)
from .dispatch import implementations, library, register
from .ops import _allocate_layer, _dense, allocate_gradients
from .steps import wide_dtype

_ARGUMENTS = (
    "Tensor input, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, Tensor? h0, Tensor? c0, "
    "Tensor[] weights"
)
_TANGENTS = "Tensor? input_tangent, Tensor? h0_tangent, Tensor? c0_tangent, Tensor?[] weight_tangents"
# `save`: whether gates are kept for recurrent_dual_backward. `truncate` cuts tangents where
# recurrent_backward cuts gradients: between the steps t - 1 and t where t is a multiple of it, if not 0.
# With grad_clip the results have no gradients: what would be bounded of those of tangents, nobody has said.
library.define(
    f"recurrent_dual({_ARGUMENTS}, {_TANGENTS}, str mode, int directions, bool bias, bool batch_first, "
    "int truncate, bool save, float? grad_clip=None) -> (Tensor output, Tensor h_n, Tensor c_n, "
    "Tensor saved, Tensor output_tangent, Tensor h_n_tangent, Tensor c_n_tangent, Tensor saved_tangent)"
)
# output and saved: of `recurrent` or recurrent_dual, with gates.
library.define(
    f"recurrent_tangents({_ARGUMENTS}, Tensor output, Tensor saved, {_TANGENTS}, str mode, int directions, "
    "bool bias, int truncate, bool save) -> (Tensor output_tangent, Tensor h_n_tangent, Tensor c_n_tangent, "
    "Tensor saved_tangent)"
)
# Returns those gradients of [input, h0, c0, *weights] that are wanted, then those tangents of gradients. With
# grad_hidden, what recurrent_backward keeps, those of tangents alone can be wanted.
library.define(
    "recurrent_dual_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
    f"Tensor? grad_output_tangent, Tensor? grad_h_n_tangent, Tensor? grad_c_n_tangent, {_ARGUMENTS}, "
    f"Tensor output, Tensor saved, {_TANGENTS}, Tensor output_tangent, Tensor saved_tangent, str mode, "
    "int directions, bool bias, float? grad_clip, int truncate, bool[] wanted, bool[] wanted_tangents, "
    "Tensor? grad_hidden=None) -> Tensor[]"
)


class Arguments(NamedTuple):
    """What a layer is given, or the tangents of it."""

    input: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor | None]


class Sequences(NamedTuple):
    """Which steps the rows have; see ops.py."""

    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None


def _check(
    values: Arguments, sequences: Sequences, tangents: Arguments, mode: str, directions: int, bias: bool
) -> Layer:
    input, h0, c0, weights = values
    batch_sizes, lengths, resets = sequences
    layer = check_layer(input, batch_sizes, h0, c0, weights, mode, directions, bias)
    if lengths is not None or resets is not None:
        check_rows(input, batch_sizes, lengths, resets, layer)
    if len(tangents.weights) != len(weights):
        raise RuntimeError(
            problem(
                f"{len(tangents.weights)} tangents of {len(weights)} weights",
                "a tangent or None for each weight",
                "[None] * len(weights), if no weight has a tangent",
            )
        )
    pairs = [("input", *pair) for pair in [(input, tangents.input)]]
    pairs += [("h0", h0, tangents.h0), ("c0", c0, tangents.c0)]
    pairs += [(f"weights[{i}]", *pair) for i, pair in enumerate(zip(weights, tangents.weights, strict=True))]
    for name, value, tangent in pairs:
        if tangent is None:
            continue
        if value is None:
            raise RuntimeError(
                problem(f"a tangent of {name}, which is None", "None for both", f"zeros as {name}")
            )
        check_like(f"the tangent of {name}", tangent, value.shape, f"that of {name}", input)
    return layer


# ------------------------------------------------------------------------------------------------- forwards


def _split_forward(arguments: Sequence[Any]) -> tuple[Arguments, Sequences, Arguments, tuple[Any, ...]]:
    input, batch_sizes, lengths, resets, h0, c0, weights, *tangents = arguments[:11]
    values, sequences = Arguments(input, h0, c0, weights), Sequences(batch_sizes, lengths, resets)
    return values, sequences, Arguments(*tangents), tuple(arguments[11:])


def _prepare(*arguments: Any) -> tuple[Layer, list[tuple[Tensor, ...]]]:
    values, sequences, tangents, constants = _split_forward(arguments)
    mode, directions, bias, batch_first, truncate, save = constants[:6]
    layer = _check(values, sequences, tangents, mode, directions, bias)
    check_bounds(None, truncate)
    results = [
        _allocate_layer(values.input, layer, batch_first, "gates" if save else "nothing") for _ in range(2)
    ]
    return layer, results


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, (results, tangents) = _prepare(*arguments)
    return (*results, *tangents)


def _dense_arguments(arguments: Arguments) -> Arguments:
    return Arguments(
        arguments.input,
        _dense(arguments.h0),
        _dense(arguments.c0),
        [_dense(weight) for weight in arguments.weights],
    )


def _run(run: Callable[..., None], *arguments: Any) -> tuple[Tensor, ...]:
    """Checks, allocates, has run(layer, sequences, planes, truncate) fill the results."""
    layer, results = _prepare(*arguments)
    values, sequences, tangents, constants = _split_forward(arguments)
    if sequences.batch_sizes is not None:
        check_batch_sizes(sequences.batch_sizes, layer)
    sequences = Sequences(_dense(sequences.batch_sizes), sequences.lengths, _dense(sequences.resets))
    planes = [(_dense_arguments(a), r) for a, r in zip((values, tangents), results, strict=True)]
    run(layer, sequences, planes, constants[4])
    return (*results[0], *results[1])


# ---------------------------------------------------------------------------------- tangents of known results


def _prepare_tangents(
    *given: Any,
) -> tuple[Layer, Arguments, Sequences, Arguments, Results, tuple[Tensor, ...]]:
    input, batch_sizes, lengths, resets, h0, c0, weights, output, saved = given[:9]
    tangents, (mode, directions, bias, truncate, save) = Arguments(*given[9:13]), given[13:]
    values, sequences = Arguments(input, h0, c0, weights), Sequences(batch_sizes, lengths, resets)
    results = Results(output, saved)
    layer = _check(values, sequences, tangents, mode, directions, bias)
    check_bounds(None, truncate)
    _check_results(results, "", layer, input)
    made = _allocate_layer(input, layer, False, "gates" if save else "nothing")
    return layer, values, sequences, tangents, results, made


def _fake_tangents(*given: Any) -> tuple[Tensor, ...]:
    return _prepare_tangents(*given)[-1]


def _run_tangents(*given: Any) -> tuple[Tensor, ...]:
    layer, values, sequences, tangents, known, made = _prepare_tangents(*given)
    if sequences.batch_sizes is not None:
        check_batch_sizes(sequences.batch_sizes, layer)
    sequences = Sequences(_dense(sequences.batch_sizes), sequences.lengths, _dense(sequences.resets))
    known = _readable(known)
    # A layer's own c_n is the room for c, which tangents need.
    results = (known.output, None, torch.empty_like(made[2]), known.saved)
    planes = [(_dense_arguments(values), results), (_dense_arguments(tangents), made)]
    cpu_dual.forward(layer, sequences, planes, given[-2], known=True)
    return made


# ------------------------------------------------------------------------------------------------ gradients


def multiplies_by_tangents(layer: Layer, of_weights: Sequence[Tensor | None]) -> bool:
    """Whether weights that a step multiplies by, weight_hh or weight_hr, have tangents."""
    count = len(of_weights) // layer.directions
    of_directions = [of_weights[i : i + count] for i in range(0, len(of_weights), count)]
    return any(d[1] is not None or (layer.projected and d[-1] is not None) for d in of_directions)


class Results(NamedTuple):
    """What a layer's forward pass made, or the tangents of it, as the backward pass reads it."""

    output: Tensor
    saved: Tensor


class Cotangents(NamedTuple):
    """Gradients of a layer's results, or the tangents of them."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None


class Backward(NamedTuple):
    """The arguments of recurrent_dual_backward, those of each plane together."""

    cotangents: tuple[Cotangents, Cotangents]
    arguments: tuple[Arguments, Arguments]
    sequences: Sequences
    results: tuple[Results, Results]
    mode: str
    directions: int
    bias: bool
    grad_clip: float | None
    truncate: int
    wanted: tuple[Sequence[bool], Sequence[bool]]
    grad_hidden: Tensor | None


def split_backward(given: Sequence[Any]) -> Backward:
    cotangents = Cotangents(*given[:3]), Cotangents(*given[3:6])
    input, batch_sizes, lengths, resets, h0, c0, weights, output, saved = given[6:15]
    *tangents, output_tangent, saved_tangent = given[15:21]
    return Backward(
        cotangents,
        (Arguments(input, h0, c0, weights), Arguments(*tangents)),
        Sequences(batch_sizes, lengths, resets),
        (Results(output, saved), Results(output_tangent, saved_tangent)),
        *given[21:26],
        tuple(given[26:28]),
        given[28] if len(given) > 28 else None,  # torch leaves out what is the default
    )


MEANING = "that of the forward pass"


def _check_results(results: Results, suffix: str, layer: Layer, input: Tensor) -> None:
    d, hidden, slots = layer.directions, layer.hidden_size, layer.cell.saved
    check_like(f"output{suffix}", results.output, (*input.shape[:-1], d * layer.width), MEANING, input)
    saved = (d, layer.rows, slots, hidden) if slots else (0,)
    check_like(f"saved{suffix}", results.saved, saved, MEANING, input)


def _readable(results: Results) -> Results:
    """As the kernels made them, unless a hook on saved tensors laid them out anew."""
    output, saved = results
    return Results(output if output.stride(-1) == 1 else output.contiguous(), saved.contiguous())


def _prepare_backward(*given: Any) -> tuple[Backward, Layer, list[list[Tensor | None]]]:
    a = split_backward(given)
    values = a.arguments[0]
    input = values.input
    layer = _check(values, a.sequences, a.arguments[1], a.mode, a.directions, a.bias)
    check_bounds(a.grad_clip, a.truncate)
    d, hidden = layer.directions, layer.hidden_size
    for suffix, results, cotangents in zip(("", "_tangent"), a.results, a.cotangents, strict=True):
        _check_results(results, suffix, layer, input)
        shapes = (a.results[0].output.shape, (d, layer.batch, layer.width), (d, layer.batch, hidden))
        for name, grad, like in zip(cotangents._fields, cotangents, shapes, strict=True):
            if grad is not None:
                check_like(f"grad_{name}{suffix}", grad, like, MEANING, input)
    if a.grad_hidden is not None:
        sums = input.new_empty(0, dtype=wide_dtype(input))
        meaning = "that of the backward pass"
        check_like("grad_hidden", a.grad_hidden, (d, layer.rows, layer.width), meaning, sums)
        if any(a.wanted[0]):
            raise RuntimeError(
                problem(
                    "grad_hidden, and gradients that are wanted",
                    "with grad_hidden tangents of gradients alone",
                    "[False] * len(wanted), or grad_hidden=None",
                )
            )
    grads = [allocate_gradients(input, values.h0, values.c0, values.weights, wanted) for wanted in a.wanted]
    return a, layer, grads


def _fake_backward(*given: Any) -> list[Tensor]:
    *_, grads = _prepare_backward(*given)
    return [grad for plane in grads for grad in plane if grad is not None]


def _run_backward(run: Callable[..., None], *given: Any) -> list[Tensor]:
    """Checks, allocates, has run(layer, sequences, planes, grad_clip, truncate, grad_hidden) fill the
    gradients."""
    a, layer, grads = _prepare_backward(*given)
    if a.sequences.batch_sizes is not None:
        check_batch_sizes(a.sequences.batch_sizes, layer)
    sequences = Sequences(_dense(a.sequences.batch_sizes), a.sequences.lengths, _dense(a.sequences.resets))
    if any(x is not None and x.stride(-1) != 1 for x in (a.arguments[0].input, a.arguments[1].input)):
        # The kernel reads both with one stride of features.
        a = a._replace(arguments=tuple(x._replace(input=_dense(x.input)) for x in a.arguments))
    planes = [
        (
            Cotangents(cotangents.output, _dense(cotangents.h_n), _dense(cotangents.c_n)),
            _dense_arguments(arguments),
            _readable(results),
            of_plane,
        )
        for cotangents, arguments, results, of_plane in zip(
            a.cotangents, a.arguments, a.results, grads, strict=True
        )
    ]
    run(layer, sequences, planes, a.grad_clip, a.truncate, _dense(a.grad_hidden))
    return [grad for plane in grads for grad in plane if grad is not None]


# --------------------------------------------------------------------------------------------- registration


OPERATORS = ("recurrent_dual", "recurrent_dual_backward")


class Kernels(NamedTuple):
    """The two operators on one device.

    plan(layer, dtype, device, packed, of_weights, backward), for fastseq.explain: what such a call runs, as
    in ops.Kernels; of_weights: whether weights that a step multiplies by have tangents.
    """

    recurrent_dual: Callable[..., Any]
    recurrent_dual_backward: Callable[..., Any]
    plan: Callable[..., dict[str, Any]]


def loop_kernels(engine: loops.Engine) -> Kernels:
    """The operators where time loops run on `engine`."""
    return Kernels(
        partial(_run, partial(dual_loops.forward, engine)),
        partial(_run_backward, partial(dual_loops.backward, engine)),
        partial(dual_loops.plan_in_data, engine),
    )


KERNELS = {
    "cpu": Kernels(
        partial(_run, cpu_dual.forward),
        partial(_run_backward, cpu_dual.backward),
        cpu_dual.plan_in_data,
    )
}
if _C.cuda_info()["built"]:
    KERNELS["cuda"] = loop_kernels(loops.CUDA)

# Of what is known tangents are made on the CPU alone: see ops.Kernels.keeps.
recurrent_tangents = register("recurrent_tangents", {"cpu": _run_tangents}, _fake_tangents, unsupported)
recurrent_dual, recurrent_dual_backward = (
    register(name, implementations(KERNELS, name), fake, unsupported)
    for name, fake in zip(OPERATORS, (_fake, _fake_backward), strict=True)
)
