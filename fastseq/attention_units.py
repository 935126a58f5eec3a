"""How attention over dual numbers is cut into blocks: see attention_blocks.py.

A unit is some heads of keys of some sequences, with the heads of queries that share them; a block is some of
its queries, with all keys that they may see.
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
    from .attention_dual_ops import Tangents

_MOST_ROWS = 256  # queries of a block
# Scores of a block: of a CPU's, some copies fit into its caches; a GPU wants more work at once.
_MOST_SCORES = {"cpu": 1 << 18, "cuda": 1 << 22}


# ----------------------------------------------------------------------------------- sequences and their rows


class Rows(NamedTuple):
    """Of packed sequences, where one begins and ends."""

    query: slice
    key: slice


@dataclass(frozen=True)
class Sequences:
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


def sequences(sizes: Attention, a: Arguments, tangents: Tangents) -> Iterator[Sequences]:
    if a.cu_seqlens_q is None or a.cu_seqlens_k is None:
        yield Sequences(a, tangents, 0, sizes.batch, sizes.queries, sizes.keys, None)
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
            yield Sequences(a, tangents, b, 1, query - before[0], key - before[1], rows)
        before = query, key


def _within(starts: list[int], most: int) -> list[int]:
    """What is out of bounds as the nearest that is not, as the kernels take it."""
    least, kept = 0, []
    for start in starts:
        least = min(max(start, least), most)
        kept.append(least)
    return kept


# ------------------------------------------------------------------------------------------- units and blocks


class Cut(NamedTuple):
    """Of how many sequences and heads of keys a unit is at most, and of how many queries a block."""

    batch: int
    kv_heads: int
    rows: int


def cut(device: torch.device, queries: int, keys: int, group: int, kv_heads: int) -> Cut:
    """As many as are worth one product after another."""
    scores = _MOST_SCORES.get(device.type, _MOST_SCORES["cpu"])
    of_row = group * max(1, keys)
    rows = min(queries, _MOST_ROWS, max(16, scores // of_row))
    together = max(1, scores // (rows * of_row))
    return Cut(max(1, together // kv_heads), min(together, kv_heads), rows)


def units(s: Sequences, careful: bool) -> Iterator[Unit]:
    query, key = s.of_queries(s.a.query), s.of_keys(s.a.key)
    heads, kv_heads = query.shape[1], key.shape[1]
    group = heads // kv_heads
    if group == 0 or s.queries == 0:
        return
    most = cut(query.device, s.queries, s.keys, group, kv_heads)
    for b in range(0, s.count, most.batch):
        for h in range(0, kv_heads, most.kv_heads):
            of_batch = slice(b, min(b + most.batch, s.count))
            of_heads = slice(h, min(h + most.kv_heads, kv_heads))
            yield Unit(s, of_batch, of_heads, group, most.rows, careful)


class Block(NamedTuple):
    """From and to which row, and which keys these may see."""

    queries: slice
    keys: slice


class Unit:
    """Some heads of keys of some sequences, n in all, with the G heads of queries that share each."""

    def __init__(
        self, s: Sequences, batch: slice, kv_heads: slice, group: int, rows: int, careful: bool
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
