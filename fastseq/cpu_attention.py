"""The operators of attention on the CPU: one call of the compiled module for each.

What the arguments are, attention_ops.py says, which has checked them; how they become numbers,
attention_numbers.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C, attention_numbers
from .attention_checks import Arguments, Attention
from .checks import DTYPES

if TYPE_CHECKING:
    from .attention_ops import Gradients, Incoming, Running


def threads_and_seed(a: Arguments) -> tuple[int, int]:
    return torch.get_num_threads(), 0 if a.seed is None else int(a.seed.item())


def forward(sizes: Attention, a: Arguments, *results: Tensor) -> None:
    _C.attention_forward(*attention_numbers.of_forward(sizes, a, results, *threads_and_seed(a)))


def backward(sizes: Attention, a: Arguments, incoming: Incoming, grads: Gradients) -> None:
    _C.attention_backward(*attention_numbers.of_backward(sizes, a, incoming, grads, *threads_and_seed(a)))


def makes_delta(keys: int, has_lengths: bool, _: bool) -> bool:
    """See attention_ops.Kernels; kFewKeys in attention_backward.cpp."""
    return keys <= 16 or has_lengths


def plan_in_data(
    longest: Attention,
    a: Arguments,
    backward: bool,
    of_mask: tuple[bool, ...] | None,
    _: Running | None,
) -> dict[str, Any]:
    """What the CPU's engine does with a call; see attention_ops.Kernels.plan."""
    keeps = a.save or a.return_weights

    def cut(threads: int) -> dict[str, Any]:
        return _C.attention_plan(DTYPES[a.query.dtype], threads, *longest, backward, keeps, *(of_mask or ()))

    threads = _C.available_threads(torch.get_num_threads())
    partition = cut(threads)
    return {
        "engine": "cpu_attention",
        "kernel": partition.pop("kernel"),
        "partition": partition,
        "available_threads": threads,
        "threads_on_all_cpus": cut(len(os.sched_getaffinity(0)))["threads"],
    }
