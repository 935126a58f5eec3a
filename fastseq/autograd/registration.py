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

from .. import attention_dual_ops, attention_ops, dual_ops, ops, windows
from ..attention_checks import Arguments, raise_for_trained_slopes
from ..checks import CELLS, problem
from ..dispatch import has_tangent, library, nobody_listens
from . import dual
from .attention import (
    AttentionBackward,
    AttentionFunction,
    Tangents,
    differentiable,
    second_derivatives,
)
from .memory import RecurrentInWindows, WindowsBackward, keeps_gates
from .recurrent import _RecurrentAlong, _RecurrentBackwardAlong, _RecurrentCellAlong


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    """Whether a graph is recorded; it is not where a Function calls the operator in its forward pass."""
    return _is_reverse(arguments) or (torch._C._is_fwd_grad_enabled() and _is_forward(arguments))


def _is_forward(arguments: Sequence[Any]) -> bool:
    if forward_ad._current_level < 0 and nobody_listens():
        # A graph that torch.compile's backend "eager" runs may have entered a level itself. To ask every
        # tensor would take a third of a small call's time: the first one tells.
        arguments = [next((x for x in arguments if isinstance(x, Tensor)), None)]
    return has_tangent(arguments)


def _is_reverse(arguments: Sequence[Any]) -> bool:
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


def _recurrent(*arguments: Any) -> tuple[Tensor, ...]:
    sequence, (weights, *layer, batch_first, save, grad_clip, truncate, memory) = arguments[:6], arguments[6:]
    mode, options = layer[0], (batch_first, grad_clip, truncate)
    results = dual.in_one_pass(sequence, weights, layer, batch_first, truncate, save != "nothing", grad_clip)
    # Forward mode keeps gates, whatever `memory` is.
    if results is None and (save != "nothing" or keeps_gates(memory, mode) or has_tangent(arguments)):
        results = _RecurrentAlong.apply_here(*sequence, *layer, *options, *weights)
    elif results is None:
        results = RecurrentInWindows.apply_here(*sequence, *layer, *options, memory, *weights)
    output, h_n, c_n, saved = results[:4]
    if save == "states" and CELLS[mode].cell_state:
        return output, h_n, c_n, saved[:, :, -1]
    return output, h_n, c_n, saved if save == "gates" else saved.new_empty(0)


def _recurrent_cell(*arguments: Any) -> list[Tensor]:
    *rest, save = arguments
    results = list(_RecurrentCellAlong.apply_here(*rest))
    return results if save else results[:-1]


def _recurrent_backward(*arguments: Any) -> list[Tensor]:
    *given, keep = arguments
    if keep:
        raise RuntimeError(
            problem(
                "keep=True where a graph is recorded",
                "keep=True within torch.no_grad()",
                "keep=False, which has second derivatives",
            )
        )
    tensors, (weights, output, saved, *constants) = given[:9], given[9:]
    return list(_RecurrentBackwardAlong.apply_here(*constants, *tensors, output, saved, *weights))


def _recurrent_windows_backward(*arguments: Any) -> list[Tensor]:
    tensors, (weights, kept_h, kept_c, *constants) = arguments[:9], arguments[9:]
    return list(WindowsBackward.apply_here(*constants, *tensors, kept_h, kept_c, *weights))


def _recurrent_dual(*arguments: Any) -> tuple[Tensor, ...]:
    sequence, (weights, *of_arguments, of_weights), constants = arguments[:6], arguments[6:11], arguments[11:]
    *layer, save, grad_clip = constants
    constants = (*layer, save or _is_reverse(arguments), grad_clip)
    return dual.RecurrentDual.apply_here(*constants, *sequence, *weights, *of_arguments, *of_weights)


def _recurrent_tangents(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients need results that depend on the arguments."""
    sequence_and_weights, tangents, (*layer, truncate, save) = arguments[:7], arguments[9:13], arguments[13:]
    return _recurrent_dual(*sequence_and_weights, *tangents, *layer, False, truncate, save, None)[4:]


def _recurrent_dual_backward(*arguments: Any) -> list[Tensor]:
    before, (weights, *rest), constants = arguments[:12], arguments[12:21], tuple(arguments[21:28])
    *between, of_weights, output_tangent, saved_tangent = rest
    tensors = (*before, *weights, *between, *of_weights, output_tangent, saved_tangent, *arguments[28:])
    return list(dual.RecurrentDualBackward.apply_here(constants, *tensors))


def _attention(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, average_weights, save, deterministic = arguments
    if _wants_gradient([Arguments(*arguments).alibi_slopes]):
        raise_for_trained_slopes()
    results = differentiable(AttentionFunction.apply_here, *rest, deterministic)
    output, lse, weights, remainder, normalizer = results
    if average_weights:
        weights = weights.mean(dim=1, keepdim=True)
    if not save:
        remainder = remainder.new_empty(0)
        normalizer = normalizer if rest[-1] else normalizer.new_empty(0)
    return output, lse, weights, remainder, normalizer


def _attention_backward(*arguments: Any) -> list[Tensor]:
    *tensors_and_numbers, wanted, deterministic = arguments
    tensors, numbers = tensors_and_numbers[:17], tensors_and_numbers[17:]
    return list(AttentionBackward.apply_here(*numbers, deterministic, wanted, *tensors))


def _attention_dual(*arguments: Any) -> tuple[Tensor, ...]:
    if _wants_gradient([arguments[7]]):  # alibi_slopes
        raise_for_trained_slopes()
    return tuple(Tangents.apply_here(*arguments))


def _attention_dual_backward(*arguments: Any) -> list[Tensor]:
    return list(second_derivatives("apply_here", *arguments))


for _function in (_recurrent, _recurrent_cell, _recurrent_backward):
    register(_function.__name__[1:], ops, _function)
register("recurrent_windows_backward", windows, _recurrent_windows_backward)
# What is kept between windows has no gradient: second derivatives make it again.
library.impl("recurrent_checkpoints", torch.library.fallthrough_kernel, "Autograd")
for _function in (_recurrent_dual, _recurrent_tangents, _recurrent_dual_backward):
    register(_function.__name__[1:], dual_ops, _function)
for _function in (_attention, _attention_backward):
    register(_function.__name__[1:], attention_ops, _function)
for _function in (_attention_dual, _attention_dual_backward):
    register(_function.__name__[1:], attention_dual_ops, _function)
