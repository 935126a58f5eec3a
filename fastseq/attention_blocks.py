"""Attention over dual numbers, forward and backward, in blocks of torch's own operations, on any device.

Every number has a tangent beside it, which is marked by a prime. Of query i and key j:

    x = <q, k>            x' = <q', k> + <q, k'>
    t = scale x           or softcap tanh(scale x / softcap), of which slope is the derivative
    s = t + mask - alibi  s' = scale slope x' + mask'
    p = exp(s - lse)      mu = sum_j p s' + p_sink sink',  p' = p (s' - mu),  lse' = mu
    w = p kept            w' = p' kept                     kept: 1 / (1 - dropout_p) or 0
    o = sum_j w v         o' = sum_j w' v + w v'

and backward, from the gradients do of o, dlse and dw_ of w, and their tangents:

    dp = kept (<do, v> + dw_)     delta = sum_j p dp - dlse       dp', delta' by the product rule
    ds = p (dp - delta)           ds' = p' (dp - delta) + p (dp' - delta')
    dx = scale slope ds           dx' = scale (slope' ds + slope ds')
    dq = dx k,  dk = dx^T q,  dv = w^T do,  dmask = ds,  dsink = -sum_i p_sink delta, and their tangents

A block is some queries of some heads, with all keys that they may see: its scores are all the memory that
this takes. The products of a block are torch's. Whatever is hidden has p = 0, and where NaN or infinity is
anywhere in the arguments, what p = 0 selects adds nothing instead of 0 times it; to know that, a GPU is
waited for once a call, and once more for the starts of packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention_checks import Arguments, Attention
from .attention_units import Block, Cut, Unit, cut, sequences, units

if TYPE_CHECKING:
    from .attention_dual_ops import DualGradients, DualIncoming, DualResults, OfResults, Tangents


def forward(sizes: Attention, a: Arguments, tangents: Tangents, results: DualResults) -> None:
    """Fills the results, of which weights and remainders may be empty."""
    careful = not _all_finite(*a[:3], a.sinks, *tangents)
    if a.cu_seqlens_q is not None:  # rows outside of all sequences
        results.output.zero_()
        results.output_tangent.zero_()
    for weights in (results.weights, results.weights_tangent):  # keys that no block sees
        weights.zero_()
    for some in sequences(sizes, a, tangents):
        for unit in units(some, careful):
            for rows in unit.blocks():
                _forward_block(unit, rows, results)


def backward(
    sizes: Attention, a: Arguments, tangents: Tangents, incoming: DualIncoming, grads: DualGradients
) -> None:
    """Fills the gradients that are wanted."""
    careful = not _all_finite(*a[:3], a.sinks, *tangents, *incoming.grads, *incoming.grad_tangents)
    for of_all in (grads.primal, grads.tangent):
        for grad in of_all:
            if grad is not None:
                grad.zero_()
    for some in sequences(sizes, a, tangents):
        for unit in units(some, careful):
            _backward_unit(unit, incoming, grads)


def plan_in_data(longest: Attention, a: Arguments, why: str) -> dict[str, Any]:
    """See attention_dual_ops.Kernels; why: what there is no kernel for."""
    most = Cut(0, 0, 0)
    if longest.heads:
        group = longest.heads // longest.kv_heads
        most = cut(a.query.device, longest.queries, longest.keys, group, longest.kv_heads)
    partition = most._replace(batch=min(most.batch, longest.batch))._asdict()
    return {"engine": "attention_blocks", "kernel": "blocks", "partition": partition, "why": why}


def _all_finite(*tensors: Tensor | None) -> bool:
    """Of all but masks, whose -inf hides keys as lengths do."""
    floats = [x for x in tensors if x is not None and x.is_floating_point()]
    total = sum(x.detach().sum(dtype=torch.float64) for x in floats)
    return bool(torch.isfinite(total)) if isinstance(total, Tensor) else True


# ---------------------------------------------------------------------------------------------------- softmax


@dataclass
class _Weights:
    """Of a block; all (n, G rows, keys), or (n, G rows, 1). Without tangents of scores, theirs are None."""

    query: Tensor  # times the scale
    query_tangent: Tensor | None
    key: Tensor  # (n, keys, D)
    key_tangent: Tensor | None
    value: Tensor
    value_tangent: Tensor | None
    p: Tensor
    p_tangent: Tensor | None
    slope: Tensor | None  # of a softcap
    slope_tangent: Tensor | None
    kept: Tensor | None
    highest: Tensor
    inverse: Tensor  # of the sum of exponentials
    lse: Tensor
    mu: Tensor | None  # the tangent of lse
    sink: Tensor | None  # p of it
    sink_tangent: Tensor | None

    @cached_property
    def w(self) -> Tensor:
        return self.p if self.kept is None else self.p * self.kept

    @cached_property
    def w_tangent(self) -> Tensor | None:
        return self.p_tangent if self.kept is None or self.p_tangent is None else self.p_tangent * self.kept


def _softmax(u: Unit, block: Block) -> _Weights:
    a, tangents, keys = u.a, u.s.tangents, block.keys
    key, value = u.key[:, keys], u.value[:, keys]
    key_tangent, value_tangent = (x if x is None else x[:, keys] for x in (u.key_tangent, u.value_tangent))
    query = u.take(a.query, block.queries, a.scale)
    query_tangent = u.take(tangents.query, block.queries, a.scale)
    rows = block.queries.stop - block.queries.start
    shape = (*u.lead, rows, key.shape[1])

    x = torch.bmm(query, key.mT)
    t = None if query_tangent is None else torch.bmm(query_tangent, key.mT)
    if key_tangent is not None:
        t = torch.bmm(query, key_tangent.mT) if t is None else t.baddbmm_(query, key_tangent.mT)
    slope = slope_tangent = None
    if a.softcap:
        x = x.div_(a.softcap).tanh_()
        slope = 1 - x * x
        if t is not None:
            t *= slope
            slope_tangent = x * t * (-2 / a.softcap)
        x *= a.softcap
    scores = x.view(shape)
    if a.alibi_slopes is not None:
        i, j, _ = u.places(block)
        scores.sub_((i - j).abs() * u.of_heads(a.alibi_slopes))
    if a.attn_mask is not None and a.attn_mask.dtype is not torch.bool:
        scores.add_(u.of_scores(a.attn_mask, block))
    if tangents.attn_mask is not None:
        mask_tangent = u.of_scores(tangents.attn_mask, block)
        t = torch.zeros_like(x) if t is None else t
        t.view(shape).add_(mask_tangent)
    hidden = u.hidden(block)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)

    nothing = x.new_full((u.n, u.group * rows, 1), -torch.inf)
    highest = x.amax(-1, keepdim=True) if x.shape[-1] else nothing
    if u.sinks is not None:
        sinks = u.per_row(u.sinks, rows)
        highest = torch.maximum(highest, sinks)
    shift = highest.masked_fill(highest == -torch.inf, 0)
    p = x.sub_(shift).exp_()
    if hidden is not None:  # NaN in a row is in all of it by now
        p.view(shape).masked_fill_(hidden, 0)
    total, sink = p.sum(-1, keepdim=True), None
    if u.sinks is not None:
        sink = torch.exp(sinks - shift)
        total = total + sink
    inverse = torch.where(total == 0, 0, 1 / total)
    lse = torch.where(total == 0, -torch.inf, shift + total.log())
    p *= inverse

    mu = sink_tangent = None
    if t is not None:
        if u.careful:
            t.masked_fill_(p == 0, 0)
        mu = (p * t).sum(-1, keepdim=True)
    if sink is not None:
        sink = sink * inverse
        sink_tangent = None if u.sinks_tangent is None else u.per_row(u.sinks_tangent, rows)
        if sink_tangent is not None:
            share = torch.where(sink == 0, 0, sink * sink_tangent)
            mu = share if mu is None else mu + share
        if mu is not None:
            change = -mu if sink_tangent is None else sink_tangent - mu
            sink_tangent = torch.where(sink == 0, 0, sink * change)
    p_tangent = None
    if mu is not None:
        p_tangent = p * -mu if t is None else t.sub_(mu).mul_(p)
        if u.careful:
            p_tangent.masked_fill_(p == 0, 0)
    return _Weights(
        query,
        query_tangent,
        key,
        key_tangent,
        value,
        value_tangent,
        p,
        p_tangent,
        slope,
        slope_tangent,
        u.kept(block),
        shift,
        inverse,
        lse,
        mu,
        sink,
        sink_tangent,
    )


def _unit(a: Arguments) -> float:
    """In whose multiples the engines have scores: those of Scores in csrc/cpu/attention_scores.h."""
    added = a.attn_mask is not None and a.attn_mask.dtype is not torch.bool
    return 1.0 if a.softcap or added or a.alibi_slopes is not None or a.scale <= 1e-6 else a.scale


def _forward_block(u: Unit, block: Block, results: DualResults) -> None:
    w, rows = _softmax(u, block), block.queries
    output = u.product(w.w, w.value)
    tangent = None if w.w_tangent is None else u.product(w.w_tangent, w.value)
    if w.value_tangent is not None:
        tangent = u.product(w.w, w.value_tangent, tangent)
    mu = torch.zeros_like(w.lse) if w.mu is None else w.mu
    u.put(results.output, rows, output, results.remainder)
    u.put(
        results.output_tangent,
        rows,
        torch.zeros_like(output) if tangent is None else tangent,
        results.remainder_tangent,
    )
    u.put_numbers(results.lse, rows, w.lse)
    u.put_numbers(results.lse_tangent, rows, mu)
    highest = w.highest.masked_fill(~w.highest.isfinite(), 0)
    u.put_numbers(results.normalizer[0], rows, highest / _unit(u.a))
    u.put_numbers(results.normalizer[1], rows, w.inverse)
    if results.weights.dim() > 1:
        place = (u.batch, u.heads, rows, block.keys)
        for to, x in ((results.weights, w.w), (results.weights_tangent, w.w_tangent)):
            if x is not None:
                to[place] = x.view(to[place].shape).to(to.dtype)


# -------------------------------------------------------------------------------------------------- gradients


def _backward_unit(u: Unit, incoming: DualIncoming, grads: DualGradients) -> None:
    primal, tangent = grads.primal, grads.tangent
    sums = {}
    for name, like in (("key", u.key), ("value", u.value)):
        for which, of_all in (("", primal), ("_tangent", tangent)):
            sums[name + which] = None if getattr(of_all, name) is None else torch.zeros_like(like)
    for block in u.blocks():
        _backward_block(u, block, incoming, grads, sums)
    for name in ("key", "value"):
        u.put_keys(getattr(primal, name), sums[name])
        u.put_keys(getattr(tangent, name), sums[name + "_tangent"])


def _backward_block(
    u: Unit,
    block: Block,
    incoming: DualIncoming,
    grads: DualGradients,
    sums: dict[str, Tensor | None],
) -> None:
    w, rows, scale = _softmax(u, block), block.queries, u.a.scale
    primal, tangent = grads.primal, grads.tangent
    do = u.take(incoming.grads.output, rows)
    do_tangent = u.take(incoming.grad_tangents.output, rows)

    _add(u, sums["value"], block.keys, (w.w, do))
    _add(u, sums["value_tangent"], block.keys, (w.w_tangent, do), (w.w, do_tangent))

    dp = _of_weights(u, block, w, incoming.grads, (do, w.value))
    dp_tangent = _of_weights(
        u, block, w, incoming.grad_tangents, (do_tangent, w.value), (do, w.value_tangent)
    )
    delta = _less(_row_sums((w.p, dp)), u.take_numbers(incoming.grads.lse, rows))
    delta_tangent = _less(
        _row_sums((w.p_tangent, dp), (w.p, dp_tangent)), u.take_numbers(incoming.grad_tangents.lse, rows)
    )
    _add_to_sinks(u, primal.sinks, (w.sink, delta))
    _add_to_sinks(u, tangent.sinks, (w.sink_tangent, delta), (w.sink, delta_tangent))

    ds, ds_tangent = _less(dp, delta), _less(dp_tangent, delta_tangent)
    ds_tangent = _sum_of_products((w.p_tangent, ds), (w.p, ds_tangent))
    ds = _sum_of_products((w.p, ds))
    if u.careful:
        for x in (ds, ds_tangent):
            if x is not None:
                x.masked_fill_(w.p == 0, 0)
    _add_to_mask(u, block, primal.attn_mask, ds)
    _add_to_mask(u, block, tangent.attn_mask, ds_tangent)

    if w.slope is not None:
        ds_tangent = _sum_of_products((w.slope, ds_tangent), (w.slope_tangent, ds))
        ds = _sum_of_products((w.slope, ds))
        if u.careful:
            for x in (ds, ds_tangent):
                if x is not None:
                    x.masked_fill_(w.p == 0, 0)
    _add(u, sums["key"], block.keys, (ds, w.query))
    _add(u, sums["key_tangent"], block.keys, (ds_tangent, w.query), (ds, w.query_tangent))
    for of_query, terms in (
        (primal.query, [(ds, w.key)]),
        (tangent.query, [(ds_tangent, w.key), (ds, w.key_tangent)]),
    ):
        total = None
        for x, y in terms:
            if of_query is not None and x is not None and y is not None:
                total = u.product(x, y, total)
        if total is not None:
            u.put(of_query, rows, total * scale)


def _of_weights(
    u: Unit, block: Block, w: _Weights, of: OfResults, *products: tuple[Tensor | None, Tensor | None]
) -> Tensor | None:
    """The gradient of p by way of the weights, or its tangent; None for zeros."""
    total = None
    for x, y in products:
        if x is not None and y is not None:
            total = torch.bmm(x, y.mT) if total is None else total.baddbmm_(x, y.mT)
    if of.weights is not None:
        shown = of.weights[u.batch, u.heads, block.queries, block.keys].to(u.sums).reshape(w.p.shape)
        total = shown if total is None else total.add_(shown)
    if total is not None and w.kept is not None:
        total = total * w.kept
    if total is not None and u.careful:
        total = total.masked_fill(w.p == 0, 0)
    return total


Pair = tuple[Tensor | None, Tensor | None]


def _sum_of_products(*pairs: Pair) -> Tensor | None:
    """None for zeros, as everywhere here."""
    total = None
    for x, y in pairs:
        if x is not None and y is not None:
            total = x * y if total is None else total.addcmul_(x, y)
    return total


def _row_sums(*pairs: Pair) -> Tensor | None:
    total = _sum_of_products(*pairs)
    return None if total is None else total.sum(-1, keepdim=True)


def _less(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return x if y is None else -y
    return x - y


def _add(u: Unit, total: Tensor | None, keys: slice, *pairs: Pair) -> None:
    """To the gradients of these keys x^T y of each pair."""
    for x, y in pairs:
        if total is not None and x is not None and y is not None:
            part = total[:, keys]
            if u.careful:
                part.copy_(u.product(x.mT, y, part))
            else:
                part.baddbmm_(x.mT, y)


def _add_to_sinks(u: Unit, grad: Tensor | None, *pairs: Pair) -> None:
    """To (B, Hq), -sum of x y over the rows."""
    for x, y in pairs:
        if grad is not None and x is not None and y is not None:
            shares = torch.where(x == 0, 0, x * y).view(*u.lead, -1).sum(-1)
            first = u.s.first
            grad[u.batch.start + first : u.batch.stop + first, u.heads] -= shares.flatten(1)


def _add_to_mask(u: Unit, block: Block, grad: Tensor | None, x: Tensor | None) -> None:
    if grad is None or x is None:
        return
    x = x.view(*u.lead, -1, x.shape[-1]).flatten(1, 2)
    shared = [i for i, n in enumerate(grad.shape) if n == 1]
    place = u.of_mask(grad, block)
    place += x.sum(shared, keepdim=True) if shared else x
