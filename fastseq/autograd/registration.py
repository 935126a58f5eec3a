"""The gradients of torch.ops.fastseq.*, for those who call the operators themselves: torch.compile and
torch.export, which trace them, and users. They come from the Functions beside this file, which the modules
call without asking the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import attention_ops, ops
from ..attention_checks import Arguments, refuse_trained_slopes
from ..dispatch import library, nobody_listens
from .attention import _Attention, _AttentionBackward
from .recurrent import _Recurrent, _RecurrentBackward, _RecurrentCell


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    """Whether a graph is recorded; it is not where a Function calls the operator in its forward pass."""
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def register(name: str, module: Any, differentiable: Callable[..., Any]) -> None:
    """Has the operator call differentiable(*arguments) where a graph is recorded, else its kernel, that of
    `module` at once where possible."""
    kernel = getattr(module, name)
    op = getattr(torch.ops.fastseq, name).default
    defaults = tuple(a.default_value for a in op._schema.arguments)
    below = torch._C._after_autograd_keyset

    def call(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if _wants_gradient(arguments):
            # torch leaves out what is the default
            return differentiable(*arguments, *defaults[len(arguments) :])
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*arguments) if nobody_listens() else op.redispatch(keyset & below, *arguments)

    library.impl(name, call, "Autograd", with_keyset=True)


def _recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    bias: bool,
    batch_first: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    options = (mode, directions, bias, batch_first)
    output, h_n, c_n, saved = _Recurrent.apply_here(input, batch_sizes, h0, c0, *options, *weights)
    return output, h_n, c_n, saved if save else saved.new_empty(0)


def _recurrent_cell(*arguments: Any) -> list[Tensor]:
    *rest, save = arguments
    results = list(_RecurrentCell.apply_here(*rest))
    return results if save else results[:-1]


def _recurrent_backward(*arguments: Any) -> list[Tensor]:
    *tensors, weights, output, saved, mode, directions, bias, wanted = arguments
    return list(
        _RecurrentBackward.apply_here(mode, directions, bias, wanted, *tensors, output, saved, *weights)
    )


def _attention(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, average_weights, save = arguments
    refuse_trained_slopes(Arguments(*arguments).alibi_slopes)
    output, lse, weights, remainder, normalizer = _Attention.apply_here(*rest, True)
    if average_weights:
        weights = weights.mean(dim=1, keepdim=True)
    if not save:
        remainder = remainder.new_empty(0)
        normalizer = normalizer if rest[-1] else normalizer.new_empty(0)
    return output, lse, weights, remainder, normalizer


def _attention_backward(*arguments: Any) -> list[Tensor]:
    *tensors_and_numbers, wanted, deterministic = arguments
    tensors, numbers = tensors_and_numbers[:17], tensors_and_numbers[17:]
    return list(_AttentionBackward.apply_here(*numbers, deterministic, wanted, *tensors))


for _function in (_recurrent, _recurrent_cell, _recurrent_backward):
    register(_function.__name__[1:], ops, _function)
for _function in (_attention, _attention_backward):
    register(_function.__name__[1:], attention_ops, _function)
