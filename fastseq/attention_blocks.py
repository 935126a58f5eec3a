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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import philox
from .attention_checks import Arguments, Attention, dtype_of_sums

if TYPE_CHECKING:
    from .attention_dual_ops import DualGradients, DualIncoming, DualResults, OfResults, Tangents

_MOST_ROWS = 256  # queries of a block
# Scores of a block: of a CPU's, some copies fit into its caches; a GPU wants more work at once.
_MOST_SCORES = {"cpu": 1 << 18, "cuda": 1 << 22}


def forward(sizes: Attention, a: Arguments, tangents: Tangents, results: DualResults) -> None:
    """Fills the results, of which weights and remainders may be empty."""
    careful = not _all_finite(*a[:4], a.sinks, *tangents)
    if a.cu_seqlens_q is not None:  # rows outside of all sequences
        results.output.zero_()
        results.output_tangent.zero_()
    for weights in (results.weights, results.weights_tangent):  # keys that no block sees
        weights.zero_()
    for sequences in _sequences(sizes, a, tangents):
        for unit in _units(sequences, careful):
            for rows in unit.blocks():
                _forward_block(unit, rows, results)


def backward(
    sizes: Attention, a: Arguments, tangents: Tangents, incoming: DualIncoming, grads: DualGradients
) -> None:
    """Fills the gradients that are wanted."""
    careful = not _all_finite(*a[:4], a.sinks, *tangents, *incoming.grads, *incoming.grad_tangents)
    for of_all in (grads.primal, grads.tangent):
        for grad in of_all:
            if grad is not None:
                grad.zero_()
    for sequences in _sequences(sizes, a, tangents):
        for unit in _units(sequences, careful):
            _backward_unit(unit, incoming, grads)


def _all_finite(*tensors: Tensor | None) -> bool:
    floats = [x for x in tensors if x is not None and x.is_floating_point()]
    total = sum(x.detach().sum(dtype=torch.float64) for x in floats)
    return bool(torch.isfinite(total)) if isinstance(total, Tensor) else True


# ----------------------------------------------------------------------------------- sequences and their rows


class Rows(NamedTuple):
    """Of packed sequences, where one begins and ends."""

    query: slice
    key: slice


@dataclass(frozen=True)
class _Sequences:
    """All sequences of a batch, or one of those that are packed."""

    a: Arguments
    tangents: Tangents
    first: int  # its index
    count: int
    queries: int
    keys: int
    rows: Rows | None

    def of_queries(self, x: Tensor) -> Tensor:
        """(B, Hq, Sq, features), a view."""
        return x if self.rows is None else x[self.rows.query].transpose(0, 1).unsqueeze(0)

    def of_keys(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows.key].transpose(0, 1).unsqueeze(0)

    def numbers(self, x: Tensor) -> Tensor:
        """(B, Hq, Sq), a view."""
        return x if self.rows is None else x[:, self.rows.query].unsqueeze(0)


def _sequences(sizes: Attention, a: Arguments, tangents: Tangents) -> Iterator[_Sequences]:
    if a.cu_seqlens_q is None or a.cu_seqlens_k is None:
        yield _Sequences(a, tangents, 0, sizes.batch, sizes.queries, sizes.keys, None)
        return
    starts = zip(
        _within(a.cu_seqlens_q.tolist(), sizes.queries),
        _within(a.cu_seqlens_k.tolist(), sizes.keys),
        strict=True,
    )
    before = None
    for b, (query, key) in enumerate(starts, -1):
        if before is not None and query > before[0]:
            rows = Rows(slice(before[0], query), slice(before[1], key))
            yield _Sequences(a, tangents, b, 1, query - before[0], key - before[1], rows)
        before = query, key


def _within(starts: list[int], most: int) -> list[int]:
    """What is out of bounds as the nearest that is not, as the kernels take it."""
    least, kept = 0, []
    for start in starts:
        least = min(max(start, least), most)
        kept.append(least)
    return kept


# ------------------------------------------------------------------------------------------- units and blocks


def _units(s: _Sequences, careful: bool) -> Iterator[_Unit]:
    """Each of as many heads of keys, and sequences, as are worth one product after another."""
    query, key = s.of_queries(s.a.query), s.of_keys(s.a.key)
    heads, kv_heads = query.shape[1], key.shape[1]
    group = heads // kv_heads
    if group == 0 or s.queries == 0:
        return
    scores = _MOST_SCORES.get(query.device.type, _MOST_SCORES["cpu"])
    of_row = group * max(1, s.keys)
    rows = min(s.queries, _MOST_ROWS, max(16, scores // of_row))
    together = max(1, scores // (rows * of_row))
    batch = max(1, together // kv_heads)
    together = min(together, kv_heads)
    for b in range(0, s.count, batch):
        for h in range(0, kv_heads, together):
            of_batch = slice(b, min(b + batch, s.count))
            of_heads = slice(h, min(h + together, kv_heads))
            yield _Unit(s, of_batch, of_heads, group, rows, careful)


class Block(NamedTuple):
    """From and to which row, and which keys these may see."""

    queries: slice
    keys: slice


class _Unit:
    """Some heads of keys of some sequences, n in all, with the G heads of queries that share each."""

    def __init__(
        self, s: _Sequences, batch: slice, kv_heads: slice, group: int, rows: int, careful: bool
    ) -> None:
        self.s, self.a, self.batch, self.kv_heads, self.group = s, s.a, batch, kv_heads, group
        self.heads = slice(kv_heads.start * group, kv_heads.stop * group)
        self.rows_of_block, self.careful = rows, careful
        self.sums = dtype_of_sums(s.a.query.dtype)
        # (batch, heads of keys, G, 1, 1), of what is one number for each head
        self.lead = (batch.stop - batch.start, kv_heads.stop - kv_heads.start, group)
        self.n = self.lead[0] * self.lead[1]
        self.key, self.key_tangent = self._keys(s.a.key), self._keys(s.tangents.key)
        self.value, self.value_tangent = self._keys(s.a.value), self._keys(s.tangents.value)

    def _keys(self, x: Tensor | None) -> Tensor | None:
        """(n, keys, features), in the dtype of sums."""
        if x is None:
            return None
        x = self.s.of_keys(x)[self.batch, self.kv_heads]
        return x.to(self.sums).reshape(self.n, *x.shape[2:])

    def take(self, x: Tensor | None, rows: slice, factor: float = 1.0) -> Tensor | None:
        """Rows of queries, (n, G rows, features), in the dtype of sums."""
        if x is None:
            return None
        x = self.s.of_queries(x)[self.batch, self.heads, rows].to(self.sums)
        x = x.reshape(self.n, -1, x.shape[-1])
        return x if factor == 1 else x * factor

    def take_numbers(self, x: Tensor | None, rows: slice) -> Tensor | None:
        """One for each query, (n, G rows, 1)."""
        if x is None:
            return None
        return self.s.numbers(x)[self.batch, self.heads, rows].reshape(self.n, -1, 1)

    def put(self, to: Tensor, rows: slice, x: Tensor, remainder: Tensor | None = None) -> None:
        """What take() took; with what rounding takes from it, if there is a place for that."""
        place = self.s.of_queries(to)[self.batch, self.heads, rows]
        x = x.view(place.shape)
        place.copy_(x)
        if remainder is not None and remainder.dim() > 1:
            rest = x - place
            rest.masked_fill_(~rest.isfinite(), 0)
            self.s.of_queries(remainder)[self.batch, self.heads, rows] = rest.to(remainder.dtype)

    def put_numbers(self, to: Tensor, rows: slice, x: Tensor) -> None:
        place = self.s.numbers(to)[self.batch, self.heads, rows]
        place.copy_(x.view(place.shape))

    def put_keys(self, to: Tensor | None, x: Tensor | None) -> None:
        if to is not None and x is not None:
            place = self.s.of_keys(to)[self.batch, self.kv_heads]
            place.copy_(x.view(place.shape))

    def of_heads(self, x: Tensor) -> Tensor:
        """Of (1 or B, Hq), (batch or 1, heads of keys, G, 1, 1)."""
        if x.shape[0] > 1:
            x = x[self.batch.start + self.s.first : self.batch.stop + self.s.first]
        return x[:, self.heads].reshape(x.shape[0], *self.lead[1:], 1, 1)

    def of_mask(self, x: Tensor, block: Block) -> Tensor:
        """A view of a mask, or of its gradient, that broadcasts to (batch, heads, rows, keys)."""
        places = (self.batch, self.heads, block.queries, block.keys)
        return x[tuple(p if n > 1 else slice(None) for p, n in zip(places, x.shape, strict=True))]

    def of_scores(self, mask: Tensor, block: Block) -> Tensor:
        """A mask's part that broadcasts to (batch, heads of keys, G, rows, keys)."""
        x = self.of_mask(mask, block)
        groups = (self.lead[1], self.group) if x.shape[1] > 1 else (1, 1)
        return x.unflatten(1, groups)

    @cached_property
    def sinks(self) -> Tensor | None:
        """(n, 1, 1) where all queries of a unit share them, else (n, G, 1), which expand() fits to rows."""
        return self._sinks(self.a.sinks)

    @cached_property
    def sinks_tangent(self) -> Tensor | None:
        return self._sinks(self.s.tangents.sinks)

    def _sinks(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x[self.heads].view(1, *self.lead[1:]).expand(self.lead).reshape(self.n, self.group, 1)

    def per_row(self, x: Tensor, rows: int) -> Tensor:
        """Of (n, G, 1), (n, G rows, 1)."""
        return x.expand(-1, -1, rows).reshape(self.n, -1, 1)

    def blocks(self) -> Iterator[Block]:
        for begin in range(0, self.s.queries, self.rows_of_block):
            rows = slice(begin, min(begin + self.rows_of_block, self.s.queries))
            yield Block(rows, self._keys_seen(rows))

    # ---- what is visible ----

    def _keys_seen(self, rows: slice) -> slice:
        a, keys = self.a, self.s.keys
        latest = keys - self.s.queries if a.bottom_right else 0
        # Of lengths, which are not looked at, the shortest is 0.
        earliest = latest - keys if a.bottom_right and a.key_lengths is not None else latest
        begin = 0 if a.left < 0 else min(max(rows.start + earliest - a.left, 0), keys)
        end = keys if a.right < 0 else min(max(rows.stop + latest + a.right, 0), keys)
        return slice(begin, max(begin, end))

    def places(self, block: Block) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where queries stand among the keys, (batch or 1, 1, 1, rows, 1); keys; and their number."""
        device = self.a.query.device
        i = torch.arange(block.queries.start, block.queries.stop, device=device).view(-1, 1)
        j = torch.arange(block.keys.start, block.keys.stop, device=device)
        lengths = None
        if self.a.key_lengths is not None:
            lengths = self.a.key_lengths[self.batch].clamp(0, self.s.keys).view(-1, 1, 1, 1, 1)
        if self.a.bottom_right:
            i = i + ((self.s.keys if lengths is None else lengths) - self.s.queries)
        return i, j, lengths

    def hidden(self, block: Block) -> Tensor | None:
        """What broadcasts to (batch, heads of keys, G, rows, keys), true where a query does not see a key."""
        a, keys = self.a, block.keys
        hidden = None
        offset = self.s.keys - self.s.queries if a.bottom_right else 0
        whole_left = a.left < 0 or keys.start >= block.queries.stop - 1 + offset - a.left
        whole_right = a.right < 0 or keys.stop - 1 <= block.queries.start + offset + a.right
        if a.key_lengths is not None or not (whole_left and whole_right):
            i, j, lengths = self.places(block)
            parts = [j >= lengths] if lengths is not None else []
            if a.left >= 0:
                parts.append(j < i - a.left)
            if a.right >= 0:
                parts.append(j > i + a.right)
            for part in parts:
                hidden = part if hidden is None else hidden | part
        if a.attn_mask is not None:
            mask = self.of_scores(a.attn_mask, block)
            by_mask = ~mask if mask.dtype is torch.bool else mask == -torch.inf
            hidden = by_mask if hidden is None else hidden | by_mask
        return hidden

    def kept(self, block: Block) -> Tensor | None:
        """(n, G rows, keys), in the dtype of sums: 1 / (1 - dropout_p) or 0."""
        if not self.a.dropout_p or self.a.seed is None:
            return None
        device, of_all = self.a.query.device, self.a.query.shape[1]
        batch = torch.arange(self.batch.start, self.batch.stop, device=device) + self.s.first
        heads = torch.arange(self.heads.start, self.heads.stop, device=device)
        head = (batch.view(-1, 1) * of_all + heads).view(self.n, self.group, 1)
        query = torch.arange(block.queries.start, block.queries.stop, device=device)
        keys = block.keys.start, block.keys.stop
        kept = philox.kept(self.a.dropout_p, self.a.seed.to(device), head, query, keys)
        return kept.reshape(self.n, -1, kept.shape[-1]).to(self.sums).mul_(1 / (1 - self.a.dropout_p))

    # ---- products ----

    def product(self, x: Tensor, y: Tensor | None, total: Tensor | None = None) -> Tensor:
        """total + x y, of which a 0 in x adds nothing whatever is in y."""
        assert y is not None
        if self.careful:
            y, unusual = torch.where(y.isfinite(), y, 0), y
        result = torch.bmm(x, y) if total is None else torch.baddbmm(total, x, y)
        if self.careful:
            for value in (torch.inf, -torch.inf):
                either = (unusual == value).to(x.dtype), (unusual == -value).to(x.dtype)
                hits = torch.bmm((x > 0).to(x.dtype), either[0]) + torch.bmm((x < 0).to(x.dtype), either[1])
                result = torch.where(hits > 0, result + value, result)
            hits = torch.bmm((x != 0).to(x.dtype), unusual.isnan().to(x.dtype))
            result = result.masked_fill_(hits > 0, torch.nan)
        return result


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


def _softmax(u: _Unit, block: Block) -> _Weights:
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


def _forward_block(u: _Unit, block: Block, results: DualResults) -> None:
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


def _backward_unit(u: _Unit, incoming: DualIncoming, grads: DualGradients) -> None:
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
    u: _Unit,
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
    u: _Unit, block: Block, w: _Weights, of: OfResults, *products: tuple[Tensor | None, Tensor | None]
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


def _add(u: _Unit, total: Tensor | None, keys: slice, *pairs: Pair) -> None:
    """To the gradients of these keys x^T y of each pair."""
    for x, y in pairs:
        if total is not None and x is not None and y is not None:
            part = total[:, keys]
            if u.careful:
                part.copy_(u.product(x.mT, y, part))
            else:
                part.baddbmm_(x.mT, y)


def _add_to_sinks(u: _Unit, grad: Tensor | None, *pairs: Pair) -> None:
    """To (B, Hq), -sum of x y over the rows."""
    for x, y in pairs:
        if grad is not None and x is not None and y is not None:
            shares = torch.where(x == 0, 0, x * y).view(*u.lead, -1).sum(-1)
            first = u.s.first
            grad[u.batch.start + first : u.batch.stop + first, u.heads] -= shares.flatten(1)


def _add_to_mask(u: _Unit, block: Block, grad: Tensor | None, x: Tensor | None) -> None:
    if grad is None or x is None:
        return
    x = x.view(*u.lead, -1, x.shape[-1]).flatten(1, 2)
    shared = [i for i, n in enumerate(grad.shape) if n == 1]
    place = u.of_mask(grad, block)
    place += x.sum(shared, keepdim=True) if shared else x
