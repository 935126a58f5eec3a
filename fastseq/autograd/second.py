"""Reverse mode over reverse mode: what differentiates the gradients of a recurrent layer or cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import CELLS
from ..steps import wide_dtype
from . import dual
from .function import Function, gradients, needed


class Gradients(Function):
    """A backward pass as a part of the graph.

    forward takes constants, which begin with mode, directions, bias, grad_clip and truncate; a list that
    says which gradients of input, h0, c0 and weights are wanted; grad_output, grad_h_n, grad_c_n; the
    sequence; two tensors that the forward pass saved; and the weights. It returns the gradients, and it may
    return the gradient of h at every step as well (see fastseq.ops). If so, and of a cell, the two tensors
    are output and gates, and second derivatives are made of tangents alone. If not, they make what was saved
    again, with its tangent, and so do not depend on how much it was.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        count = next(i for i, given in enumerate(inputs) if isinstance(given, (list, tuple)))
        ctx.constants, ctx.wanted = inputs[:count], inputs[count]
        kept = outputs[sum(ctx.wanted) :]
        ctx.save_for_backward(*(kept or (None,)), *inputs[count + 1 :])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        constants = ctx.constants[:5]
        if constants[3] is not None:
            dual.refuse_bounded()
        remaining = iter(cotangents)
        along = [next(remaining) if want else None for want in ctx.wanted]
        count = len(ctx.constants) + 1
        # grad_output, grad_h_n, grad_c_n, the sequence, two that were saved, *weights
        needs = needed(ctx)[count:]
        wanted = [*needs[:4], *needs[7:9], *needs[11:]]
        grads = gradients(_Second, along, ctx.saved_tensors, constants, wanted)
        of_grads, (of_input, of_h0, of_c0, *of_weights) = grads[:3], grads[3:]
        of_sequence = (of_input, None, None, None, of_h0, of_c0)
        return (*[None] * count, *of_grads, *of_sequence, None, None, *of_weights)


def gradients_along(ctx: Any, *tangents: Any, of_gates: bool = False) -> Any:
    """The jvp of Gradients; of_gates: whether the two tensors are output and gates, which may be tangents'
    numbers, or have tangents themselves."""
    mode, directions, bias, grad_clip, truncate = ctx.constants[:5]
    layer, tangents = (mode, directions, bias), tangents[len(ctx.constants) + 1 :]
    along = [tangents[3], *tangents[7:9], *tangents[11:]]
    with forward_ad._set_fwd_grad_enabled(True):  # for the levels outside of this one
        values, _ = dual.unpack(ctx.saved_tensors[1:])
        grads, sequence, kept, weights = values[:3], values[3:9], values[9:11], values[11:]
        states = (*kept, *tangents[9:11])
        if CELLS[mode].saved == 0:  # an empty tensor
            states = (*states[:3], kept[1])
        readable = of_gates and not dual.is_one_step(sequence)
        if truncate or not readable or any(x is None for x in states):
            if readable and dual.are_readable(sequence[0]):
                made = dual.tangents_of_known(sequence, weights, *kept, along, layer, truncate, True)
            else:
                made = dual.forward(sequence, weights, along, layer, False, truncate, True)
            states = (made[0], made[3], made[4], made[7])
        none = [False] * len(along)
        arguments = (sequence, weights, states, along, layer, grad_clip, truncate)
        _, second = dual.backward(grads, tangents[:3], *arguments, none, ctx.wanted)
    return tuple(x for x in second if x is not None)


class GradientsAlong(Gradients):
    """The same in forward mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        Gradients.setup_context(ctx, inputs, outputs)
        ctx.save_for_forward(None, *inputs[len(ctx.constants) + 1 :])

    jvp = staticmethod(gradients_along)


class _Known(NamedTuple):
    """What Gradients saved: numbers, of which tangents are made."""

    grad_hidden: Tensor | None
    grads: Sequence[Tensor | None]
    sequence: Sequence[Tensor | None]
    kept: Sequence[Tensor]
    weights: Sequence[Tensor]

    @staticmethod
    def of(tensors: Sequence[Any]) -> _Known:
        known = _Known(tensors[0], tensors[1:4], tensors[4:10], tensors[10:12], tensors[12:])
        output, saved = known.kept
        if not (dual.is_one_step(known.sequence) and dual.are_readable(output)):
            return known
        # Of a cell the gradient of h is the one that came in.
        grad = torch.zeros_like(output) if known.grads[0] is None else known.grads[0]
        kept = output.unsqueeze(0), saved.unsqueeze(0) if saved.dim() > 1 else saved
        return known._replace(grad_hidden=grad.to(wide_dtype(output)).unsqueeze(0), kept=kept)

    def tangents(self, along: Any, layer: Any, truncate: int, save: bool) -> tuple[Any, ...]:
        """As dual.forward() returns them."""
        if self.grad_hidden is None:
            return dual.forward(self.sequence, self.weights, along, layer, False, truncate, save)
        return dual.tangents_of_known(self.sequence, self.weights, *self.kept, along, layer, truncate, save)

    def second(
        self, of_grads: Any, made: Any, along: Any, layer: Any, truncate: int, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The tangents of the gradients, where those of what is given are `of_grads` and `along`."""
        states, none = (made[0], made[3], made[4], made[7]), [False] * len(wanted)
        arguments = (self.sequence, self.weights, states, along, layer, None, truncate)
        return dual.backward(self.grads, of_grads, *arguments, none, wanted, self.grad_hidden)[1]


def _arguments_in(tensors: Sequence[Any]) -> int:
    """Of along, and then of what Gradients saved: how many there are of the former."""
    return (len(tensors) - 15) // 2 + 3


class _Second(Function):
    """The vector-Jacobian product of Gradients.

    Where gradients are B(x, v) = J(x)^T v, that of v for the cotangents u is J(x) u, that of x the tangent
    of B(x, v) along (u, 0). Both are linear in u, and so have a gradient, for which
    torch.autograd.functional.hvp asks: for cotangents p and q, the tangent of B(x, v) along (q, p).
    """

    @staticmethod
    def forward(
        mode: str,
        directions: int,
        bias: bool,
        grad_clip: float | None,
        truncate: int,
        wanted: Sequence[bool],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = _arguments_in(tensors)
        along, known = tensors[:count], _Known.of(tensors[count:])
        layer, of_arguments = ((mode, directions, bias), truncate), any(wanted[3:])
        made = known.tangents(along, *layer, of_arguments)
        of_grads = list(made[4:7])
        if dual.is_one_step(known.sequence):
            of_grads = [made[4].squeeze(0), None, made[6].squeeze(0)]
        results = [x for x, want in zip(of_grads, wanted, strict=False) if want]
        if of_arguments:
            second = known.second([None] * 3, made, along, *layer, wanted[3:])
            results += [x for x in second if x is not None]
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        mode, directions, bias, _, truncate, ctx.wanted, *tensors = inputs
        ctx.layer, ctx.count = ((mode, directions, bias), truncate), _arguments_in(tensors)
        ctx.save_for_backward(*tensors[ctx.count :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        needs = needed(ctx)[6:]
        of_along, others = needs[: ctx.count], needs[ctx.count :]
        if any(others):
            dual.refuse_more("a third derivative", dual.LOOP)
        known, remaining = _Known.of(ctx.saved_tensors), iter(cotangents)
        given = [next(remaining) if want else None for want in ctx.wanted]
        of_grads, along = given[:3], given[3:]
        made = known.tangents(along, *ctx.layer, True)
        grads = known.second(of_grads, made, along, *ctx.layer, of_along)
        return (*[None] * 6, *grads, *[None] * len(others))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        dual.refuse_more("a third derivative", dual.LOOP)
