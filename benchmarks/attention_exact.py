"""Attention and its gradients in float64, straight from the equations, as the measure of results on a GPU.

Of a large case a sample is computed: the heads that share the last key head, in the first and the last
sequence. Rows of scores are made a piece at a time, so that a long sequence fits; autograd adds up gradients.
"""

from __future__ import annotations

import math

import torch

ROWS = 2048  # of scores at a time


class Sample:
    """A part of a call of fastseq.scaled_dot_product_attention, and the same part of its results.

    Of packed sequences it is the last one. `trained`: whether the mask gets a gradient, which is a sum over
    the batch, so that all of the batch is needed. `everything`: all heads and sequences.
    """

    def __init__(self, inputs, options, trained=False, everything=False):
        self.inputs, self.options, self.trained = inputs, options, trained
        query, key, _ = inputs
        self.heads, self.kv_heads = query.size(1), key.size(1)
        if not everything:
            self.heads, self.kv_heads = self.heads // self.kv_heads, 1
        self.rows = None  # of the last of packed sequences
        if "cu_seqlens_k" in options:
            self.rows = slice(*options["cu_seqlens_k"][-2:].tolist())
        self.batch = slice(None) if trained or everything else sorted({0, query.size(0) - 1})

    def of(self, tensor, heads):
        """The last heads of (B, heads, rows, features), or of a mask; dimensions of 1 stay as they are."""
        if self.rows:
            tensor = tensor[self.rows].transpose(0, 1)[None]
        elif tensor.size(0) > 1:
            tensor = tensor[self.batch]
        return tensor if tensor.size(1) == 1 else tensor[:, -heads:]

    def results(self, results):
        """Of output and gradients, as exact() returns them."""
        heads = (self.heads, self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [self.of(tensor, n) for tensor, n in zip(results, heads, strict=False)]

    def exact(self, grad=None):
        """The output, and with its gradient those of query, key, value and of a mask that has one."""
        options = {name: self.options[name] for name in self.options if not name.startswith("cu_seqlens")}
        if "attn_mask" in options:
            options["attn_mask"] = self.of(options["attn_mask"], self.heads)
        if "alibi_slopes" in options:
            options["alibi_slopes"] = options["alibi_slopes"][-self.heads :]
        if "key_lengths" in options:
            options["key_lengths"] = options["key_lengths"][self.batch]
        inputs = [
            self.of(x, n)
            for x, n in zip(self.inputs, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        ]
        grad = None if grad is None else self.of(grad, self.heads)
        return attention(*inputs, grad, trained=self.trained, **options)


def attention(query, key, value, grad=None, attn_mask=None, trained=False, enable_gqa=False, **options):
    """Output and gradients of query (B, Hq, Sq, D), key and value (B, Hkv, Sk, D); every query sees a key."""
    wanted = [x.detach().double() for x in (query, key, value)]
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        attn_mask = attn_mask.detach().double()
        wanted += [attn_mask] if trained else []
    if grad is not None:
        for tensor in wanted:
            tensor.requires_grad_()
    outputs = []
    for start in range(0, query.size(2), ROWS):
        rows = slice(start, min(start + ROWS, query.size(2)))
        output = of_rows(*wanted[:3], rows, attn_mask, **options)
        if grad is not None:
            output.backward(grad[:, :, rows].double())
        outputs.append(output.detach())
    gradients = [] if grad is None else [tensor.grad for tensor in wanted]
    return [torch.cat(outputs, 2), *gradients]


def of_rows(
    query,
    key,
    value,
    rows,
    attn_mask=None,
    is_causal=False,
    causal=None,
    window=None,
    softcap=None,
    alibi_slopes=None,
    key_lengths=None,
):
    """The output for these rows of query; causal is "top_left" or None, and a window has no right side."""
    key, value = (x.repeat_interleave(query.size(1) // key.size(1), 1) for x in (key, value))
    scores = query[:, :, rows] @ key.mT / math.sqrt(query.size(3))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys = torch.arange(key.size(2), device=key.device)
    apart = torch.arange(rows.start, rows.stop, device=key.device)[:, None] - keys
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * apart.abs()
    hidden = torch.zeros_like(apart, dtype=torch.bool)
    if is_causal or causal:
        hidden = hidden | (apart < 0)
    if window:
        hidden = hidden | (apart > window[0])
    if key_lengths is not None:
        hidden = hidden | (keys >= key_lengths[:, None, None, None])
    if attn_mask is not None:
        mask = attn_mask if attn_mask.size(2) == 1 else attn_mask[:, :, rows]
        if mask.dtype is torch.bool:
            hidden = hidden | ~mask
        else:
            scores = scores + mask
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
