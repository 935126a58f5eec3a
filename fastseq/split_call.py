"""What one process is asked to compute of a sequence that is split, what all have to agree on, who does what.

Each process looks at its own arguments; then all see a table with one row of each, so that all come to the
same conclusions: whether something is wrong, who works on whose keys, what is sent.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from . import autocast
from .attention import (
    _dropout,
    _in_four_dimensions,
    _mask_in_four_dimensions,
    _number,
    _per_head,
    _positions,
    _refuse_nested,
    _seed,
    _softcap,
)
from .attention_checks import Arguments, check_attention, is_causal_bias
from .autograd.function import needs_gradient
from .autograd.split_attention import Options
from .checks import DTYPES, problem, require_tensor
from .dispatch import has_tangent
from .exchange import Schedule, Task
from .sequence_parts import Part, known_split, parts_of, visible_block

# ----------------------------------------------------------------------------------- what this process has


class Call(NamedTuple):
    """The arguments as the operators take them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None  # in four dimensions, the last of all keys or 1
    sinks: Tensor | None
    key_lengths: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    dropout_p: float
    drop_all: bool
    left: int
    right: int
    bottom_right: bool
    split: str
    replicated: bool
    lead: tuple[int, ...] | None  # the batch dimensions, if they are not one
    rank: int
    records: bool  # whether there will be a backward pass


def prepare(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    sinks: Any,
    key_lengths: Any,
    words: tuple[Any, ...],
    split: Any,
    replicated: bool,
) -> Call:
    """Raises whatever this process alone can see to be wrong."""
    dropout_p, is_causal, scale, enable_gqa, causal, window, softcap = words
    for name, given in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, given)
    _refuse_nested(query, key, value)
    _refuse_types(query=query, key=key, value=value, attn_mask=attn_mask)
    if autocast.is_on():
        query, key, value, attn_mask = (autocast.lowered(x) for x in (query, key, value, attn_mask))
    _refuse_transforms(query, key, value, attn_mask, sinks)
    if type(enable_gqa) is not bool:
        raise TypeError(problem(f"enable_gqa={enable_gqa!r}"[:100], "True or False", "bool(enable_gqa)"))
    given_rank = max(x.dim() for x in (query, key, value))
    query, key, value, lead = _in_four_dimensions(query, key, value, enable_gqa)
    left, right, bottom_right = _positions(is_causal, causal, window)
    dropout_p = _dropout(dropout_p)
    drop_all, dropout_p = dropout_p == 1, 0.0 if dropout_p == 1 else dropout_p
    for name, given in (("attn_mask", attn_mask), ("key_lengths", key_lengths)):
        if given is not None:
            require_tensor(name, given)
    if bottom_right and key_lengths is not None:
        raise NotImplementedError(
            problem(
                "causal='bottom_right' with key_lengths, which move the diagonal of each sequence",
                "one of them, for a sequence that is split",
                "attn_mask, or causal='top_left'",
            )
        )
    sinks = None if sinks is None else _per_head("sinks", sinks, query)
    if attn_mask is not None:  # how many keys there are is not known yet; they say so in the table
        keys = attn_mask.shape[-1] if attn_mask.dim() else 1
        of_all = key.new_empty(1).expand(*key.shape[:2], keys, key.shape[3])
        attn_mask = _mask_in_four_dimensions(attn_mask, query, of_all, lead)
    call = Call(
        query,
        key,
        value,
        attn_mask,
        sinks,
        key_lengths,
        _seed(query) if dropout_p else None,
        1 / math.sqrt(max(1, query.shape[-1])) if scale is None else _number("scale", scale),
        0.0 if softcap is None else _softcap(softcap),
        dropout_p,
        drop_all,
        left,
        right,
        bottom_right,
        known_split(split),
        replicated,
        None if given_rank == 4 and len(lead) == 1 else lead,
        given_rank,
        torch.is_grad_enabled() and needs_gradient(query, key, value, attn_mask, sinks),
    )
    mask = attn_mask[..., :1] if attn_mask is not None and attn_mask.shape[-1] else None
    tensors = (query, key, value, mask, key_lengths, None, None, None, sinks, call.seed)
    numbers = (call.scale, call.softcap, dropout_p, left, right, bottom_right)
    check_attention(Arguments(*tensors, *numbers, return_weights=False))
    return call


def _refuse_types(**given: Any) -> None:
    for name, x in given.items():
        if is_causal_bias(x):
            raise TypeError(
                problem(
                    f"{name} of type CausalBias", "a mask, or the diagonal as a word", "causal='top_left'"
                )
            )
        if hasattr(x, "to_local"):
            raise TypeError(
                problem(
                    f"{name} of type {type(x).__name__}",
                    "this process's part as a plain tensor",
                    f"{name}.to_local(), of one that is sharded along the sequence",
                )
            )


def _refuse_transforms(*tensors: Tensor | None) -> None:
    forward_mode = forward_ad._current_level >= 0 and has_tangent(tensors)
    if forward_mode or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            problem(
                "a call in forward mode" if forward_mode else "a call within a transform of torch.func",
                "first derivatives by backward(), of attention that is split between processes",
                "torch.autograd.grad",
            )
        )


# --------------------------------------------------------------------------------- what all have to agree on

_SHARED = (  # by which the blocks and messages of a process follow from those of another
    "dtype of query",
    "batch",
    "query heads",
    "key heads",
    "features of key",
    "features of value",
    "left",
    "right",
    "causal='bottom_right'",
    "scale",
    "softcap",
    "dropout_p",
    "split",
    "replicated_query",
    "whether a gradient is recorded",
    "attn_mask",
    "key_lengths",
    "sinks",
)
_OWN = (
    *("queries", "keys", "columns of attn_mask", "shortest of key_lengths", "longest of key_lengths"),
    *("gradient of query", "gradient of key", "gradient of value", "gradient of attn_mask"),
)


def _bits(number: float) -> int:
    return struct.unpack("q", struct.pack("d", number))[0]


def _row(call: Call) -> list[int]:
    """This process's line in the table that all see: whether it has a call at all, _SHARED, _OWN."""
    wants = [call.records and x is not None and x.requires_grad for x in call[:4]]
    batch, heads, queries, _ = call.query.shape
    columns = 1 if call.attn_mask is None else call.attn_mask.shape[3]
    lengths = call.key_lengths
    looks = lengths is not None and lengths.is_cpu and lengths.numel()  # a GPU would have to be waited for
    extremes = [int(lengths.min()), int(lengths.max())] if looks else [0, 0]
    shared = (
        DTYPES[call.query.dtype],
        batch,
        heads,
        call.key.shape[1],
        call.key.shape[3],
        call.value.shape[3],
        call.left,
        call.right,
        call.bottom_right,
        _bits(call.scale),
        _bits(call.softcap),
        _bits(call.dropout_p),
        call.split == "zigzag",
        call.replicated,
        call.records,
        0 if call.attn_mask is None else 1 + (call.attn_mask.dtype is torch.bool),
        call.key_lengths is not None,
        call.sinks is not None,
    )
    return [1, *map(int, (*shared, queries, call.key.shape[2], columns, *extremes, *wants))]


def agree(prepared: Callable[[], Call], group: dist.ProcessGroup) -> tuple[Call, list[list[int]]]:
    """This process's call, and the rows of all; raises in every process if something is wrong in one."""
    error = call = None
    row = [0] * (1 + len(_SHARED) + len(_OWN))
    try:
        call = prepared()
        row = _row(call)
    except Exception as raised:
        error = raised
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    table = [r.tolist() for r in rows]
    if error is not None:
        raise error
    assert call is not None
    refused = [rank for rank, r in enumerate(table) if not r[0]]
    if refused:
        _raise_for_others(refused)
    for column, name in enumerate(_SHARED, start=1):
        values = [r[column] for r in table]
        if any(value != values[0] for value in values):
            if name in ("scale", "softcap", "dropout_p"):
                values = [struct.unpack("d", struct.pack("q", value))[0] for value in values]
            _raise_for_difference(name, values)
    if call.replicated:
        for name in ("queries", "gradient of query", "gradient of attn_mask"):
            values = _column(name, table)
            if any(value != values[0] for value in values):
                _raise_for_difference(name, values)
    _check_all_keys(table)
    return call, table


def _column(name: str, table: list[list[int]]) -> list[int]:
    return [row[1 + len(_SHARED) + _OWN.index(name)] for row in table]


def _check_all_keys(table: list[list[int]]) -> None:
    """What only the number of all keys tells."""
    keys = sum(_column("keys", table))
    columns = _column("columns of attn_mask", table)
    if any(n not in (1, keys) for n in columns):
        raise RuntimeError(
            problem(
                f"attn_mask with {', '.join(map(str, columns))} columns (ranks 0, 1, ...)",
                f"{keys}, one for each key of all processes, or 1",
                "attn_mask of this process's queries and all keys",
            )
        )
    shortest, longest = min(_column(_OWN[3], table)), max(_column(_OWN[4], table))
    if shortest < 0 or longest > keys:
        raise RuntimeError(
            problem(
                f"key_lengths from {shortest} to {longest} for {keys} keys of all processes",
                f"lengths from 0 to {keys}",
                f"key_lengths.clamp(0, {keys})",
            )
        )


def _raise_for_others(ranks: Sequence[int]) -> NoReturn:
    raise RuntimeError(
        problem(
            f"arguments that process(es) {ranks} of the group refused",
            "arguments that every process accepts",
            "see the error there",
        )
    )


def _raise_for_difference(name: str, values: Sequence[Any]) -> NoReturn:
    raise RuntimeError(
        problem(
            f"{name} that differ(s) between the processes: {', '.join(map(str, values))} (ranks 0, 1, ...)",
            "the same in all processes; only the numbers of rows may differ",
            "check what each process passes",
        )
    )


# --------------------------------------------------------------------------------------------- the schedule


def plan(call: Call, table: list[list[int]], group: dist.ProcessGroup) -> tuple[Options, Schedule]:
    """Who computes what, and sends what to whom; but for Options the same in every process."""
    queries, keys = _column("queries", table), _column("keys", table)
    size, rank = len(table), dist.get_rank(group)
    unlimited = call.left < 0 and call.right < 0
    key_parts = parts_of(keys, call.split)
    if call.replicated:
        query_parts = [[Part(0, queries[0], 0)]] * size
        queries = queries[:1]
    else:
        query_parts = parts_of(queries, call.split)
        _check_shares("query", queries, query_parts)
    _check_shares("key", keys, key_parts)
    if unlimited and call.attn_mask is None and call.key_lengths is None:
        # Nobody asks for places: as few blocks as can be.
        key_parts = parts_of(keys, "contiguous")
        query_parts = query_parts if call.replicated else parts_of(queries, "contiguous")
    offset = sum(keys) - sum(queries) if call.bottom_right else 0
    tasks = []
    for process, mine in enumerate(query_parts):
        tasks.append([])
        for source in [process] if call.replicated else range(size):
            for i, part in enumerate(key_parts[source]):
                seen = [visible_block(q, part, call.left, call.right, offset) for q in mine]
                blocks = [block for block in seen if block is not None]
                if blocks:
                    tasks[-1].append(Task(source, i, blocks))
    wants_grad = [
        (bool(of_key), bool(of_value))
        for of_key, of_value in zip(
            _column("gradient of key", table), _column("gradient of value", table), strict=True
        )
    ]
    of_query, of_mask = (bool(_column(f"gradient of {x}", table)[rank]) for x in ("query", "attn_mask"))
    of_sinks = call.records and call.sinks is not None and call.sinks.requires_grad
    lengths = [[part.length for part in parts] for parts in key_parts]
    schedule = Schedule(group, rank, size, lengths, tasks, wants_grad)
    wanted = (of_query, of_mask, of_sinks)
    return Options(call.scale, call.softcap, call.dropout_p, True, call.replicated, wanted), schedule


def _check_shares(name: str, lengths: Sequence[int], parts: Sequence[Sequence[Part]]) -> None:
    """Raises in all processes, for all see the same lengths."""
    shares_of_all = [sum(part.length for part in of_process) for of_process in parts]
    if list(lengths) != shares_of_all:
        raise RuntimeError(
            problem(
                f"{name} with {', '.join(map(str, lengths))} rows (ranks 0, 1, ...) and split='zigzag'",
                f"{', '.join(map(str, shares_of_all))} rows: shares r and 2 W - 1 - r of 2 W",
                "x[:, fastseq.distributed.sequence_positions(length, split='zigzag')]",
            )
        )
