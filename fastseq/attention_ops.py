"""The operators of scaled dot-product attention in torch.ops.fastseq, the only callers of its kernels.

    attention             output, log-sum-exp and, if asked for, weights
    attention_backward    the gradients of query, key, value, attn_mask and sinks

What ops.py says of the recurrent operators holds here too. The arguments are those of
attention_checks.Arguments; ranks, broadcasting and the words of options are the business of attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, cpu_attention, cuda_attention, loops
from .attention_checks import (
    Arguments,
    Attention,
    check_attention,
    check_values,
    dtype_of_sums,
    problem,
    unsupported,
)
from .dispatch import READS_TENSORS, library, nobody_listens, plain_device, register

TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
NUMBERS = "float scale, float softcap, float dropout_p, int left, int right, bool bottom_right"
# output is (B, Hq, Sq, Dv), in memory like query; lse (B, Hq, Sq) in the dtype of sums; weights (B, Hq, Sq,
# Sk), or (B, 1, Sq, Sk) if averaged over the heads, empty if not asked for. Packed: (total_q, Hq, Dv) and
# (Hq, total_q). remainder is like output, if `save` and the dtype has 16 bits, else empty: what rounding
# took from output. Without it a backward pass would be as wrong as output is rounded where the gradients of
# a row's weights nearly cancel. normalizer, with 2 before the shape of lse, is what makes weights of scores,
# exp(score - normalizer[0]) normalizer[1], the former in the engine's units, as exact as they were; empty
# where neither `save` nor weights need it.
library.define(
    f"attention({TENSORS}, {NUMBERS}, bool return_weights, bool average_weights=False, "
    "bool save=False) "
    "-> (Tensor output, Tensor lse, Tensor weights, Tensor remainder, Tensor normalizer)"
)
# `wanted` says for which of [query, key, value, attn_mask, sinks] to return a gradient, `deterministic` that
# these are the same bits every time. weights are needed beside grad_weights only.
library.define(
    "attention_backward(Tensor? grad_output, Tensor? grad_lse, Tensor? grad_weights, "
    f"{TENSORS}, Tensor output, Tensor normalizer, Tensor? weights, Tensor? remainder, {NUMBERS}, "
    "bool[] wanted, bool deterministic=True) -> Tensor[]"
)


def rows_of(tensor: Tensor) -> Tensor:
    """With features next to each other, as the kernels want them: a copy if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _empty_like(like: Tensor, features: int) -> Tensor:
    """Dense, with other features, which come last, and the other dimensions in memory as in `like`."""
    shape = like.shape
    if like.is_contiguous():  # first, because strides of sizes of 1 mean nothing
        return torch.empty_like(like) if shape[-1] == features else like.new_empty((*shape[:-1], features))
    strides, step = [1] * len(shape), features
    # No transposed view: autograd forbids changing a view from a Function in place.
    for i in sorted(range(len(shape) - 1), key=lambda i: (like.stride(i), -i)):
        strides[i], step = step, step * max(1, shape[i])
    return like.new_empty_strided((*shape[:-1], features), strides)


# ------------------------------------------------------------------------------------------------- forward


def allocate(a: Arguments, sizes: Attention) -> tuple[Tensor, ...]:
    query, heads, queries = a.query, sizes.heads, sizes.queries
    output = _empty_like(query, sizes.value_size)
    rows, strides = (sizes.batch, heads, queries), (heads * queries, queries, 1)
    if a.cu_seqlens_q is not None:
        rows, strides = rows[1:], strides[1:]
    sums = dtype_of_sums(query.dtype)
    options = {} if sums is query.dtype else {"dtype": sums}  # a dtype takes as long as the rest of the call
    lse = query.new_empty_strided(rows, strides, **options)  # faster than new_empty
    weights = query.new_empty(_shape_of_weights(a, sizes) if a.return_weights else 0)
    remainder = torch.empty_like(output) if a.save and query.itemsize == 2 else query.new_empty(0)
    normalizer = query.new_empty((2, *rows), **options) if a.save or a.return_weights else query.new_empty(0)
    return output, lse, weights, remainder, normalizer


def _shape_of_weights(a: Arguments, sizes: Attention) -> tuple[int, ...]:
    return sizes.batch, 1 if a.average_weights else sizes.heads, sizes.queries, sizes.keys


def _attention_fake(*arguments: Any) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    return allocate(a, check_attention(a))


def dense(a: Arguments, sizes: Attention, looks: bool) -> Arguments:
    """As the kernels take them: features next to each other, lengths as int64, without gaps, and checked if
    somebody looks at them."""
    query, key, value = a.query, a.key, a.value
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        a = a._replace(query=rows_of(query), key=rows_of(key), value=rows_of(value))
    if a.key_lengths is not None or a.cu_seqlens_q is not None or a.sinks is not None:
        lengths = {
            name: getattr(a, name).to(torch.int64).contiguous()
            for name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k")
            if getattr(a, name) is not None
        }
        a = a._replace(**lengths, sinks=None if a.sinks is None else a.sinks.contiguous())
        if looks:
            check_values(a, sizes)
    return a


def _run(run: Callable[..., None], looks: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Checks, allocates, has run(sizes, arguments, *results) fill the results.

    looks: whether values of lengths are checked, for which a GPU would have to be waited for."""
    a = Arguments(*arguments)
    sizes = check_attention(a)
    results = allocate(a, sizes)
    a = dense(a, sizes, looks)
    run(sizes, a, *results)
    if a.average_weights and not sizes.heads:
        results[2].fill_(torch.nan)
    return results


# ------------------------------------------------------------------------------------------------ gradients


class Incoming(NamedTuple):
    """What the backward pass has beside the arguments of the forward pass."""

    grad_output: Tensor | None  # like output; None for zeros only over dual numbers
    grad_lse: Tensor | None  # like lse, less the row sums of weights * grad_weights
    grad_weights: Tensor | None  # (B, Hq, Sq, Sk)
    output: Tensor
    normalizer: Tensor  # (2, ...) of lse
    remainder: Tensor | None  # like output
    deterministic: bool


class Gradients(NamedTuple):
    """What it fills; None where not wanted."""

    query: Tensor | None  # like those of the forward pass, but dense
    key: Tensor | None
    value: Tensor | None
    # The shape of the mask, in the dtype of sums, filled with zeros; of one that is broadcast nowhere in its
    # own dtype, and not filled.
    attn_mask: Tensor | None
    sinks: Tensor | None  # (B, Hq) in the dtype of sums


def forward_arguments(arguments: Sequence[Any]) -> Arguments:
    """Of the operator attention, in those of its backward pass."""
    return Arguments(*arguments[3:13], *arguments[17:23], arguments[15] is not None)


def require_like(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device, of: str
) -> None:
    if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
        raise RuntimeError(
            problem(
                f"{name} of shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device}",
                f"shape {tuple(shape)} and dtype {dtype} on {device}, as of {of}",
                f"check the sizes of {name}",
            )
        )


def check_wanted(name: str, wanted: Sequence[bool], a: Arguments) -> None:
    trained_mask = a.attn_mask is not None and a.attn_mask.dtype is not torch.bool
    if len(wanted) != 5 or (wanted[3] and not trained_mask) or (wanted[4] and a.sinks is None):
        raise RuntimeError(
            problem(
                f"{name}={list(wanted)}",
                "a bool for each of query, key, value, attn_mask and sinks, true where there is one",
                "False for a mask that is None or bool, and for sinks that are None",
            )
        )


def _read_backward(arguments: Sequence[Any]) -> tuple[Arguments, Attention]:
    """The arguments of the forward pass, which are checked, as is what came from it."""
    weights = arguments[15]
    a = forward_arguments(arguments)
    sizes, query = check_attention(a), a.query
    rows = query.shape[:-1] if a.cu_seqlens_q is None else (sizes.heads, sizes.queries)
    output, lse = (*query.shape[:-1], sizes.value_size), tuple(rows)
    dtype, sums = query.dtype, dtype_of_sums(query.dtype)
    for name, tensor, shape, of in (
        ("output", arguments[13], output, dtype),
        ("normalizer", arguments[14], (2, *lse), sums),
        ("weights", weights, (*lse, sizes.keys), dtype),
        ("remainder", arguments[16], output, dtype),
        ("grad_output", arguments[0], output, dtype),
        ("grad_lse", arguments[1], lse, sums),
        ("grad_weights", arguments[2], (*lse, sizes.keys), dtype),
    ):
        if tensor is not None:
            require_like(name, tensor, shape, of, query.device, "the forward pass")
    check_wanted("wanted", arguments[23], a)
    if arguments[2] is not None and weights is None:
        raise RuntimeError(
            problem("grad_weights without weights", "the weights of the forward pass", "pass both, or none")
        )
    return a, sizes


def result(grad: Tensor, name: str, a: Arguments) -> Tensor:
    """A gradient as the operator returns it."""
    if name == "attn_mask":
        assert a.attn_mask is not None
        return grad.to(a.attn_mask.dtype)
    return grad.sum(0) if name == "sinks" else grad


def _empty_for_mask(mask: Tensor, sizes: Attention, sums: torch.dtype) -> Tensor:
    full = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    if mask.shape == full:
        return torch.empty_like(mask, memory_format=torch.contiguous_format)
    return mask.new_zeros(mask.shape, dtype=sums)


def allocate_gradients(a: Arguments, sizes: Attention, wanted: Sequence[bool]) -> Gradients:
    of_query, of_key, of_value, of_mask, of_sinks = wanted
    dtype, query = dtype_of_sums(a.query.dtype), a.query
    mask = a.attn_mask
    return Gradients(
        _empty_like(query, sizes.head_size) if of_query else None,
        _empty_like(a.key, sizes.head_size) if of_key else None,
        _empty_like(a.value, sizes.value_size) if of_value else None,
        None if mask is None or not of_mask else _empty_for_mask(mask, sizes, dtype),
        query.new_empty((sizes.batch, sizes.heads), dtype=dtype) if of_sinks else None,
    )


def _attention_backward_fake(*arguments: Any) -> list[Tensor]:
    a, sizes = _read_backward(arguments)
    grads = allocate_gradients(a, sizes, arguments[23])
    return [
        result(grad, name, a) for name, grad in zip(grads._fields, grads, strict=True) if grad is not None
    ]


def _deterministic(arguments: Sequence[Any]) -> bool:
    return arguments[24] if len(arguments) > 24 else True  # torch leaves out what is the default


def _incoming(arguments: Sequence[Any]) -> Incoming:
    grad_output, grad_lse, grad_weights = arguments[:3]
    output, normalizer, weights, remainder = arguments[13:17]
    grad_output = torch.zeros_like(output) if grad_output is None else rows_of(grad_output)
    if grad_weights is not None:
        # Of a hidden weight the gradient may be anything.
        shares = weights.to(normalizer.dtype) * grad_weights
        row_sums = shares.masked_fill(weights == 0, 0).sum(-1)
        grad_lse = -row_sums if grad_lse is None else grad_lse - row_sums
        grad_weights = rows_of(grad_weights)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    # output and normalizer as the forward pass made them, unless a hook on saved tensors laid them out anew.
    remainder = None if remainder is None else rows_of(remainder)
    output, normalizer = rows_of(output), normalizer.contiguous()
    return Incoming(
        grad_output, grad_lse, grad_weights, output, normalizer, remainder, _deterministic(arguments)
    )


def _run_backward(run: Callable[..., None], looks: bool, *arguments: Any) -> list[Tensor]:
    """Checks, allocates, has run(sizes, arguments, incoming, grads) fill the gradients."""
    a, sizes = _read_backward(arguments)
    grads = allocate_gradients(a, sizes, arguments[23])
    a = dense(a, sizes, looks)
    if sizes.heads:
        run(sizes, a, _incoming(arguments), grads)
    else:  # keys and values that no query head reads
        grads = Gradients(*(None if grad is None else grad.zero_() for grad in grads))
    return [
        result(grad, name, a) for name, grad in zip(grads._fields, grads, strict=True) if grad is not None
    ]


# ----------------------------------------------------------------------------------------- the usual call


def plain(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor | None:
    """Attention without any other option or gradient; None if anything is not as usual.

    Dispatching, and collecting addresses in Python, take as long as a small call: see ops.recurrent_cell.
    """
    usual = query.layout is torch.strided and query.dim() == value.dim() == 4
    if not (READS_TENSORS and usual and nobody_listens()):
        return None
    kernels = KERNELS.get("cpu" if query.is_cpu else "cuda" if query.is_cuda else "")
    if kernels is None:
        return None
    output = _empty_like(query, value.shape[3])
    return output if kernels.plain(query, key, value, output, is_causal, scale, enable_gqa) else None


def _plain_on_cpu(*arguments: Any) -> bool:
    return _C.attention(torch.get_num_threads(), *arguments)


# --------------------------------------------------------------------------------------------- registration

OPERATORS = ("attention", "attention_backward")


class Running(NamedTuple):
    """What is known of a backward pass that runs, and not of one that is foretold."""

    of_weights: bool  # whether there is a gradient of weights
    any_order: bool  # the gradients of query, key and value are all wanted, and may be summed up in any order


def running(arguments: Sequence[Any]) -> Running:
    any_order = all(arguments[23][:3]) and not _deterministic(arguments)
    return Running(arguments[2] is not None, any_order)


class Kernels(NamedTuple):
    """The two operators on one device.

    plain(query, key, value, output, is_causal, scale, enable_gqa): the former without any other option; False
    if something is not as usual, and nothing was done.
    plan(longest, arguments, backward, of_mask, running), for fastseq.explain: what such a call runs, as in
    ops.Kernels. longest: the sizes, with as many queries and keys as the longest sequence has; of_mask: None,
    or of the mask that gets a gradient, for each dimension, whether it has it; running: see Running, None if
    the backward pass is foretold.
    makes_delta(keys, has_lengths, has_window): whether the backward pass may make delta, of some rows, of the
    weights that it sees, and not of output.
    """

    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]
    plain: Callable[..., bool] = lambda *_: False
    plan: Callable[..., dict[str, Any]] | None = None
    makes_delta: Callable[[int, bool, bool], bool] = cuda_attention.makes_delta


def cuda_kernels(engine: loops.Engine) -> Kernels:
    """The operators where attention runs on `engine`."""
    return Kernels(
        partial(_run, partial(cuda_attention.forward, engine), False),
        partial(_run_backward, partial(cuda_attention.backward, engine), False),
        partial(cuda_attention.plain, engine),
        partial(cuda_attention.plan_in_data, engine),
    )


KERNELS = {
    "cpu": Kernels(
        partial(_run, cpu_attention.forward, True),
        partial(_run_backward, cpu_attention.backward, True),
        _plain_on_cpu,
        cpu_attention.plan_in_data,
        cpu_attention.makes_delta,
    )
}
if _C.cuda_info()["built"]:
    KERNELS["cuda"] = cuda_kernels(loops.CUDA)

_DISPATCHED = Kernels(
    *(
        register(name, {where: getattr(k, name) for where, k in KERNELS.items()}, fake, unsupported)
        for name, fake in zip(OPERATORS, (_attention_fake, _attention_backward_fake), strict=True)
    )
)


def _kernels(*tensors: Tensor | None) -> Kernels:
    """The operators of the tensors' device, or those that ask the dispatcher first."""
    return KERNELS.get(plain_device(*tensors), _DISPATCHED) if nobody_listens() else _DISPATCHED


def attention(*arguments: Any) -> tuple[Tensor, ...]:
    """torch.ops.fastseq.attention, without the dispatcher where possible: see ops.recurrent_cell."""
    return _kernels(*arguments[:9]).attention(*arguments)  # all tensors but the seed


def attention_backward(*arguments: Any) -> list[Tensor]:
    """torch.ops.fastseq.attention_backward, without the dispatcher where possible."""
    return _kernels(*arguments[:12], *arguments[13:17]).attention_backward(*arguments)
