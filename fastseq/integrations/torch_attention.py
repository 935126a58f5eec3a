"""fastseq in torch.nn.attention's registry of flash attention implementations.

What an implementation replaces there are torch's own operators, on the CPU and on CUDA:

    _scaled_dot_product_flash_attention_for_cpu, _backward    (B, H, S, D), what F.sdpa calls on a CPU
    _scaled_dot_product_flash_attention, _backward            the same on CUDA
    _flash_attention_forward, _no_dropout_inplace, _backward  (B, S, H, D), or packed: varlen_attn calls it

Their contract, beside shapes and memory as torch's fake implementations have them: logsumexp is to the base e
and all that a backward pass knows of the softmax, so that it may be that of more keys than the call's (ring
attention); causal puts the last query beside the last key on CUDA, the first beside the first on the CPU; the
random state is two numbers in uint64, the first of which is the seed here.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.library import Library

from .. import attention_ops
from ..attention_checks import Arguments, dtype_of_sums
from ..checks import problem

NAME = "fastseq"


def register() -> None:
    """Makes torch.nn.attention.activate_flash_attention_impl("fastseq") known.

    While it is active, torch.nn.functional.scaled_dot_product_attention computes with fastseq's kernels what
    torch would give to its flash attention, with gradients: on the CPU calls without dropout and without a
    mask that requires a gradient; on CUDA, where fastseq has its kernels, what torch's flash attention takes
    there, and torch.nn.attention.varlen. torch.nn.attention.restore_flash_attention_impl() puts torch's own
    back, also between a forward pass and its backward pass. It may be called again.

    Unlike `fastseq.patched` it reaches every caller, however it came by the function, and what
    torch.compile has compiled already; but no masks with gradients, sinks and other options of
    `fastseq.scaled_dot_product_attention`, and no modules.

    Raises:
        ImportError: this torch has no such registry; 2.13 has.

    Example:
        >>> from torch.nn import attention
        >>> fastseq.integrations.torch_attention.register()
        >>> attention.activate_flash_attention_impl("fastseq")
        >>> query = torch.randn(1, 2, 5, 8, requires_grad=True)
        >>> torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        >>> attention.restore_flash_attention_impl()
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise ImportError(
            problem(
                f"torch {torch.__version__}, without a registry of flash attention implementations",
                "a torch that has torch.nn.attention.register_flash_attention_impl; 2.13 does",
                "with fastseq.patched(): ..., or a newer torch",
            )
        ) from error
    register_flash_attention_impl(NAME, register_fn=_Active)


def is_active() -> bool:
    """Whether torch's operators are fastseq's at present."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # older torch has none
    return current is not None and current() == NAME


class _Active:
    """torch's operators replaced, until remove()."""

    def __init__(self) -> None:
        self._library = Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # that one is replaced
            for device, kernels in OPERATORS.items():
                if device in attention_ops.KERNELS:
                    for name, kernel in kernels.items():
                        self._library.impl(name, kernel, device.upper())

    def remove(self) -> None:
        self._library._destroy()


# ------------------------------------------------------------------------------------------- of all operators


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    scale: float | None,
    *,
    left: int = -1,
    right: int = -1,
    bottom_right: bool = False,
    seed: Tensor | None = None,
    **tensors: Tensor | None,
) -> Arguments:
    names = ("attn_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes")
    given = (tensors.get(name) for name in names)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    numbers = (scale, 0.0, dropout_p, left, right, bottom_right, False)
    return Arguments(query, key, value, *given, None, seed, *numbers)


def _forward(a: Arguments, nothing: float) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, which is `nothing` of queries that see no key."""
    output, lse, *_ = attention_ops.attention(*a)
    return output, lse.masked_fill_(lse == -math.inf, nothing)


def _backward(a: Arguments, grad_out: Tensor, out: Tensor, logsumexp: Tensor) -> list[Tensor]:
    tensors, numbers = a[:10], a[10:16]
    out, grad_lse = _of_few_keys(a, grad_out, out, logsumexp)
    normalizer = _normalizer(a, logsumexp)
    wanted = [True, True, True, False, False]
    return attention_ops.attention_backward(
        grad_out, grad_lse, None, *tensors, out, normalizer, None, None, *numbers, wanted
    )


_FEW_KEYS = 16


def _of_few_keys(
    a: Arguments, grad_out: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor | None]:
    """An output and a gradient of logsumexp with which the engines' gradients are right.

    Of a row with few keys an engine may make delta, <grad_out, out>, of the weights of these keys, for which
    it takes them to be all keys. If logsumexp is that of more keys, out is not what these weights make. So
    rows that may be such are computed again, out is what their weights make, and what is missing of delta
    comes as the gradient of logsumexp. That is next to nothing, but for packed sequences and small windows.
    """
    rows, keys = _rows_of_few_keys(a)
    if rows == 0:
        return out, None
    packed = a.cu_seqlens_q is not None
    part = a if packed else _first(a, rows, keys)
    output, lse, *_ = attention_ops.attention(*part)
    of_all = logsumexp if packed else logsumexp[:, :, :rows]
    share = torch.where(lse == -math.inf, 0, (lse - of_all).exp())  # of the weights in those of all keys
    share = share.transpose(0, 1) if packed else share
    made = (output * share.unsqueeze(-1)).to(out.dtype)
    grad_lse = torch.zeros_like(logsumexp, dtype=lse.dtype, memory_format=torch.contiguous_format)
    if packed:
        grad_lse.copy_(_delta(grad_out, made).sub_(_delta(grad_out, out)).t())
        return made, grad_lse
    given, before = grad_out[:, :, :rows], out[:, :, :rows]
    grad_lse[:, :, :rows] = _delta(given, made) - _delta(given, before)
    return torch.cat([made, out[:, :, rows:]], 2), grad_lse


def _delta(grad_out: Tensor, out: Tensor) -> Tensor:
    dtype = dtype_of_sums(out.dtype)
    return (grad_out.to(dtype) * out.to(dtype)).sum(-1)


def _rows_of_few_keys(a: Arguments) -> tuple[int, int]:
    """The first rows, and the keys that they see, among which are all rows that see few keys."""
    queries, keys = a.query.shape[-2], a.key.shape[-2]
    if a.cu_seqlens_q is not None or keys <= _FEW_KEYS:
        return queries, keys
    if a.left == a.right == -1:
        return 0, 0
    if a.right == 0 and not 0 <= a.left < _FEW_KEYS:  # causal
        offset = keys - queries if a.bottom_right else 0
        rows = min(queries, max(0, _FEW_KEYS - offset))
        return rows, min(keys, max(0, rows + offset))
    return queries, keys


def _first(a: Arguments, rows: int, keys: int) -> Arguments:
    mask = a.attn_mask
    if mask is not None:
        mask = mask[:, :, : rows if mask.shape[2] > 1 else 1, : keys if mask.shape[3] > 1 else 1]
    key, value = a.key[:, :, :keys], a.value[:, :, :keys]
    return a._replace(query=a.query[:, :, :rows], key=key, value=value, attn_mask=mask)


def _normalizer(a: Arguments, logsumexp: Tensor) -> Tensor:
    """What makes weights of scores, with nothing but the logsumexp: see attention_ops.

    The engines' units are products, where nothing is added to those: Scores in csrc/cpu/attention_scores.h.
    """
    added = a.alibi_slopes is not None or (a.attn_mask is not None and a.attn_mask.dtype is not torch.bool)
    unit = a.scale if not added and a.scale > 1e-6 else 1.0
    lse = logsumexp.to(dtype_of_sums(a.query.dtype))
    highest = torch.where(lse.isfinite(), lse / unit, 0)
    inverse_sum = torch.where(lse.isfinite(), 1, torch.where(lse.isnan(), lse, 0))
    return torch.stack([highest, inverse_sum])


# --------------------------------------------------------------------------------------------------- on a CPU


def _for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    mask: Tensor | None,
    scale: float | None,
) -> Arguments:
    if dropout_p:
        raise NotImplementedError(
            problem(
                f"dropout_p={dropout_p} for torch's flash attention on a CPU",
                "dropout_p=0.0",
                "torch.nn.functional.scaled_dot_product_attention, which knows of it",
            )
        )
    if mask is not None:
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
        mask = mask.double() if query.dtype is torch.float64 and mask.dtype is torch.float32 else mask
    return _arguments(query, key, value, 0.0, scale, right=0 if is_causal else -1, attn_mask=mask)


def _sequence_before_heads(x: Tensor) -> Tensor:
    """(B, H, S, ...) that lies in memory as (B, S, H, ...)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    output, lse = _forward(_for_cpu(query, key, value, dropout_p, is_causal, attn_mask, scale), 0.0)
    return output, _sequence_before_heads(lse)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    a = _for_cpu(query, key, value, dropout_p, is_causal, attn_mask, scale)
    return tuple(_sequence_before_heads(grad) for grad in _backward(a, grad_out, out, logsumexp))


# ---------------------------------------------------------------------------------------------------- on CUDA


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                problem(
                    f"{name} for torch's flash attention by fastseq",
                    "the other arguments",
                    "torch.nn.attention.restore_flash_attention_impl() before this call",
                )
            )


def _limit(given: int | None) -> int:
    return -1 if given is None or given < 0 else given


def _seed_and_state(query: Tensor, dropout_p: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """The seed, if there is dropout, and the two that are returned to be handed to the backward pass."""
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p:
        state[:1].random_(2**63 - 1)
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    return (state[:1] if dropout_p else None), state.view(torch.uint64), unused.view(torch.uint64)


def _seed_of(state: Tensor, dropout_p: float) -> Tensor | None:
    return state.view(torch.int64)[:1] if dropout_p else None


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _refuse(return_debug_mask=return_debug_mask)
    seed, state, unused = _seed_and_state(query, dropout_p)
    right = 0 if is_causal else -1
    a = _arguments(query, key, value, dropout_p, scale, right=right, bottom_right=True, seed=seed)
    output, lse = _forward(a, math.inf)
    return output, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    seed, right = _seed_of(philox_seed, dropout_p), 0 if is_causal else -1
    a = _arguments(query, key, value, dropout_p, scale, right=right, bottom_right=True, seed=seed)
    return tuple(_backward(a, grad_out, out, logsumexp))


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,  # how to cut is the plan's to say; the result is the same
) -> tuple[Tensor, ...]:
    packed = cum_seq_q is not None
    _refuse(return_debug_mask=return_debug_mask, block_table=block_table)
    _refuse(**{"seqused_k beside cum_seq_q": seqused_k if packed else None})
    seed, state, unused = _seed_and_state(query, dropout_p)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(dtype_of_sums(query.dtype)).view(-1, query.shape[-2])
    a = _arguments(
        *(x if packed else x.transpose(1, 2) for x in (query, key, value)),
        dropout_p,
        scale,
        left=_limit(window_size_left),
        right=0 if is_causal else _limit(window_size_right),
        bottom_right=True,
        seed=seed,
        key_lengths=seqused_k,
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        alibi_slopes=alibi_slopes,
    )
    output, lse = _forward(a, math.inf)
    output = output if packed else output.transpose(1, 2)
    return output, lse, state, unused, query.new_empty(0)


def _flash_in_place(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output, lse, *_ = _flash(*args, **kwargs)
    out.copy_(output)
    return lse


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    packed = cum_seq_q is not None

    def turned(x: Tensor) -> Tensor:
        return x if packed else x.transpose(1, 2)

    a = _arguments(
        *map(turned, (query, key, value)),
        dropout_p,
        scale,
        left=_limit(window_size_left),
        right=0 if is_causal else _limit(window_size_right),
        bottom_right=True,
        seed=_seed_of(rng_state, dropout_p),
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
    )
    grads = _backward(a, turned(grad_out), turned(out), logsumexp)
    return tuple(map(turned, grads))


OPERATORS = {
    "cpu": {
        "_scaled_dot_product_flash_attention_for_cpu": _cpu,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
    },
    "cuda": {
        "_scaled_dot_product_flash_attention": _cuda,
        "_scaled_dot_product_flash_attention_backward": _cuda_backward,
        "_flash_attention_forward": _flash,
        "_flash_attention_forward_no_dropout_inplace": _flash_in_place,
        "_flash_attention_backward": _flash_backward,
    },
}
