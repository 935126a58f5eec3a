"""Attention's arguments as numbers, the same for all engines: what csrc/attention_arguments.h reads.

Tensors are addresses and strides of batch, head and row, which of packed tensors (rows, heads, features) are
those of head and row. The order is that of _C.pyi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .addresses import address
from .attention_checks import Arguments, Attention
from .checks import DTYPES, problem

if TYPE_CHECKING:
    from .attention_dual_ops import DualGradients, DualIncoming, DualResults, Tangents
    from .attention_ops import Gradients, Incoming

_NO_HEAD = (0, 0, 0, 0)
_NO_ROWS = (0, 0, 0)
_NO_MASK = (0, 0, 0, 0, 0, 0)
_NO_GRAD_OF_MASK = (0, 0, 0, 0, 0)


def _head(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides of batch, head and row."""
    if tensor is None:
        return _NO_HEAD
    strides, address = tensor.stride(), tensor.data_ptr()
    if address == 0 and tensor.numel():  # torch's zero tensors
        raise RuntimeError(
            problem(
                "query, key, value or a gradient without memory of its own",
                "dense tensors",
                "tensor.clone()",
            )
        )
    if len(strides) == 4:
        return (address, *strides[:3])
    return address, 0, strides[1], strides[0]


def _rows(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides of batch and head of what has one number for each query."""
    if tensor is None:
        return _NO_ROWS
    strides = tensor.stride()
    return tensor.data_ptr(), (strides[0] if len(strides) == 3 else 0), strides[-2]


def _normalizer(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows of either half, which lie one after the other; none of an empty one."""
    if tensor.dim() == 1:
        return _NO_ROWS, _NO_ROWS
    strides, address = tensor.stride(), tensor.data_ptr()
    rows = (strides[1] if len(strides) == 4 else 0), strides[-2]
    return (address, *rows), (address + strides[0] * tensor.element_size(), *rows)


def _broadcast_strides(tensor: Tensor) -> list[int]:
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _mask(mask: Tensor | None, a: Arguments) -> tuple[int, ...]:
    if mask is None:
        return _NO_MASK
    kind = 1 if mask.dtype is torch.bool else 2 if mask.dtype is a.query.dtype else 3
    return (mask.data_ptr(), kind, *_broadcast_strides(mask))


def _alibi(a: Arguments) -> tuple[int, ...]:
    slopes = a.alibi_slopes
    return _NO_ROWS if slopes is None else (slopes.data_ptr(), *_broadcast_strides(slopes))


def _problem(sizes: Attention, a: Arguments, output: Tensor, threads: int, seed: int) -> tuple[Any, ...]:
    """What both passes begin with."""
    return (
        DTYPES[a.query.dtype],
        threads,
        *sizes,
        a.left,
        a.right,
        a.bottom_right,
        seed,
        a.scale,
        a.softcap,
        a.dropout_p,
        address(a.cu_seqlens_q),
        address(a.cu_seqlens_k),
        address(a.key_lengths),
        _head(a.query),
        _head(a.key),
        _head(a.value),
        _head(output),
    )


def _weights(weights: Tensor, sizes: Attention) -> tuple[int, ...]:
    """The mean over the heads as each head's weights: a stride of 0."""
    address, batch, head, row = _head(weights)
    return address, batch, head if weights.shape[1] == sizes.heads else 0, row


def of_forward(
    sizes: Attention, a: Arguments, results: tuple[Tensor, ...], threads: int, seed: int
) -> tuple[Any, ...]:
    """Results are output, lse, weights, remainder and normalizer, as the operator returns them."""
    output, lse, weights, remainder, normalizer = results
    return (
        *_problem(sizes, a, output, threads, seed),
        _rows(lse),
        *_normalizer(normalizer),
        _mask(a.attn_mask, a),
        _alibi(a),
        address(a.sinks),
        _weights(weights, sizes) if a.return_weights else _NO_HEAD,
        _head(remainder) if remainder.dim() > 1 else _NO_HEAD,
    )


def _mask_gradient(grad: Tensor | None) -> tuple[int, ...]:
    return _NO_GRAD_OF_MASK if grad is None else (grad.data_ptr(), *_broadcast_strides(grad))


def of_backward(
    sizes: Attention, a: Arguments, incoming: Incoming, grads: Gradients, threads: int, seed: int
) -> tuple[Any, ...]:
    return (
        *_problem(sizes, a, incoming.output, threads, seed),
        *_normalizer(incoming.normalizer),
        _mask(a.attn_mask, a),
        _alibi(a),
        address(a.sinks),
        _head(incoming.grad_output),
        _rows(incoming.grad_lse),
        _head(incoming.grad_weights),
        _head(grads.query),
        _head(grads.key),
        _head(grads.value),
        _mask_gradient(grads.attn_mask),
        address(grads.sinks),
        _head(incoming.remainder),
    )


def _tangents(tangents: Tangents, a: Arguments) -> tuple[Any, ...]:
    return (
        _head(tangents.query),
        _head(tangents.key),
        _head(tangents.value),
        _mask(tangents.attn_mask, a),
        address(tangents.sinks),
    )


def of_dual_forward(
    sizes: Attention, a: Arguments, tangents: Tangents, results: DualResults, threads: int, seed: int
) -> tuple[Any, ...]:
    remainder = results.remainder_tangent
    return (
        *of_forward(sizes, a, results[:5], threads, seed),
        *_tangents(tangents, a),
        _head(results.output_tangent),
        _head(remainder) if remainder.dim() > 1 else _NO_HEAD,
        _rows(results.lse_tangent),
    )


def of_dual_backward(
    sizes: Attention,
    a: Arguments,
    tangents: Tangents,
    of_primal: Incoming,
    incoming: DualIncoming,
    grads: DualGradients,
    threads: int,
    seed: int,
) -> tuple[Any, ...]:
    """of_primal: what of incoming attention_backward has as well."""
    primal, tangent = grads
    of_mask = (address(tangent.attn_mask), *_mask_gradient(primal.attn_mask)[1:])
    return (
        *of_backward(sizes, a, of_primal, primal, threads, seed),
        *_tangents(tangents, a),
        _head(incoming.output_tangent),
        _head(incoming.remainder_tangent),
        _rows(incoming.lse_tangent),
        _head(incoming.grad_tangents.output),
        _rows(incoming.grad_tangents.lse),
        _head(tangent.query),
        _head(tangent.key),
        _head(tangent.value),
        # with the strides of both, which are the same
        _mask_gradient(tangent.attn_mask) if primal.attn_mask is None else of_mask,
        address(tangent.sinks),
    )
