"""A sequence split between processes: which rows each has, and what its queries see of the others' keys.

Plain numbers only; nothing here knows of tensors or messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .checks import problem

SPLITS = ("contiguous", "zigzag")


class Part(NamedTuple):
    """Rows that are neighbours in the whole sequence."""

    start: int  # in the whole sequence
    length: int
    offset: int  # in what its process holds


class Block(NamedTuple):
    """Queries of one part and the keys of another that they see, and how, as the operators take it."""

    queries: slice  # of what the process of the queries holds
    keys: slice  # of the part of the keys
    first_query: int  # in the whole sequence
    first_key: int
    left: int  # the window around query i of this block and key i of it; -1: unlimited
    right: int


def known_split(split: object) -> str:
    if isinstance(split, str) and split in SPLITS:
        return split
    raise ValueError(problem(f"split={split!r}"[:100], "'contiguous' or 'zigzag'", "split='contiguous'"))


def shares(length: int, size: int) -> list[int]:
    """`length` rows in `size` shares, as even as can be, the larger ones first."""
    return [length // size + (i < length % size) for i in range(size)]


def parts_of(lengths: Sequence[int], split: str) -> list[list[Part]]:
    """The parts of every process, in the order in which it holds them, of these many rows each.

    Contiguous: one part each, of any length, in the order of the processes. Zigzag, of W processes: the
    sequence in 2 W shares, of which process r has number r and, behind it, number 2 W - 1 - r. Under a
    causal mask all then have the same work.
    """
    if split == "contiguous":
        starts = accumulate(lengths, initial=0)
        return [[Part(start, length, 0)] for start, length in zip(starts, lengths, strict=False)]
    size = len(lengths)
    lengths_of_shares = shares(sum(lengths), 2 * size)
    starts = list(accumulate(lengths_of_shares, initial=0))
    parts = []
    for rank in range(size):
        first, second = lengths_of_shares[rank], lengths_of_shares[-1 - rank]
        parts.append([Part(starts[rank], first, 0), Part(starts[2 * size - 1 - rank], second, first)])
    return parts


def visible_block(queries: Part, keys: Part, left: int, right: int, offset: int) -> Block | None:
    """The smallest block with all that the queries see of the keys; None if that is nothing.

    Query p of the whole sequence sees keys p + offset - left to p + offset + right, -1 is no limit.
    """
    ahead = queries.start + offset - keys.start  # query i of its part stands beside key i + ahead of its own
    first, last = 0, queries.length
    if right >= 0:
        first = max(first, -ahead - right)
    if left >= 0:
        last = min(last, keys.length - ahead + left)
    first_key, last_key = 0, keys.length
    if left >= 0:
        first_key = max(first_key, first + ahead - left)
    if right >= 0:
        last_key = min(last_key, last + ahead + right)
    if first >= last or first_key >= last_key:
        return None
    ahead += first - first_key
    # A limit that none of these keys is beyond is none.
    left = -1 if left < 0 or left - ahead >= last - first - 1 else left - ahead
    right = -1 if right < 0 or right + ahead >= last_key - first_key - 1 else right + ahead
    return Block(
        slice(queries.offset + first, queries.offset + last),
        slice(first_key, last_key),
        queries.start + first,
        keys.start + first_key,
        left,
        right,
    )
