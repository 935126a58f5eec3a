"""Derivatives along a direction, and second derivatives, of recurrent layers and cells.

With y = F(x) and the gradients B(x, v) = J(x)^T v, two operators make all of them (see fastseq.dual_ops): the
dual forward pass, F and its tangent J(x) x', and the dual backward pass, B and its tangent. Where the
numbers are known, because the passes without tangents kept them, both make the tangent alone.

    jvp of F       the dual forward pass
    jvp of B       the dual backward pass
    vjp of B       for cotangents u:  of v it is J(x) u, of x the derivative of B(x + e u, v) by e
    vjp of J x'    for cotangents w:  of x' it is B(x, w), of x the derivative of B(x + e x', w) by e

Third derivatives are errors, and so is forward mode over forward mode.

Sequences are (input, batch_sizes, lengths, resets, h0, c0), layers (mode, directions, bias). The step of a
cell is taken for a sequence of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import dual_ops, ops
from ..checks import CELLS, problem
from ..dispatch import make_dual, unpack_dual
from .function import Function, each_entry, is_batched, needed

Tensors = Sequence[Tensor | None]
LOOP = "a loop of torch operations over time"  # what has all derivatives


def _as_sequence(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def is_one_step(sequence: Tensors) -> bool:
    return sequence[0].dim() == 2 and sequence[1] is None


def are_readable(input: Tensor) -> bool:
    """Whether tangents_of_known reads what the forward pass has kept."""
    kernels = ops.KERNELS.get(input.device.type)
    return kernels is not None and kernels.keeps


def forward(
    sequence: Tensors,
    weights: Sequence[Tensor],
    tangents: Tensors,
    layer: tuple[str, int, bool],
    batch_first: bool,
    truncate: int,
    save: bool,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    """What recurrent_dual returns; `tangents`: of input, h0, c0, *weights."""
    if any(map(is_batched, tangents)):
        options = (layer, batch_first, truncate, save, grad_clip)
        values = forward(sequence, weights, [None] * len(tangents), *options)
        along = each_entry(lambda entry: forward(sequence, weights, entry, *options)[4:], tangents)
        return (*values[:4], *along)
    if is_one_step(sequence):
        sequence = [_as_sequence(x) for x in sequence]
        tangents = [*map(_as_sequence, tangents[:3]), *tangents[3:]]
    of_arguments, of_weights = tangents[:3], list(tangents[3:])
    return dual_ops.recurrent_dual(
        *sequence, list(weights), *of_arguments, of_weights, *layer, batch_first, truncate, save, grad_clip
    )


def tangents_of_known(
    sequence: Tensors,
    weights: Sequence[Tensor],
    output: Tensor,
    saved: Tensor,
    tangents: Tensors,
    layer: tuple[str, int, bool],
    truncate: int,
    save: bool,
) -> tuple[Tensor, ...]:
    """What forward() returns, of a layer whose output and gates are there; None for other numbers."""
    if any(map(is_batched, tangents)):
        options = (layer, truncate, save)
        along = each_entry(
            lambda entry: tangents_of_known(sequence, weights, output, saved, entry, *options)[4:], tangents
        )
    else:
        if is_one_step(sequence):
            sequence = [_as_sequence(x) for x in sequence]
            tangents = [*map(_as_sequence, tangents[:3]), *tangents[3:]]
        of_arguments, of_weights = tangents[:3], list(tangents[3:])
        given = (*sequence, list(weights), output, saved, *of_arguments, of_weights)
        along = dual_ops.recurrent_tangents(*given, *layer, truncate, save)
    return output, None, None, saved, *along


def backward(
    cotangents: Tensors,
    cotangents_tangents: Tensors,
    sequence: Tensors,
    weights: Sequence[Tensor],
    results: Tensors,
    tangents: Tensors,
    layer: tuple[str, int, bool],
    grad_clip: float | None,
    truncate: int,
    wanted: Sequence[bool],
    wanted_tangents: Sequence[bool],
    grad_hidden: Tensor | None = None,
) -> list[list[Tensor | None]]:
    """The gradients, and the tangents of gradients, of input, h0, c0, *weights; None where not wanted.

    cotangents: of output, h_n, c_n. results: output, saved, output_tangent, saved_tangent, of a sequence.
    grad_hidden: see recurrent_dual_backward.
    """
    moving = (*cotangents, *cotangents_tangents, *results[2:], *tangents)
    if any(map(is_batched, moving)):
        bounds, options = (layer, grad_clip, truncate), (wanted, wanted_tangents, grad_hidden)
        values = results[:2]

        def of_entry(moving: Tensors) -> Tensors:
            states, along = (*values, *moving[6:8]), moving[8:]
            planes = backward(moving[:3], moving[3:6], sequence, weights, states, along, *bounds, *options)
            return [*planes[0], *planes[1]]

        grads = each_entry(of_entry, moving)
        return [grads[: len(tangents)], grads[len(tangents) :]]
    one_step = is_one_step(sequence)
    if one_step:
        sequence = [_as_sequence(x) for x in sequence]
        tangents = [*map(_as_sequence, tangents[:3]), *tangents[3:]]
        cotangents, cotangents_tangents = (
            [_as_sequence(x) for x in plane] for plane in (cotangents, cotangents_tangents)
        )
    of_arguments, of_weights = tangents[:3], list(tangents[3:])
    grads = iter(
        dual_ops.recurrent_dual_backward(
            *cotangents,
            *cotangents_tangents,
            *sequence,
            list(weights),
            *results[:2],
            *of_arguments,
            of_weights,
            *results[2:],
            *layer,
            grad_clip,
            truncate,
            list(wanted),
            list(wanted_tangents),
            *(() if grad_hidden is None else (grad_hidden,)),
        )
    )
    planes = [[next(grads) if want else None for want in plane] for plane in (wanted, wanted_tangents)]
    if one_step:
        planes = [[x if x is None or i > 2 else x.squeeze(0) for i, x in enumerate(p)] for p in planes]
    return planes


def _arguments_of(sequence: Tensors, weights: Sequence[Tensor]) -> list[Tensor | None]:
    return [sequence[0], *sequence[4:6], *weights]


# ------------------------------------------------------------------------------ the operators' gradients


class RecurrentDual(Function):
    """Reverse over forward mode."""

    @staticmethod
    def forward(
        mode: str,
        directions: int,
        bias: bool,
        batch_first: bool,
        truncate: int,
        save: bool,
        grad_clip: float | None,
        *tensors: Tensor | None,  # sequence, *weights, tangents
    ) -> tuple[Tensor, ...]:
        sequence, weights, tangents = _split(tensors)
        return forward(sequence, weights, tangents, (mode, directions, bias), batch_first, truncate, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        mode, directions, bias, _, truncate, _, grad_clip, *tensors = inputs
        output, _, c_n, saved, output_tangent, _, c_n_tangent, saved_tangent = outputs
        ctx.save_for_backward(*tensors, output, saved, output_tangent, saved_tangent)
        ctx.constants, ctx.grad_clip = (mode, directions, bias, truncate), grad_clip
        ctx.set_materialize_grads(False)
        of_cells = () if CELLS[mode].cell_state else (c_n, c_n_tangent)
        ctx.mark_non_differentiable(saved, saved_tangent, *of_cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.grad_clip is not None:
            refuse_bounded()
        *layer, truncate = ctx.constants
        *tensors, output, saved, output_tangent, saved_tangent = ctx.saved_tensors
        sequence, weights, tangents = _split(tensors)
        of_results, of_tangents = list(grads[:3]), list(grads[4:7])
        if not CELLS[layer[0]].cell_state:  # a graph has gradients even of what is not differentiable
            of_results[2] = of_tangents[2] = None
        needs = needed(ctx)[7:]
        of_values = [needs[0], needs[4], needs[5], *needs[6 : 6 + len(weights)]]
        of_directions = list(needs[6 + len(weights) :])
        gradients_of_tangents, gradients_of_values = backward(
            of_tangents,
            of_results,
            sequence,
            weights,
            (output, saved, output_tangent, saved_tangent),
            tangents,
            tuple(layer),
            None,
            truncate,
            of_directions,
            of_values,
        )
        of_input, of_h0, of_c0, *of_weights = gradients_of_values
        return (*[None] * 7, of_input, None, None, None, of_h0, of_c0, *of_weights, *gradients_of_tangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_more("forward mode over forward mode", "torch.func.jacrev, or reverse mode, for one of both")


class RecurrentDualBackward(Function):
    """Gradients and their tangents, whose own derivatives would be third ones."""

    @staticmethod
    def forward(constants: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        count = (len(tensors) - 20) // 2  # weights
        before, weights, rest = tensors[:12], tensors[12 : 12 + count], tensors[12 + count :]
        results, of_arguments, of_weights = rest[:2], rest[2:5], rest[5 : 5 + count]
        *of_results, grad_hidden = rest[5 + count :]
        tangents = (*of_arguments, list(of_weights), *of_results)
        given = (*before, list(weights), *results, *tangents, *constants)
        return tuple(dual_ops.recurrent_dual_backward(*given, grad_hidden))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_more("a third derivative", LOOP)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_more("a third derivative", LOOP)


def _split(tensors: Tensors) -> tuple[list[Any], list[Any], list[Any]]:
    """Sequence, weights, and as many tangents as there are arguments."""
    count = (len(tensors) - 9) // 2
    return list(tensors[:6]), list(tensors[6 : 6 + count]), list(tensors[6 + count :])


def refuse_more(what: str, instead: str) -> NoReturn:
    raise RuntimeError(
        problem(
            f"{what} through a recurrent layer or cell",
            "first and second derivatives; of forward mode one level",
            instead,
        )
    )


def refuse_bounded() -> NoReturn:
    raise RuntimeError(
        problem(
            "a second derivative of a recurrent layer with grad_clip",
            "first derivatives, and second ones without grad_clip",
            "grad_clip=None, or torch.nn.utils.clip_grad_norm_ on the parameters",
        )
    )


# ------------------------------------------------------------------------------------------ forward mode


def unpack(tensors: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Numbers and tangents of dual tensors, at the innermost level."""
    pairs = [(None, None) if x is None else unpack_dual(x) for x in tensors]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def in_one_pass(
    sequence: Tensors,
    weights: Sequence[Tensor],
    layer: tuple[str, int, bool],
    batch_first: bool,
    truncate: int,
    save: bool,
    grad_clip: float | None,
) -> tuple[Tensor, ...] | None:
    """What `recurrent` returns, as dual tensors. None where there are no tangents, and where gradients are
    recorded as well."""
    arguments = _arguments_of(sequence, weights)
    if not torch._C._is_fwd_grad_enabled():
        return None
    values, tangents = unpack(arguments)
    if all(x is None for x in tangents):
        return None
    # A batched tensor does not tell whether it requires a gradient.
    wants = torch._C._any_requires_grad(*values, *tangents) or any(map(is_batched, tangents))
    if torch.is_grad_enabled() and wants:
        return None
    input, h0, c0, *weights = values
    options = (layer, batch_first, truncate, save, grad_clip)
    made = forward((input, *sequence[1:4], h0, c0), weights, tangents, *options)
    # Of what is empty there is no tangent.
    return tuple(make_dual(x, u) if x.dim() > 1 else x for x, u in zip(made, made[4:], strict=False))
