"""Reverse mode over reverse mode: what differentiates the gradients of a recurrent layer or cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import problem
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
            raise RuntimeError(
                problem(
                    "a second derivative of a recurrent layer with grad_clip",
                    "first derivatives, and second ones without grad_clip",
                    "grad_clip=None, or torch.nn.utils.clip_grad_norm_ on the parameters",
                )
            )
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


class _Second(Function):
    """The vector-Jacobian product of Gradients.

    Where gradients are J(x)^T v, that of v for the cotangents u is J(x) u, and that of x the tangent of the
    gradients along u.
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
        count = (len(tensors) - 15) // 2 + 3  # arguments
        along, grad_hidden, tensors = tensors[:count], tensors[count], tensors[count + 1 :]
        grads, sequence, weights = list(tensors[:3]), tensors[3:9], tensors[11:]
        layer, of_arguments = (mode, directions, bias), any(wanted[3:])
        output, saved = tensors[9:11]
        if dual.is_one_step(sequence) and dual.are_readable(output):
            # The gradient of its h is the one that came in.
            grad_hidden = torch.zeros_like(output) if grads[0] is None else grads[0]
            grad_hidden = grad_hidden.to(wide_dtype(output)).unsqueeze(0)
            output, saved = output.unsqueeze(0), saved.unsqueeze(0) if saved.dim() > 1 else saved
        if grad_hidden is None:
            made = dual.forward(sequence, weights, along, layer, False, truncate, of_arguments)
        else:
            known = (sequence, weights, output, saved)
            made = dual.tangents_of_known(*known, along, layer, truncate, of_arguments)
        of_grads = list(made[4:7])
        if dual.is_one_step(sequence):
            of_grads = [made[4].squeeze(0), None, made[6].squeeze(0)]
        results = [x for x, want in zip(of_grads, wanted, strict=False) if want]
        if of_arguments:
            states = (made[0], made[3], made[4], made[7])
            nothing, none = [None] * 3, [False] * count
            arguments = (sequence, weights, states, along, layer, None, truncate)
            _, second = dual.backward(grads, nothing, *arguments, none, wanted[3:], grad_hidden)
            results += [x for x in second if x is not None]
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        dual.refuse_more("a third derivative", dual.LOOP)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        dual.refuse_more("a third derivative", dual.LOOP)
