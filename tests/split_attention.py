"""Cases of attention over a sequence that is split between processes, and how to run one there and in one.

Every process makes the whole of the data from the same seed and takes its part, so that the parts of the
results, put together, are what one process makes of the whole.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

import fastseq
from fastseq.sequence_parts import parts_of
from tolerances import SAME_FLOAT64, assert_as_accurate_as_torch


@dataclass(frozen=True)
class Case:
    """One call; queries and keys are the lengths of the parts of processes 0, 1, ..."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    options: dict = field(default_factory=dict)  # of the function, plain ones
    heads: int = 4
    kv_heads: int = 4
    value_size: int = 8
    mask: str = ""  # "bool" or "float"
    mask_dims: str = "BHQK"  # in which it is not broadcast
    sinks: bool = False
    lengths: tuple[int, ...] = ()
    split: str = "contiguous"
    replicated: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def size(self) -> int:
        return len(self.keys)

    @property
    def all_queries(self) -> int:
        return self.queries[0] if self.replicated else sum(self.queries)


NAMES = ("query", "key", "value", "attn_mask", "sinks")
BATCH, FEATURES = 2, 8


def make_data(case: Case) -> dict[str, Tensor]:
    """The whole: arguments by their names, and the gradients that come in."""
    g = torch.Generator().manual_seed(5)
    queries, keys = case.all_queries, sum(case.keys)

    def randn(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    sums = torch.float64 if case.dtype is torch.float64 else torch.float32
    data = {
        "query": randn(BATCH, case.heads, queries, FEATURES),
        "key": randn(BATCH, case.kv_heads, keys, FEATURES),
        "value": randn(BATCH, case.kv_heads, keys, case.value_size),
        "grad of output": randn(BATCH, case.heads, queries, case.value_size),
        "grad of lse": randn(BATCH, case.heads, queries, dtype=sums),
    }
    if case.mask:
        full = {"B": BATCH, "H": case.heads, "Q": queries, "K": keys}
        mask = randn(*(size if d in case.mask_dims else 1 for d, size in full.items()))
        data["attn_mask"] = mask > -0.5 if case.mask == "bool" else mask
    if case.sinks:
        data["sinks"] = randn(case.heads, dtype=sums)
    if case.lengths:
        data["key_lengths"] = torch.tensor(case.lengths)
    return data


def call(case: Case, data: dict[str, Tensor], function, **more) -> dict[str, Tensor]:
    """Output, lse, and gradients of all leaves, under the gradients that the data have."""
    leaves = {
        name: data[name].detach().requires_grad_(data[name].is_floating_point())
        for name in NAMES
        if name in data
    }
    lengths = {"key_lengths": data["key_lengths"]} if case.lengths else {}
    grouped = case.heads != case.kv_heads
    output, lse = function(**leaves, **lengths, **case.options, **more, enable_gqa=grouped, return_lse=True)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    incoming = (data["grad of output"], data["grad of lse"])
    grads = torch.autograd.grad((output, lse), list(wanted.values()), incoming)
    results = {"output": output.detach(), "lse": lse.detach()}
    return results | {f"grad of {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def rows_of(lengths: tuple[int, ...], split: str, rank: int) -> Tensor:
    parts = parts_of(lengths, split)[rank]
    return torch.cat([torch.arange(p.start, p.start + p.length) for p in parts])


def part_of(case: Case, data: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    keys = rows_of(case.keys, case.split, rank)
    of_queries = ["query", "grad of output", "grad of lse"]
    if case.replicated:
        of_queries = []
    elif case.mask and "Q" in case.mask_dims:
        of_queries.append("attn_mask")
    queries = None if case.replicated else rows_of(case.queries, case.split, rank)
    return (
        data
        | {name: data[name].index_select(2, keys) for name in ("key", "value")}
        | {name: data[name].index_select(2, queries) for name in of_queries}
    )


def run_part(case: Case, members: tuple[int, ...], cut=part_of) -> dict[str, Tensor] | None:
    """In each process of a world: its part of the results; None where it is no member."""
    group = group_of(members)
    if dist.get_rank() not in members:
        return None
    data = cut(case, make_data(case), dist.get_rank(group))
    function = fastseq.distributed.scaled_dot_product_attention
    return call(case, data, function, split=case.split, replicated_query=case.replicated, group=group)


_GROUPS: dict = {}


def group_of(members: tuple[int, ...]):
    """Made once, by all processes of the world."""
    if members not in _GROUPS:
        _GROUPS[members] = dist.new_group(list(members))
    return _GROUPS[members]


def together(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all processes as those of one."""
    whole = {}
    for name in parts[0]:
        of_keys = name in ("grad of key", "grad of value")
        without_rows = name == "grad of sinks" or (name == "grad of attn_mask" and "Q" not in case.mask_dims)
        if without_rows and not case.replicated:
            whole[name] = sum(part[name] for part in parts)
        elif of_keys or not (case.replicated or name == "grad of sinks"):
            lengths = case.keys if of_keys else case.queries
            places = torch.cat([rows_of(lengths, case.split, rank) for rank in range(case.size)])
            joined = torch.cat([part[name] for part in parts], dim=2)
            whole[name] = torch.empty_like(joined).index_copy_(2, places, joined)
        else:
            for part in parts[1:]:
                assert torch.equal(part[name], parts[0][name]), f"{name} is the same in all processes"
            whole[name] = parts[0][name]
    return whole


def check(case: Case, parts: list[dict[str, Tensor]]) -> None:
    """Against one process: to rounding in float64, else as accurate as one process is."""
    data = make_data(case)
    ours, alone = together(case, parts), call(case, data, fastseq.scaled_dot_product_attention)
    assert ours.keys() == alone.keys()
    if case.dtype is torch.float64:
        for name, x in alone.items():
            torch.testing.assert_close(ours[name], x, **SAME_FLOAT64, msg=lambda text, n=name: f"{n}: {text}")
        return
    exact = call(
        case,
        {name: x.double() if x.is_floating_point() else x for name, x in data.items()},
        fastseq.scaled_dot_product_attention,
    )
    for name, x in alone.items():
        assert_as_accurate_as_torch(ours[name], x, exact[name], x.dtype, name, units=case.dtype)
