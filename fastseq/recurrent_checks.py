"""What rnn, lstm, gru and their cells accept, asked before anything is computed; checks.py asks the rest."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .checks import batch_sizes_elsewhere, check_bounds, no_batch_sizes, problem, require_tensor
from .windows import steps_of


class Options(NamedTuple):
    """What torch's networks do not have; see lstm()."""

    lengths: Tensor | None = None
    resets: Tensor | None = None
    grad_clip: float | None = None
    truncate: int | None = None
    memory: str = "fast"


def check_options(*, grad_clip: float | None, truncate: int | None, memory: str) -> None:
    """Raises for options that no call accepts; modules ask at once."""
    steps_of(memory)
    if grad_clip is not None and (isinstance(grad_clip, bool) or not isinstance(grad_clip, Real)):
        raise TypeError(
            problem(
                f"grad_clip of type {type(grad_clip).__name__}",
                "a number of at least 0, or None",
                "grad_clip=1.0, or None",
            )
        )
    if truncate is not None and (isinstance(truncate, bool) or not isinstance(truncate, int)):
        raise TypeError(
            problem(
                f"truncate of type {type(truncate).__name__}",
                "a whole number of steps, at least 1, or None",
                "truncate=64, or None",
            )
        )
    check_bounds(grad_clip, 1 if truncate is None else truncate, least=1)


def check_resets(resets: Tensor, batch_sizes: Tensor) -> None:
    """Raises unless those of a packed sequence are (T, B)."""
    require_tensor("resets", resets)
    shape = (batch_sizes.shape[0], packed_batch(batch_sizes))
    if resets.shape != shape:
        raise RuntimeError(
            problem(
                f"resets of shape {tuple(resets.shape)}",
                f"shape {shape}, that is (steps, batch)",
                "a value for every step and row, also for those that are not there",
            )
        )


def resets_of(options: Options, unbatched: bool, batch_sizes: Tensor | None) -> Tensor | None:
    """Checks the options, and returns the resets, one for each row of a packed sequence."""
    for name, rows in (("lengths", options.lengths), ("resets", options.resets)):
        if rows is not None:
            require_tensor(name, rows)
            if unbatched:
                raise RuntimeError(
                    problem(f"{name} of an input without a batch", "a batch", "input.unsqueeze(1)")
                )
    check_options(grad_clip=options.grad_clip, truncate=options.truncate, memory=options.memory)
    if options.resets is None or batch_sizes is None:
        return options.resets
    check_resets(options.resets, batch_sizes)
    there = torch.arange(options.resets.shape[1], device="cpu") < batch_sizes.unsqueeze(1)
    return options.resets[there.to(options.resets.device)]


def two_states(hx: Any) -> tuple[Any, Any]:
    """h_0 and c_0 of an LSTM. As of torch.nn, TypeError for what is no sequence, IndexError for fewer."""
    try:
        h0, c0 = hx
        return h0, c0
    except TypeError:
        raise TypeError(_not_two(f"hx of type {type(hx).__name__}", "(h_0, c_0)")) from None
    except ValueError:
        error = IndexError if len(hx) < 2 else RuntimeError
        raise error(_not_two(f"hx with {len(hx)} tensors", "(h_0, c_0)")) from None


def _not_two(given: str, pair: str) -> str:
    return problem(given, f"two states, {pair}", f"hx={pair}, or None")


def refuse_weights(weights: Any) -> NoReturn:
    """Raises for weights of which the sizes of the first layer cannot be read."""
    remedy = "module.all_weights, or [[weight_ih, weight_hh, bias_ih, bias_hh], ...]"
    nested = isinstance(weights, Sequence) and weights and isinstance(weights[0], Sequence)
    if not nested:
        given = f"weights of type {type(weights).__name__}"
        if isinstance(weights, Sequence):
            kind = type(weights[0]).__name__ if weights else "nothing"
            given = f"weights, a {type(weights).__name__} of {kind}"
        raise TypeError(problem(given, "a sequence of tensors for each layer and direction", remedy))
    if len(weights[0]) < 2:
        raise RuntimeError(
            problem(
                f"weights[0] with {len(weights[0])} tensors", "at least two, weight_ih and weight_hh", remedy
            )
        )
    for i, weight in enumerate(weights[0]):
        require_tensor(f"weights[0][{i}]", weight)
    raise RuntimeError(
        problem(
            f"weights[0] of {', '.join(str(weight.dim()) for weight in weights[0])} dimensions",
            "2 of each weight, and 1 of each bias",
            remedy,
        )
    )


def check_input(input: Tensor, dtype: torch.dtype, batch_sizes: Tensor | None) -> None:
    rank = input.dim()
    if batch_sizes is None and rank not in (2, 3):
        raise ValueError(
            problem(
                f"input with {rank} dimensions", "3 dimensions, or 2 without a batch", "input.unsqueeze(...)"
            )
        )
    if batch_sizes is not None and rank != 2:
        raise RuntimeError(
            problem(
                f"packed input with {rank} dimensions",
                "2 dimensions, (rows, features)",
                "pack_padded_sequence",
            )
        )
    if input.dtype != dtype:
        raise ValueError(
            problem(
                f"input of dtype {input.dtype} for weights of dtype {dtype}",
                "one dtype for the input, the states and the weights",
                f"input.to({dtype}), or module.to({input.dtype})",
            )
        )


def state_name(states: tuple[Tensor, ...], index: int) -> str:
    return f"hx[{index}]" if len(states) == 2 else "hx"


def check_state_ranks(states: tuple[Tensor, ...], rank: int) -> None:
    for i, state in enumerate(states):
        if not isinstance(state, Tensor):
            require_tensor(state_name(states, i), state, AttributeError)
        if state.dim() != rank:
            name, kind = (
                state_name(states, i),
                "an input without a batch" if rank == 2 else "a batched input",
            )
            raise RuntimeError(
                problem(
                    f"{name} with {state.dim()} dimensions",
                    f"{rank} dimensions for {kind}",
                    f"{name}.squeeze(1)" if rank == 2 else f"{name}.unsqueeze(1)",
                )
            )


def packed_batch(batch_sizes: Tensor) -> int:
    require_tensor("batch_sizes", batch_sizes)
    if batch_sizes.dim() != 1:
        raise TypeError(
            problem(
                f"batch_sizes with {batch_sizes.dim()} dimensions", "1 dimension", "batch_sizes.flatten()"
            )
        )
    if not batch_sizes.is_cpu:
        raise RuntimeError(batch_sizes_elsewhere(batch_sizes))
    if batch_sizes.shape[0] == 0:
        raise RuntimeError(no_batch_sizes())
    batch = int(batch_sizes[0])
    if is_compiling():  # what is in a tensor is not known yet
        torch._check(batch >= 0)
    elif batch < 0:
        raise RuntimeError(
            problem(f"batch_sizes that start with {batch}", "sizes of at least 0", "pack_padded_sequence")
        )
    return batch


def check_cell_states(hx: Any) -> None:
    """Raises unless these are h and c, with or without a batch."""
    if isinstance(hx, Tensor) or not isinstance(hx, Sequence):
        raise TypeError(_not_two(f"hx of type {type(hx).__name__}", "(h, c)"))
    if len(hx) != 2:
        raise RuntimeError(_not_two(f"hx with {len(hx)} tensors", "(h, c)"))
    check_cell_ranks(("hx[0]", hx[0]), ("hx[1]", hx[1]))


def check_cell_ranks(*tensors: tuple[str, Any]) -> None:
    for name, tensor in tensors:
        require_tensor(name, tensor, AttributeError)
        if tensor.dim() not in (1, 2):
            raise ValueError(
                problem(
                    f"{name} with {tensor.dim()} dimensions",
                    "2 dimensions, or 1 without a batch",
                    f"{name}.reshape(...)",
                )
            )


def unknown_nonlinearity(nonlinearity: object) -> str:
    return problem(f"nonlinearity={nonlinearity!r}", "'tanh' or 'relu'", "nonlinearity='tanh'")
