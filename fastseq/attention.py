"""Scaled dot-product attention: the public function, and what it makes of its arguments.

The operators take four dimensions, (B, heads, rows, features), or packed sequences in three, and options as
numbers. Here other ranks become that, and back; batches are broadcast, and words become numbers. Sizes,
dtypes and devices are the operators' to check: see attention_checks.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import attention_ops, autocast, autograd
from .attention_checks import (
    broadcasts,
    dtype_of_sums,
    is_causal_bias,
    is_differentiated,
    raise_for_mask,
    refuse_trained_slopes,
)
from .checks import problem, require_tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    average_weights: bool = False,
    deterministic: bool = True,
) -> Any:
    """softmax(scale Q K^T + mask) V, in one kernel that never stores the scores.

    The first arguments are those of `torch.nn.functional.scaled_dot_product_attention`, with its shapes and
    its meaning, so that it can stand in for it; the keywords are what torch leaves out.

    For query i and key j, of which query head h reads key and value head h // (Hq // Hkv):

        t_ij = scale * <q_i, k_j>
        t_ij = softcap * tanh(t_ij / softcap)                              if there is a softcap
        s_ij = t_ij + attn_mask_ij - alibi_slopes_h * |i + offset - j|
        lse_i = log(sum_j exp(s_ij) + exp(sinks_h))                        over the keys that i may see
        weights_ij = dropout(exp(s_ij - lse_i))
        output_i = sum_j weights_ij v_j

    Key j is visible to query i if every one of `attn_mask`, `causal`, `window` and `key_lengths` allows it. A
    query that sees no key has output 0, gradients 0 and lse -inf (or its sink), never NaN; and NaN or
    infinity in a key or value that nobody sees reaches no result.

    `...` are any number of batch dimensions, also none; they are broadcast. A head dimension may be missing.

    Args:
        query: (..., Hq, Sq, D).
        key: (..., Hkv, Sk, D).
        value: (..., Hkv, Sk, Dv). Dv may differ from D. All three have one dtype, float32, float64, bfloat16
            or float16; the last dimension lies dense in memory, or is copied. All other strides are free: a
            transposed (B, S, H, D) is read where it lies.
        attn_mask: bool (True: may attend), or of the query's dtype or float32, and added to the scores. Any
            shape that broadcasts to (..., Hq, Sq, Sk). A float mask gets a gradient, summed over what is
            broadcast. `torch.nn.attention.bias.causal_upper_left` and `causal_lower_right` are `causal`.
        dropout_p: probability of zeroing a weight, from 0 to 1; applied whenever it is not 0, as torch does.
            The seed comes from the default generator of the query's device; which weights are dropped is
            computed from it anew in the backward pass, and not stored.
        is_causal: the same as causal="top_left".
        scale: 1 / sqrt(D) if None.
        enable_gqa: whether query may have a multiple of the heads of key and value. A single head of these
            serves all query heads in any case.
        causal: "top_left": query i sees keys j <= i, torch's alignment; "bottom_right": j <= i + offset,
            where offset is the number of keys (of that sequence) minus that of queries, so that the last
            query sees the last key, as after a cache. The offset is 0 in all other cases.
        window: (left, right): query i sees keys from i + offset - left to i + offset + right; None or -1 is
            no limit.
        softcap: bounds the scores smoothly to (-softcap, softcap); above 0, or None or 0 for none.
        alibi_slopes: (Hq,) or (B, Hq), of a float dtype; without gradient.
        sinks: (Hq,), of a float dtype: one more logit for each head, whose weight is dropped; with gradient.
        key_lengths: (B,), int32 or int64: keys from key_lengths[b] on are hidden. B is the product of the
            batch dimensions.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), int32 or int64: packed sequences. query is (total_q, Hq, D), key
            (total_k, Hkv, D), value (total_k, Hkv, Dv), and sequence b has the rows from cu_seqlens[b] to
            cu_seqlens[b + 1]. Not with attn_mask, key_lengths or return_weights.
        return_lse: whether to return lse too, the log-sum-exp of each query's scores, to the base e.
        return_weights: whether to return the weights too, after dropout. They take Sq * Sk numbers a head.
        average_weights: whether these are the mean over the heads. Without gradients, nothing larger than the
            mean is stored.
        deterministic: whether gradients are the same bits every time. If not, those on CUDA may be made in
            one pass, in which blocks add to the gradient of query in float32 in the order in which they come.

    Returns:
        output (..., Hq, Sq, Dv), packed (total_q, Hq, Dv), in memory as query is: of a transposed (B, S, H,
        D) the output is one too. With `return_lse` or `return_weights` a tuple, in this order: output, lse
        (..., Hq, Sq), packed (Hq, total_q), in float32, or float64 beside float64, and weights (..., Hq, Sq,
        Sk), or (..., Sq, Sk) if averaged, in the query's dtype. All are differentiable.

    Raises:
        TypeError: what is no tensor, number or bool where one is expected; a scale or softcap that requires a
            gradient or has a tangent.
        RuntimeError: shapes that do not fit together, mixed dtypes or devices, lengths out of bounds on the
            CPU (on CUDA nobody looks at them before the kernels, which take the nearest that are not), heads
            of more than 256 features on CUDA, alibi_slopes with a gradient or a tangent, dropout_p out of
            bounds; a third derivative.
        ValueError: a causal, window or softcap that is none of those above, is_causal beside
            causal="bottom_right".
        NotImplementedError: packed sequences with attn_mask, key_lengths or return_weights; nested tensors; a
            dtype, device or layout without a kernel.

    There are first and second derivatives, in reverse mode and, at most once, in forward mode: gradients of
    gradients, torch.func.jvp, dual numbers, Hessian-vector products. Third ones raise an error. Forward mode
    is one pass, of results and tangents; of second derivatives two, which save nothing of size Sq * Sk.
    Saved for the backward pass: the tensors that are given, output, in 16-bit dtypes what rounding took from
    it, two numbers for each query, and the weights if they are returned.

    Vaswani et al., Attention Is All You Need, 2017; Milakov and Gimelshein, Online normalizer calculation for
    softmax, 2018; Dao et al., FlashAttention, 2022.

    Example:
        >>> query, key, value = (torch.randn(2, 4, 10, 16) for _ in range(3))
        >>> output = fastseq.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> output.shape, torch.allclose(output, theirs, atol=1e-5)
        (torch.Size([2, 4, 10, 16]), True)
        >>> output, lse = fastseq.scaled_dot_product_attention(
        ...     query[:, :, -1:], key, value, causal="bottom_right", window=(7, 0), return_lse=True)
        >>> output.shape, lse.shape  # of one more token, which sees the last eight
        (torch.Size([2, 4, 1, 16]), torch.Size([2, 4, 1]))
    """
    if autocast.is_on():
        query, key, value, attn_mask = (
            x if is_causal_bias(x) else autocast.lowered(x) for x in (query, key, value, attn_mask)
        )
    if (
        attn_mask is None
        and (dropout_p == 0.0 and causal is None and window is None and softcap is None)
        and (key_lengths is None and cu_seqlens_q is None and cu_seqlens_k is None)
        and (alibi_slopes is None and sinks is None and not (return_lse or return_weights))
        and (scale is None or type(scale) is float)
        and type(is_causal) is type(enable_gqa) is bool
        and (type(query) is type(key) is type(value) is Tensor)
        and not (query.is_nested or key.is_nested or value.is_nested)
        and not (autograd.recording() and autograd.needs_gradient(query, key, value))
    ):
        output = attention_ops.plain(query, key, value, is_causal, scale, enable_gqa)
        if output is not None:
            return output
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, given in (("query", query), ("key", key), ("value", value)):
            require_tensor(name, given)
    _refuse_nested(query, key, value)
    if enable_gqa is not False and enable_gqa is not True:
        raise _no_bool("enable_gqa", enable_gqa)
    lead, rank = None, 4  # as the operator wants it
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        _check_packed(query, key, cu_seqlens_q, cu_seqlens_k, enable_gqa)
    else:
        q, k, v = query.shape, key.shape, value.shape
        plain = len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and k[1] == v[1]
        if not plain or (q[1] != k[1] and not enable_gqa):
            rank = max(len(q), len(k), len(v))
            query, key, value, lead = _in_four_dimensions(query, key, value, enable_gqa)
    if attn_mask is not None and is_causal_bias(attn_mask):
        causal, attn_mask = _alignment(attn_mask, is_causal, causal, query, key), None
    if attn_mask is not None:
        attn_mask = _mask_in_four_dimensions(attn_mask, query, key, lead)

    left = right = -1
    bottom_right = False
    if is_causal is not False or causal is not None or window is not None:
        left, right, bottom_right = _positions(is_causal, causal, window)
    scale = 1 / math.sqrt(max(1, query.shape[-1])) if scale is None else _number("scale", scale)
    softcap = 0.0 if softcap is None else _softcap(softcap)
    seed, drop_all = None, False
    if dropout_p != 0.0:
        dropout_p = _dropout(dropout_p)
        drop_all = dropout_p == 1
        if drop_all or dropout_p == 0:
            dropout_p = 0.0
        else:
            seed = _seed(query)
    if alibi_slopes is not None:
        alibi_slopes = _slopes(alibi_slopes, query)
    if sinks is not None:
        sinks = _per_head("sinks", sinks, query)
    if key_lengths is not None:
        require_tensor("key_lengths", key_lengths)

    output, lse, weights, *_ = autograd.attention(
        query,
        key,
        value,
        attn_mask,
        key_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        sinks,
        seed,
        scale,
        softcap,
        float(dropout_p),
        left,
        right,
        bottom_right,
        bool(return_weights),
        bool(return_weights and average_weights),
        bool(deterministic),
    )
    if drop_all:
        nothing = torch.ones((), dtype=torch.bool, device=output.device)
        output, weights = output.masked_fill(nothing, 0), weights.masked_fill(nothing, 0)
    if lead is not None:
        output = _as_it_was(output, lead, rank)
    if not (return_lse or return_weights):
        return output
    results = [output]
    if return_lse:
        results.append(lse if lead is None else _as_it_was(lse, lead, rank))
    if return_weights:
        weights = weights if lead is None else _as_it_was(weights, lead, rank)
        results.append(weights.squeeze(-3) if average_weights and weights.dim() > 2 else weights)
    return tuple(results)


# ------------------------------------------------------------------------------------- ranks and broadcasting


def _in_four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """All three as (B, heads, rows, features), views where possible, and the batch dimensions, broadcast."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            raise RuntimeError(
                problem(
                    f"{name} with {tensor.dim()} dimension(s)",
                    "at least 2 dimensions, (rows, features)",
                    f"{name}.unsqueeze(0)",
                )
            )
    query, key, value = (x if x.dim() > 2 else x.unsqueeze(0) for x in (query, key, value))
    heads, kv_heads = query.shape[-3], _kv_heads(key.shape[-3], value.shape[-3])
    _check_gqa(heads, kv_heads, enable_gqa)
    if heads == 1 and not enable_gqa:  # broadcast like a batch dimension
        heads = kv_heads
    leads = [tuple(x.shape[:-3]) for x in (query, key, value)]
    lead = leads[0]
    if not (leads[0] == leads[1] == leads[2]):
        try:
            lead = tuple(torch.broadcast_shapes(*leads))
        except RuntimeError as error:
            raise RuntimeError(
                problem(
                    "query, key and value with batch dimensions " + ", ".join(map(str, leads)),
                    "batch dimensions that broadcast",
                    "check the order of the dimensions: (..., heads, rows, features)",
                )
            ) from error
    return (
        _flat(query, lead, heads),
        _flat(key, lead, kv_heads),
        _flat(value, lead, kv_heads),
        lead,
    )


def _flat(tensor: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """(B, heads, rows, features)"""
    shape = (*lead, heads, *tensor.shape[-2:])
    if tensor.shape != shape:
        tensor = tensor.expand(shape)
    return tensor if len(lead) == 1 else tensor.reshape(math.prod(lead), *shape[-3:])


def _as_it_was(tensor: Tensor, lead: tuple[int, ...], rank: int) -> Tensor:
    """With the batch dimensions of the arguments, and without heads if the arguments had none."""
    if rank == 2:
        return tensor[0, 0]
    if rank == 3:
        return tensor[0]
    return tensor if len(lead) == 1 else tensor.unflatten(0, lead)


def _kv_heads(of_key: int, of_value: int) -> int:
    if of_key == of_value or of_value == 1:
        return of_key
    if of_key == 1:
        return of_value
    raise RuntimeError(
        problem(
            f"value with {of_value} heads, key with {of_key}",
            "the same number of heads, or one head",
            "repeat_interleave the heads of one of them",
        )
    )


def _check_gqa(heads: int, kv_heads: int, enable_gqa: bool) -> None:
    if heads == kv_heads or kv_heads == 1 or (heads == 1 and not enable_gqa):
        return
    divisible = kv_heads > 0 and heads % kv_heads == 0
    if enable_gqa and divisible:
        return
    raise RuntimeError(
        problem(
            f"query with {heads} heads, key and value with {kv_heads}, enable_gqa={enable_gqa}",
            "the same number of heads, or with enable_gqa=True one that divides that of query",
            "enable_gqa=True"
            if divisible
            else "check the order of the dimensions, (..., heads, rows, features)",
        )
    )


def _check_packed(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, enable_gqa: bool
) -> None:
    """What the operator does not ask; it looks at ranks and sizes."""
    for name, seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if seqlens is not None:
            require_tensor(name, seqlens)
    if query.dim() == 3 and key.dim() == 3:
        _check_gqa(query.shape[1], key.shape[1], enable_gqa)
    elif query.dim() == 0:
        raise RuntimeError(
            problem("query without dimensions", "3 dimensions, (rows, heads, features)", "query.reshape(...)")
        )


def _mask_in_four_dimensions(
    mask: Tensor, query: Tensor, key: Tensor, lead: tuple[int, ...] | None
) -> Tensor:
    """Each dimension that of the scores or 1, if it broadcasts; float64 beside float64."""
    require_tensor("attn_mask", mask)
    if mask.dtype is torch.float32 and query.dtype is torch.float64:
        mask = mask.double()
    if query.dim() != 4 or (lead is None and mask.dim() == 4):
        return mask  # the operator has the last word
    lead = tuple(query.shape[:1]) if lead is None else lead
    full = (*lead, query.shape[1], query.shape[2], key.shape[2])
    given = tuple(mask.shape)
    if not broadcasts(given, full):
        raise_for_mask(given, full)
    given = (1,) * (len(full) - len(given)) + given
    if len(lead) == 1:
        return mask.view(given) if mask.dim() < 4 else mask
    mask, batch, rest = mask.reshape(given), given[:-3], given[-3:]
    if all(n == 1 for n in batch):
        return mask.reshape(1, *rest)
    return mask.expand(*lead, *rest).reshape(math.prod(lead), *rest)


# ---------------------------------------------------------------------------------------------------- options


def _refuse_nested(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError(
            problem(
                "a nested tensor",
                "dense tensors, or packed sequences",
                "x.values() and cu_seqlens_q=x.offsets(), of a jagged one (B, rows, heads, features)",
            )
        )


def _alignment(bias: Any, is_causal: bool, causal: str | None, query: Tensor, key: Tensor) -> str:
    """What one of torch.nn.attention.bias says; torch too asks for nothing but that beside it."""
    if is_causal or causal is not None:
        raise ValueError(
            problem(
                "attn_mask of type CausalBias beside is_causal or causal", "one of them", "attn_mask=None"
            )
        )
    sizes = (bias.seq_len_q, bias.seq_len_kv)
    if query.dim() != 4 or sizes != (query.shape[2], key.shape[2]):
        raise_for_mask(sizes, (*query.shape[:-1], key.shape[-2]))
    return "top_left" if bias.variant.name == "UPPER_LEFT" else "bottom_right"


def _shown(name: str, given: object) -> str:
    if isinstance(given, Tensor):
        return f"{name} of type {type(given).__name__}"
    return f"{name}={given!r}"[:100].replace("\n", " ")


def _no_bool(name: str, given: object) -> TypeError:
    return TypeError(problem(_shown(name, given), "True or False", f"{name}=bool(...)"))


def _number(name: str, given: Any) -> float:
    if isinstance(given, (float, int)):
        return float(given)
    if isinstance(given, Tensor) and is_differentiated(given):
        raise TypeError(
            problem(
                f"{name} that requires a gradient",
                "a constant number",
                "query * scale, with scale=1.0, for a scale that is trained"
                if name == "scale"
                else f"{name}.item()",
            )
        )
    if isinstance(given, Real) or (isinstance(given, Tensor) and given.dim() == 0):
        return float(given)
    raise TypeError(problem(f"{name} of type {type(given).__name__}", "a number", f"{name}=float(...)"))


def _seed(query: Tensor) -> Tensor:
    """From the generator of the device, so that a CUDA graph has another one each time it is replayed."""
    device = query.device if query.is_cuda else "cpu"
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def _softcap(given: Any) -> float:
    softcap = _number("softcap", given)
    if not (softcap == 0 or 1e-30 <= softcap < math.inf):
        raise ValueError(
            problem(f"softcap={softcap}", "a number from 1e-30 on, or None or 0 for none", "softcap=None")
        )
    return softcap if softcap < 1e30 else 0.0  # scores of that size are not changed by it


def _dropout(given: Any) -> float:
    probability = _number("dropout_p", given)
    if not 0 <= probability <= 1:
        raise RuntimeError(
            problem(f"dropout_p={probability}", "a probability from 0 to 1", "dropout_p=0.0 for none")
        )
    return probability


def _positions(is_causal: Any, causal: Any, window: Any) -> tuple[int, int, bool]:
    """The window's left and right, -1 where unlimited, and whether the last query is beside the last key."""
    if not isinstance(is_causal, bool):
        raise _no_bool("is_causal", is_causal)
    if causal is not None and not (isinstance(causal, str) and causal in ("top_left", "bottom_right")):
        raise ValueError(
            problem(_shown("causal", causal), "None, 'top_left' or 'bottom_right'", "causal='top_left'")
        )
    if is_causal and causal == "bottom_right":
        raise ValueError(
            problem(
                "is_causal=True, which is causal='top_left', and causal='bottom_right'",
                "one of them",
                "is_causal=False",
            )
        )
    left, right = (-1, -1) if window is None else _window(window)
    if is_causal or causal is not None:
        right = 0
    return left, right, causal == "bottom_right"


_NO_KEY_IS_SO_FAR = 2**62


def _window(window: Any) -> tuple[int, int]:
    good = isinstance(window, Sequence) and not isinstance(window, str) and len(window) == 2
    limits = [-1 if limit is None else limit for limit in window] if good else []
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= -1 for n in limits):
        raise ValueError(
            problem(
                _shown("window", window),
                "(left, right), each a number of keys from 0 on, or None or -1 for no limit",
                "window=(127, 0) for the last 128 keys",
            )
        )
    # Farther than any key is no limit, and no number for 64 bits.
    return tuple(-1 if limit >= _NO_KEY_IS_SO_FAR else limit for limit in limits)  # type: ignore[return-value]


def _per_head(name: str, given: Any, query: Tensor) -> Tensor:
    """In the dtype of sums."""
    require_tensor(name, given)
    if not given.is_floating_point():
        raise RuntimeError(problem(f"{name} of dtype {given.dtype}", "a float dtype", f"{name}.float()"))
    return given.to(dtype_of_sums(query.dtype))


def _slopes(given: Any, query: Tensor) -> Tensor:
    slopes = _per_head("alibi_slopes", given, query)
    refuse_trained_slopes(slopes)
    return slopes.unsqueeze(0) if slopes.dim() == 1 else slopes
