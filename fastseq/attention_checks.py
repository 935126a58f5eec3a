"""What the operators of attention accept, checked before any address reaches the kernels.

Everything in this file but check_values, which reads values, works on fake tensors too. What the public
function makes of its arguments before (ranks, broadcasting, options) is checked in attention.py.

B batch, Hq and Hkv query and key heads, Sq queries, Sk keys, D head size, Dv value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.compiler import is_compiling

from .checks import DTYPES, places_of, problem, tensors_with_kernels
from .dispatch import has_tangent


def is_causal_bias(x: object) -> bool:
    """Whether it is a CausalBias. Its module is asked for by name: importing it takes seconds."""
    return type(x).__module__ == "torch.nn.attention.bias" and type(x).__name__ == "CausalBias"


class Arguments(NamedTuple):
    """Those of the operator fastseq::attention."""

    query: Tensor  # (B, Hq, Sq, D), packed (total_q, Hq, D)
    key: Tensor  # (B, Hkv, Sk, D), packed (total_k, Hkv, D)
    value: Tensor  # (B, Hkv, Sk, Dv), packed (total_k, Hkv, Dv)
    attn_mask: Tensor | None  # (B, Hq, Sq, Sk), each of them or 1; bool, the query's dtype or float32
    key_lengths: Tensor | None  # (B,), int32 or int64
    cu_seqlens_q: Tensor | None  # (B + 1,), int32 or int64
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None  # (1 or B, Hq), in the dtype of sums
    sinks: Tensor | None  # (Hq,), in the dtype of sums
    seed: Tensor | None  # one int64, on the CPU or the query's device
    scale: float
    softcap: float  # 0: none
    dropout_p: float
    left: int  # of the window; -1: unlimited
    right: int
    bottom_right: bool
    return_weights: bool
    average_weights: bool = False  # over the heads, if weights are returned
    save: bool = False  # whether arguments and results are kept for the backward pass; fastseq.explain asks
    deterministic: bool = True  # of the gradients that autograd gives the results


class Attention(NamedTuple):
    """The sizes of one call of attention; of packed sequences queries and keys are the sums."""

    batch: int  # B
    heads: int  # Hq
    kv_heads: int  # Hkv
    queries: int  # Sq
    keys: int  # Sk
    head_size: int  # D
    value_size: int  # Dv


def dtype_of_sums(dtype: torch.dtype) -> torch.dtype:
    """In which the kernels add, and in which lse, slopes and sinks are."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def is_differentiated(given: Tensor) -> bool:
    """Whether it requires a gradient, or has a tangent. Of what torch.compile traces, and of what
    torch.func.vmap maps, the operator asks that itself."""
    if given.requires_grad and torch.is_grad_enabled():
        return True
    if is_compiling() or is_batchedtensor(given):
        return False
    return torch._C._is_fwd_grad_enabled() and has_tangent([given])


def raise_for_trained_slopes() -> NoReturn:
    raise RuntimeError(
        problem(
            "alibi_slopes that require a gradient",
            "constant slopes",
            "alibi_slopes.detach(), or attn_mask for a bias that is trained",
        )
    )


def check_attention(a: Arguments) -> Attention:
    """The sizes; raises RuntimeError for what the kernels cannot take."""
    query, key, value, mask, key_lengths, cu_seqlens_q, cu_seqlens_k, slopes, sinks, *_ = a
    dtype, device = query.dtype, query.device
    if not (dtype in DTYPES and key.dtype is dtype and value.dtype is dtype):
        _raise_for_dtypes(query, key, value)
    if not (key.device == device and value.device == device):
        _raise_for_device("key" if key.device != device else "value", a)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        sizes = _sizes(query.shape, key.shape, value.shape)
    else:
        sizes = _packed_sizes(a)
    if mask is not None:
        _check_mask(mask, a, sizes)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, a, sizes)
    if slopes is not None or sinks is not None:
        _check_heads(a, sizes)
    if a.dropout_p != 0:
        _check_dropout(a)
    if a.left < -1 or a.right < -1 or not a.softcap >= 0:
        raise ValueError(
            problem(
                f"left {a.left}, right {a.right}, softcap {a.softcap}",
                "left and right of at least -1 (unlimited), softcap of at least 0 (none)",
                "fastseq.scaled_dot_product_attention, which makes these numbers",
            )
        )
    return sizes


# --------------------------------------------------------------------------------------- query, key and value


def _raise_for_dtypes(query: Tensor, key: Tensor, value: Tensor) -> NoReturn:
    if query.dtype in DTYPES:
        name, wrong = ("key", key) if key.dtype != query.dtype else ("value", value)
        raise RuntimeError(
            problem(
                f"{name} of dtype {wrong.dtype} beside query of dtype {query.dtype}",
                "one dtype for query, key and value",
                f"{name}.to({query.dtype})",
            )
        )
    raise NotImplementedError(  # which is a RuntimeError
        problem(
            f"query of dtype {query.dtype}",
            "query, key and value in " + ", ".join(str(dtype) for dtype in DTYPES),
            "query.float(), key.float(), value.float()",
        )
    )


def _raise_for_device(name: str, a: Arguments) -> NoReturn:
    raise RuntimeError(
        problem(
            f"{name} on device {getattr(a, name).device} beside query on device {a.query.device}",
            f"{name} on the query's device",
            f"{name}.to({str(a.query.device)!r})",
        )
    )


def _sizes(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> Attention:
    if not len(query) == len(key) == len(value) == 4:
        raise RuntimeError(
            problem(
                f"query, key and value with {len(query)}, {len(key)} and {len(value)} dimensions",
                "4 dimensions each, (B, heads, rows, features), in the operator",
                "fastseq.scaled_dot_product_attention, which takes other ranks",
            )
        )
    batch, heads, queries, size = query
    value_batch, kv_heads, keys, value_size = value
    if key != (batch, kv_heads, keys, size) or value_batch != batch:
        _raise_for_shapes(query, key, value)
    if heads != kv_heads or kv_heads == 0 or size == 0 or value_size == 0:
        _check_sizes_of_heads(heads, kv_heads, size, value_size)
    return Attention(batch, heads, kv_heads, queries, keys, size, value_size)


def _raise_for_shapes(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> NoReturn:
    if key[-1] != query[-1]:
        name, other, what, remedy = "key", "query", "the same last dimension, D", "check the projections"
    elif key[-2] != value[-2]:
        name, other, what, remedy = "value", "key", "a value for each key: the same Sk", "check both lengths"
    elif key[-3] != value[-3]:
        name, other, what, remedy = "value", "key", "the same number of heads, Hkv", "repeat_interleave"
    else:
        name = "key" if key[0] != query[0] else "value"
        other, what, remedy = "query", "the same batch", "check the order of the dimensions"
    shapes = {"query": query, "key": key, "value": value}
    given = f"{name} of shape {tuple(shapes[name])}, {other} of shape {tuple(shapes[other])}"
    raise RuntimeError(problem(given, what, remedy))


def _check_sizes_of_heads(heads: int, kv_heads: int, head_size: int, value_size: int) -> None:
    if kv_heads == 0 or heads % kv_heads:
        raise RuntimeError(
            problem(
                f"query with {heads} heads, key and value with {kv_heads}",
                "heads of key and value, at least one, that divide those of query",
                "check the order of the dimensions, (..., heads, rows, features)",
            )
        )
    if head_size == 0 or value_size == 0:
        name, letter = ("query and key", "D") if head_size == 0 else ("value", "Dv")
        raise RuntimeError(problem(f"{name} with {letter} = 0", "at least one feature", "check the shapes"))


# ------------------------------------------------------------------------------------------- packed sequences


def _packed_sizes(a: Arguments) -> Attention:
    for name in ("attn_mask", "key_lengths", "return_weights"):
        if getattr(a, name) is not None and getattr(a, name) is not False:
            raise NotImplementedError(
                problem(
                    f"{name} with cu_seqlens_q and cu_seqlens_k",
                    f"{name} with padded sequences (..., heads, rows, features)",
                    f"leave {name} out, or pad the sequences",
                )
            )
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        seqlens: Tensor | None = getattr(a, name)
        if seqlens is None:
            raise RuntimeError(
                problem(
                    f"no {name}, but the other one",
                    "cu_seqlens_q and cu_seqlens_k, or none",
                    f"{name}=torch.tensor([0, first length, first + second length, ...])",
                )
            )
        _check_integers(name, seqlens, a)
        if seqlens.dim() != 1 or seqlens.shape[0] < 1:
            raise RuntimeError(
                problem(
                    f"{name} of shape {tuple(seqlens.shape)}",
                    "shape (B + 1,), for B sequences",
                    f"{name}=torch.tensor([0, first length, first + second length, ...])",
                )
            )
    assert a.cu_seqlens_q is not None
    assert a.cu_seqlens_k is not None
    batch, batch_of_keys = a.cu_seqlens_q.shape[0] - 1, a.cu_seqlens_k.shape[0] - 1
    if batch != batch_of_keys:
        raise RuntimeError(
            problem(
                f"cu_seqlens_q for {batch} sequences, cu_seqlens_k for {batch_of_keys}",
                "the same number of sequences",
                "a sequence without keys has its start as its end",
            )
        )
    query, key, value = a.query.shape, a.key.shape, a.value.shape
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) != 3:
            raise RuntimeError(
                problem(
                    f"{name} of shape {tuple(shape)} with cu_seqlens_q and cu_seqlens_k",
                    "3 dimensions, (rows of all sequences, heads, features)",
                    f"torch.cat of the sequences' {name}, each (rows, heads, features)",
                )
            )
    if key[2] != query[2] or key[:2] != value[:2]:
        other = f"query of shape {tuple(query)}" if key[2] != query[2] else f"value of shape {tuple(value)}"
        raise RuntimeError(
            problem(
                f"key of shape {tuple(key)}, {other}",
                "query (total_q, Hq, D), key (total_k, Hkv, D), value (total_k, Hkv, Dv)",
                "check the order of the dimensions",
            )
        )
    _check_sizes_of_heads(query[1], key[1], query[2], value[2])
    return Attention(batch, query[1], key[1], query[0], key[0], query[2], value[2])


# ---------------------------------------------------------------------------------------------- what is added


def _check_integers(name: str, tensor: Tensor, a: Arguments) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        remedy = "attn_mask, for a mask" if tensor.dtype is torch.bool else f"{name}.long()"
        raise RuntimeError(problem(f"{name} of dtype {tensor.dtype}", "torch.int32 or torch.int64", remedy))
    if tensor.device != a.query.device:
        _raise_for_device(name, a)


def _check_mask(mask: Tensor, a: Arguments, sizes: Attention) -> None:
    dtype = a.query.dtype
    allowed = (torch.bool, dtype) if dtype is torch.float64 else (torch.bool, dtype, torch.float32)
    if mask.dtype not in allowed:
        raise RuntimeError(
            problem(
                f"attn_mask of dtype {mask.dtype} beside query of dtype {dtype}",
                "torch.bool (True: may attend), the query's dtype or torch.float32 (added to the scores)",
                f"attn_mask.to({dtype})" if mask.is_floating_point() else "attn_mask.bool()",
            )
        )
    if mask.device != a.query.device:
        _raise_for_device("attn_mask", a)
    full = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    if mask.dim() != 4 or not broadcasts(mask.shape, full):
        raise_for_mask(mask.shape, full)


def broadcasts(given: Sequence[int], full: Sequence[int]) -> bool:
    if len(given) > len(full):
        return False
    for n, size in zip(reversed(given), reversed(full), strict=False):  # noqa: SIM110  all() takes longer
        if n != 1 and n != size:
            return False
    return True


def raise_for_mask(given: Sequence[int], full: Sequence[int]) -> NoReturn:
    raise RuntimeError(
        problem(
            f"attn_mask of shape {tuple(given)}",
            f"what broadcasts to (..., Hq, Sq, Sk), here {tuple(full)}",
            "attn_mask[:, None, None, :]" if tuple(given) == (full[0], full[-1]) else "check its dimensions",
        )
    )


def _check_key_lengths(key_lengths: Tensor, a: Arguments, sizes: Attention) -> None:
    _check_integers("key_lengths", key_lengths, a)
    if key_lengths.shape != (sizes.batch,):
        raise RuntimeError(
            problem(
                f"key_lengths of shape {tuple(key_lengths.shape)}",
                f"shape ({sizes.batch},), a length for each entry of the batch",
                "key_lengths.flatten() where the batch has several dimensions",
            )
        )


def _check_heads(a: Arguments, sizes: Attention) -> None:
    """Slopes and sinks, of which there is one for each head."""
    dtype, heads = dtype_of_sums(a.query.dtype), sizes.heads
    for name, rows in (("alibi_slopes", (1, sizes.batch)), ("sinks", ())):
        tensor: Tensor | None = getattr(a, name)
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            raise RuntimeError(
                problem(f"{name} of dtype {tensor.dtype}", f"{dtype} in the operator", f"{name}.to({dtype})")
            )
        if tensor.device != a.query.device:
            _raise_for_device(name, a)
        if (
            tensor.shape[-1:] != (heads,)
            or tensor.dim() != 1 + bool(rows)
            or tensor.shape[0] not in (rows or (heads,))
        ):
            batched = f" or ({sizes.batch}, {heads})" * bool(rows)
            given = tensor.shape[1:] if rows and tensor.shape[:1] == (1,) else tensor.shape
            raise RuntimeError(
                problem(
                    f"{name} of shape {tuple(given)}",
                    f"shape ({heads},){batched}, a number for each head of query",
                    "check the number of heads",
                )
            )


def _check_dropout(a: Arguments) -> None:
    seed = a.seed
    good = seed is not None and seed.dtype is torch.int64 and seed.numel() == 1
    good = good and (seed.device.type == "cpu" or seed.device == a.query.device)
    if not good or not 0 < a.dropout_p < 1:
        raise RuntimeError(
            problem(
                f"dropout_p={a.dropout_p} with {'no seed' if seed is None else 'a seed'}",
                "dropout_p in [0, 1), in the operator with a seed: one int64, on the CPU or beside query",
                "torch.randint(2**63 - 1, (1,))",
            )
        )


# ----------------------------------------------------------------------------------------------------- values


def _values(tensor: Tensor) -> list[int]:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.tolist()


def check_values(a: Arguments, sizes: Attention) -> None:
    """Raises RuntimeError if lengths would lead the kernels out of bounds.

    Every kernel that is about to run asks this, of subclasses of Tensor too; fake implementations, which
    read nothing, do not.
    """
    if a.key_lengths is not None and sizes.batch:
        lengths = _values(a.key_lengths)
        if min(lengths) < 0 or max(lengths) > sizes.keys:
            raise RuntimeError(
                problem(
                    f"key_lengths from {min(lengths)} to {max(lengths)} for {sizes.keys} keys",
                    f"lengths from 0 to {sizes.keys}",
                    f"key_lengths.clamp(0, {sizes.keys})",
                )
            )
    for name, rows in (("q", sizes.queries), ("k", sizes.keys)):
        seqlens: Tensor | None = getattr(a, f"cu_seqlens_{name}")
        if seqlens is None:
            continue
        starts = _values(seqlens)
        if starts[0] != 0 or starts[-1] != rows or any(x > y for x, y in pairwise(starts)):
            decrease = " and decrease" * any(x > y for x, y in pairwise(starts))
            raise RuntimeError(
                problem(
                    f"cu_seqlens_{name} that start at {starts[0]}, end at {starts[-1]}{decrease}, "
                    f"for {rows} rows",
                    f"values that start at 0, never decrease and end at {rows}",
                    "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))",
                )
            )


def unsupported(op: str, arguments: Sequence[object]) -> NoReturn:
    """Raises for tensors on a device (or of a layout) for which there is no kernel."""
    where, devices = places_of(arguments)
    if devices > 1:
        raise RuntimeError(
            problem(
                f"query, key, value and other tensors on different devices: {', '.join(where)}",
                "one device for all tensors",
                "key.to(query.device)",
            )
        )
    raise NotImplementedError(
        problem(
            f"query, key and value on {', '.join(where)}, where {op} has no kernel",
            tensors_with_kernels(),
            "query.cpu() or query.to_dense(), or torch.nn.functional.scaled_dot_product_attention",
        )
    )
