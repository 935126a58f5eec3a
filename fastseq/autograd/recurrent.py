"""Backpropagation through time, as autograd Functions around the operators of fastseq.ops.

The Functions stand outside of the operators, and are skipped when no gradient is needed. Saved for the
backward pass are the input, the weights, the initial states, the output, and the gates of every step that
csrc/fastseq.h lists under `saved`; so none of these may be changed in place before the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import ops
from ..checks import problem


def recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    bias: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: output (T, B, D*R), h_n (D, B, R), c_n (D, B, H), the last empty if the cell has none."""
    if _recording() and _needs_gradient(input, h0, c0, *weights):
        result = _Recurrent.apply(input, batch_sizes, h0, c0, mode, directions, bias, batch_first, *weights)
    else:
        result = ops.recurrent(
            input, batch_sizes, h0, c0, weights, mode, directions, bias, batch_first, False
        )
    return result[0], result[1], result[2]


def recurrent_cell(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mode: str,
) -> Sequence[Tensor]:
    """One step: the new hidden state and, of an LSTM, the new cell state come first in the result."""
    if _recording() and _needs_gradient(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
        return _RecurrentCell.apply(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode)
    return ops.recurrent_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, False)


def _recording() -> bool:
    # In forward mode the Function says that it has no jvp, where the operator would drop the tangents.
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return any(tensor.requires_grad for tensor in tensors if tensor is not None)


def _gradients(
    grad_outputs: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    constants: tuple[str, int, bool],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of [input, h0, c0, *weights], None where not wanted."""
    if not is_compiling() and any(map(_is_batched, grad_outputs)):
        return _batched_gradients(grad_outputs, tensors, weights, constants, wanted)
    if torch.is_grad_enabled():  # create_graph=True
        grads = _RecurrentBackward.apply(*constants, wanted, *grad_outputs, *tensors, *weights)
    else:
        grads = _backward_op(*constants, wanted, *grad_outputs, *tensors, *weights)
    remaining = iter(grads)
    return [next(remaining) if want else None for want in wanted]


def _is_batched(grad: Tensor | None) -> bool:
    return grad is not None and is_legacy_batchedtensor(grad)


def _batched_gradients(grad_outputs: Sequence[Tensor | None], *rest: Any) -> list[Tensor | None]:
    """_gradients for each entry of a batch of gradients, which torch.autograd.grad(is_grads_batched=True) and
    torch.autograd.functional.jacobian(vectorize=True) hide in tensors without memory of their own."""
    level = torch._C._vmapmode_increment_nesting() - 1  # the only way to read it
    torch._C._vmapmode_decrement_nesting()
    batched = [grad for grad in grad_outputs if _is_batched(grad)]
    size = 0
    while level > 0 and size == 0:  # removing a level that is not there gives a batch of the size asked for
        size = max(torch._remove_batch_dim(grad, level, 0, 0).shape[0] for grad in batched)
        level -= size == 0
    if size == 0:
        raise RuntimeError(problem("a batch of no gradients", "at least one", "torch.zeros_like(tensor)"))
    entries = [
        [None] * size if grad is None else torch._remove_batch_dim(grad, level, size, 0).unbind(0)
        for grad in grad_outputs
    ]
    columns = zip(*(_gradients(entry, *rest) for entry in zip(*entries, strict=True)), strict=True)
    return [
        None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
        for column in columns
    ]


def _backward_op(
    mode: str, directions: int, bias: bool, wanted: Sequence[bool], *tensors: Any
) -> tuple[Tensor, ...]:
    grad_output, grad_h_n, grad_c_n, input, batch_sizes, h0, c0, output, saved, *weights = tensors
    if mode != "LSTM":  # torch.compile hands a gradient even to what is not differentiable
        grad_c_n = None
    return tuple(
        ops.recurrent_backward(
            grad_output,
            grad_h_n,
            grad_c_n,
            input,
            batch_sizes,
            h0,
            c0,
            weights,
            output,
            saved,
            mode,
            directions,
            bias,
            wanted,
        )
    )


class _Function(torch.autograd.Function):
    """Function.apply binds its arguments by inspect.signature, 50 us a call, which only torch.func needs."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


class _Recurrent(_Function):
    @staticmethod
    def forward(
        input: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        mode: str,
        directions: int,
        bias: bool,
        batch_first: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        return ops.recurrent(input, batch_sizes, h0, c0, weights, mode, directions, bias, batch_first, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        input, batch_sizes, h0, c0, mode, directions, bias, _, *weights = inputs
        output, _, c_n, saved = outputs
        ctx.save_for_backward(input, batch_sizes, h0, c0, output, saved, *weights)
        ctx.constants = mode, directions, bias
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((saved,) if mode == "LSTM" else (c_n, saved)))

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _: None
    ) -> Any:
        saved_tensors = ctx.saved_tensors  # input, batch_sizes, h0, c0, output, saved, *weights
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[2], needs[3], *needs[8:]]
        grads = _gradients(
            (grad_output, grad_h_n, grad_c_n), saved_tensors[:6], saved_tensors[6:], ctx.constants, wanted
        )
        grad_input, grad_h0, grad_c0, *grad_weights = grads
        return grad_input, None, grad_h0, grad_c0, None, None, None, None, *grad_weights


class _RecurrentCell(_Function):
    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        mode: str,
    ) -> tuple[Tensor, ...]:
        return tuple(ops.recurrent_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *tensors, mode = inputs
        ctx.save_for_backward(*tensors, outputs[0], outputs[-1])
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[-1])

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, *others: Tensor | None) -> Any:
        input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, h, saved = ctx.saved_tensors
        grad_c = others[0] if len(others) == 2 else None
        bias = bias_ih is not None
        weights = [weight_ih, weight_hh, bias_ih, bias_hh] if bias else [weight_ih, weight_hh]
        wanted = list(ctx.needs_input_grad[: 3 + len(weights)])
        tensors = (input, None, h0, c0, h, saved)
        grads = _gradients((grad_h, None, grad_c), tensors, weights, (ctx.mode, 1, bias), wanted)
        return (*grads, *[None] * (8 - len(grads)))


class _RecurrentBackward(_Function):
    """The backward pass as a part of the graph: a second derivative is an error, not silently zero."""

    forward = staticmethod(_backward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        raise RuntimeError(
            problem(
                "a second derivative through a recurrent layer or cell",
                "first derivatives",
                "create_graph=False, or torch.nn's module with the same state_dict",
            )
        )
