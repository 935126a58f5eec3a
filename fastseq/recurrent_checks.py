"""What rnn, lstm, gru and their cells accept, asked before anything is computed; checks.py asks the rest."""

from __future__ import annotations

from typing import NamedTuple

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
    if truncate is not None and not isinstance(truncate, int):
        raise RuntimeError(
            problem(f"truncate={truncate!r}", "a whole number of steps, or None", "truncate=64, or None")
        )
    check_bounds(grad_clip, 0 if truncate is None else truncate or -1)


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
    there = torch.arange(options.resets.shape[1]) < batch_sizes.unsqueeze(1)
    return options.resets[there.to(options.resets.device)]


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


def check_cell_ranks(*tensors: tuple[str, Tensor]) -> None:
    for name, tensor in tensors:
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
