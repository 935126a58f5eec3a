"""Scaled dot-product attention in plain torch operations, written straight from its equations.

This is what fastseq is measured against, in float64; autograd differentiates it. It is slow on purpose: full
matrices of scores, no tricks, nothing shared with the library.

Query i of sequence b and head h stands at place p = i, or i + Sk_b - Sq_b if causal is "bottom_right", where
Sk_b is key_lengths[b] or the sequence's own length. For every key j:

    t = scale * <q_i, k_j>                          scale is 1 / sqrt(D) by default
    t = softcap * tanh(t / softcap)                 if there is a softcap
    s = t + attn_mask - alibi_slopes[h] * |p - j|
    visible: j < Sk_b, j <= p if causal, p - left <= j <= p + right, attn_mask is True, or above -inf
    weights = exp(s) / total   over the visible keys, 0 elsewhere
    total   = sum of exp(s) over the visible keys, + exp(sinks[h]) if there are sinks
    lse     = log(total), -inf where total is 0
    output  = (weights where kept, / (1 - dropout_p)) value

What nobody may look at does not enter, not even as NaN: keys and values that no query sees and queries that
see no key count as 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    output: Tensor  # [B, Hq, Sq, Dv]
    lse: Tensor  # [B, Hq, Sq]
    weights: Tensor  # [B, Hq, Sq, Sk], after dropout
    visible: Tensor  # [B, Hq, Sq, Sk], bool
    largest: Tensor  # [B, Hq, Sq, 1], the score, or sink, that counts most; 0 if there is none


def unlimited(extent: int | None) -> bool:
    return extent is None or extent == -1


def places(queries: int, keys: int, causal: str | None, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """p [B or 1, 1, Sq, 1] and Sk_b [B or 1, 1, 1, 1]."""
    length = torch.tensor([keys]) if key_lengths is None else key_lengths
    length = length.view(-1, 1, 1, 1)
    offset = length - queries if causal == "bottom_right" else torch.zeros_like(length)
    return torch.arange(queries).view(-1, 1) + offset, length


def visible_keys(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    attn_mask: Tensor | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """[B, Hq, Sq, Sk], which key each query sees."""
    place, length = places(queries, keys, causal, key_lengths)
    j = torch.arange(keys)
    left, right = window or (None, None)
    visible = (j < length) & torch.ones_like(place, dtype=torch.bool)
    if causal:
        visible = visible & (j <= place)
    if not unlimited(left):
        visible = visible & (j >= place - left)
    if not unlimited(right):
        visible = visible & (j <= place + right)
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype is torch.bool else attn_mask.detach() > -math.inf)
    return visible.expand(batch, heads, queries, keys)


def alibi_bias(slopes: Tensor, queries: int, keys: int, causal: str | None, key_lengths: Tensor | None):
    """What is added to the scores, [B or 1, Hq, Sq, Sk], for slopes [Hq] or [B, Hq]."""
    place, _ = places(queries, keys, causal, key_lengths)
    distance = (place - torch.arange(keys)).abs().to(slopes.dtype)
    return -slopes.view(-1, slopes.size(-1), 1, 1) * distance


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Attention:
    """query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv]; `keep` [B, Hq, Sq, Sk] says which
    weights dropout leaves. All in one dtype, that of the results."""
    (batch, heads, queries, _), keys = query.shape, key.size(2)
    key, value = (x.repeat_interleave(heads // x.size(1), 1) for x in (key, value))
    visible = visible_keys(batch, heads, queries, keys, attn_mask, causal, window, key_lengths)
    zero = query.new_zeros(())
    query = torch.where(visible.any(-1)[..., None], query, zero)
    key, value = (torch.where(visible.any(-2)[..., None], x, zero) for x in (key, value))

    t = (1 / math.sqrt(query.size(-1)) if scale is None else scale) * (query @ key.transpose(-2, -1))
    if softcap:
        t = softcap * torch.tanh(t / softcap)
    s = t
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        s = s + attn_mask
    if alibi_slopes is not None:
        s = s + alibi_bias(alibi_slopes, queries, keys, causal, key_lengths)
    s = torch.where(visible, s, -math.inf)

    sink = query.new_full((1,), -math.inf) if sinks is None else sinks
    sink = sink.view(1, -1, 1, 1).expand(batch, heads, queries, 1)
    largest = torch.cat([s, sink], -1).detach().amax(-1, keepdim=True)
    largest = torch.where(largest > -math.inf, largest, zero)  # subtracted, so that no exp overflows
    e = torch.exp(s - largest)
    total = e.sum(-1, keepdim=True) + torch.exp(sink - largest)
    something = total > 0
    divisor = torch.where(something, total, torch.ones_like(total))
    weights = e / divisor
    lse = torch.where(something, largest + torch.log(divisor), -math.inf).squeeze(-1)
    if dropout_p:
        weights = torch.where(keep, weights / (1 - dropout_p), zero)
    return Attention(weights @ value, lse, weights, visible, largest)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor, list[Attention]]:
    """Every sequence by itself: query [total_q, Hq, D], key [total_k, Hkv, D], value [total_k, Hkv, Dv].

    Returns output [total_q, Hq, Dv], lse [Hq, total_q], and each sequence by itself.
    """
    outputs, lses, parts = [query.new_zeros(0, query.size(1), value.size(2))], [], []
    for b in range(len(cu_seqlens_q) - 1):
        q = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        k = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        tensors = [x.transpose(0, 1)[None] for x in (query[q], key[k], value[k])]
        if keep is not None:
            options["keep"] = keep[b : b + 1, :, : tensors[0].size(2), : tensors[1].size(2)]
        result = attention(*tensors, alibi_slopes=slopes, **options)
        outputs.append(result.output[0].transpose(0, 1))
        lses.append(result.lse[0])
        parts.append(result)
    return torch.cat(outputs), torch.cat(lses, 1) if lses else query.new_zeros(query.size(1), 0), parts
