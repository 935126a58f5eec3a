"""Tensors as the compiled module takes them: addresses and strides, in plain numbers."""

from __future__ import annotations

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def strides(tensor: Tensor | None, count: int = 3) -> tuple[int, ...]:
    """The first ones of step, row and feature; a packed sequence or a single step has none for steps."""
    if tensor is None:
        return (0,) * count
    return (tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride()))[:count]
