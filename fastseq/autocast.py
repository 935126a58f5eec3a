"""torch.autocast: our functions get and return the dtypes that torch's own get and return within it.

Tensors go in in autocast's dtype; float64 stays, and so do tensors on devices for which it is off. What comes
out is, as of torch.nn:

    attention, and all on CUDA       autocast's dtype
    RNN and its cell on the CPU      autocast's dtype
    LSTM on the CPU                  autocast's dtype; packed or a cell, the dtype that c_0 had
      with projection                h and output in autocast's dtype, c in the one that c_0 had
    GRU and its cell on the CPU      the dtype that h_0 had

where an initial state that is not given has the input's dtype. (On CUDA torch runs layers in float16 whatever
dtype autocast has; ours run in autocast's.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

is_on = torch._C._is_any_autocast_enabled

_LOWERED = {torch.float32, torch.bfloat16, torch.float16}


def _lower(given: Tensor) -> torch.dtype:
    """The dtype in which a tensor goes in."""
    device = "cpu" if given.is_cpu else "cuda" if given.is_cuda else ""
    if device and given.dtype in _LOWERED and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return given.dtype


def lowered(given: Any) -> Any:
    """A tensor as it goes in; anything else as it is."""
    return given.to(_lower(given)) if isinstance(given, Tensor) else given


def _dtype_of(state: Any, input: Tensor) -> torch.dtype:
    return (state if isinstance(state, Tensor) else input).dtype


def _results(
    mode: str, input: Tensor, h0: Any, c0: Any, whole: bool, projected: bool
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of h and c. whole: on the CPU torch has one kernel for the layer, if it is not projected."""
    lower = _lower(input)
    if not input.is_cpu or lower is torch.float64 or mode.startswith("RNN"):
        return lower, lower
    if mode != "LSTM":
        return _dtype_of(h0, input), lower
    if whole and not projected:
        return lower, lower
    of_c = _dtype_of(c0, input)
    return lower if projected else of_c, of_c


def layers(stack: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """stack(mode, input, weights, states, batch_sizes, ...) within autocast: output, h_n and c_n."""

    @wraps(stack)
    def cast(
        mode: str,
        input: Tensor,
        weights: Sequence[Sequence[Tensor]],
        states: tuple[Tensor, ...],
        batch_sizes: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not is_on() or not isinstance(input, Tensor):
            return stack(mode, input, weights, states, batch_sizes, *options)
        h0, c0 = (*states, None, None)[:2]
        projected = any(len(group) in (3, 5) for group in weights)
        of_h, of_c = _results(mode, input, h0, c0, batch_sizes is None, projected)
        weights = [[lowered(weight) for weight in group] for group in weights]
        states = tuple(lowered(state) for state in states)
        output, h_n, c_n = stack(mode, lowered(input), weights, states, batch_sizes, *options)
        return output.to(of_h), h_n.to(of_h), c_n.to(of_c)

    return cast


def cell(
    step: Callable[..., Sequence[Tensor]], input: Tensor, h0: Any, c0: Any, *weights_and_mode: Any
) -> Sequence[Tensor]:
    """step(input, h0, c0, *weights_and_mode) within autocast: h, and c of an LSTM."""
    *weights, mode = weights_and_mode
    dtypes = _results(mode, input, h0, c0, False, False)
    states = step(*(lowered(given) for given in (input, h0, c0, *weights)), mode)
    return [state.to(dtype) for state, dtype in zip(states, dtypes, strict=False)]
