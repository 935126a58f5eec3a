"""Attention over a sequence that is split between the processes of torch.distributed.

`import fastseq` does not import this module; `fastseq.distributed` does, when it is first used. Recurrent
modules and attention need nothing of it for DistributedDataParallel or fully_shard.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from .attention import _as_it_was
from .autograd.split_attention import split_attention
from .checks import problem
from .sequence_parts import known_split, parts_of, shares
from .split_call import agree, plan, prepare

__all__ = ["scaled_dot_product_attention", "sequence_positions"]


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
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    split: str = "contiguous",
    replicated_query: bool = False,
    group: Any = None,
) -> Any:
    r"""Attention over a sequence of which every process holds a part; also called ring attention or context
    parallelism.

    Process r holds keys K_r and values V_r, and queries Q_r, and gets the rows of its own queries of what
    `fastseq.scaled_dot_product_attention` would make of the whole sequence. With the blocks

        lse_rs = log(sum_{j in s} exp(score_ij))      output_rs = sum_{j in s} exp(score_ij - lse_rs) v_j

    of its queries i and the keys of each process s, merged one after the other,

        lse_r = log(sum_s exp(lse_rs))                output_r = sum_s exp(lse_rs - lse_r) output_rs

    is exact, and so are all gradients: those of K_s and V_s are added up over the processes. The merging, and
    all sums over processes, are done in float32, or float64 beside float64. The lengths of the parts may
    differ, and be 0.

    All processes of the group must call it, and go through the backward pass if one does.

    Args:
        query: (..., Hq, Sq, D), this process's part of the queries; Sq may differ between the processes.
        key: (..., Hkv, Sk, D), this process's part of the keys; Sk likewise.
        value: (..., Hkv, Sk, Dv). Dtypes and shapes are otherwise as for
            `fastseq.scaled_dot_product_attention`, and the same in all processes.
        attn_mask: bool or float, for this process's queries and the keys of all: any shape that broadcasts to
            (..., Hq, Sq, sum of all Sk). The gradient of a float mask is that of this process's queries.
        dropout_p: probability of zeroing a weight. Each process draws its own seed.
        is_causal, causal, window: as for the whole sequence: rows have the places that they have there.
        scale, enable_gqa, softcap, return_lse, deterministic: as for one process.
        sinks: (Hq,), the same in all processes; the gradient is that of this process's queries.
        key_lengths: (B,), int32 or int64, lengths of the whole sequence, the same in all processes: keys from
            place key_lengths[b] on are hidden. Not with causal="bottom_right".
        split: "contiguous": the processes hold one part each, in their order. "zigzag", of W processes: the
            sequence is cut into 2 W shares, and process r holds number r and number 2 W - 1 - r, one behind
            the other. Under a causal mask all processes have the same work then, where with contiguous parts
            the last one has almost twice the mean, and the others wait. `sequence_positions` tells
            who holds what.
        replicated_query: every process has all queries and gets the whole output, as in decoding with a cache
            that is split. Nothing but lse and output is sent then. In the backward pass the gradient of the
            output has to be the same in all processes, as it is where all compute the same loss; the
            gradients of query and attn_mask are, too. `split` then says which keys a process holds.
        group: a ProcessGroup, or a DeviceMesh of one dimension; the default group if None.

    Returns:
        output (..., Hq, Sq, Dv), of this process's queries; with `return_lse` the tuple of it and lse
        (..., Hq, Sq). Both are differentiable.

    Raises:
        RuntimeError: no process group; shapes, dtypes or options that differ between the processes where they
            must not; whatever `fastseq.scaled_dot_product_attention` raises in any process. All
            processes raise then, before anything but sizes was exchanged, so that none waits for the others.
        TypeError, ValueError: as for one process, and for an unknown split.
        NotImplementedError: causal="bottom_right" with key_lengths.

    First the processes tell each other their sizes, in one small all-gather. Then every process sends its
    keys and values directly to each process that sees something of them, at step t to the t-th after it,
    while it computes with those that came at step t - 1; the backward pass sends them again, and gradients of
    as many bytes back. So each holds at most three processes' keys, whatever the number of processes, and
    what a causal mask or a window hides whole is neither computed nor sent.
    Weights, ALiBi slopes and packed sequences are not there; nor are second derivatives, forward mode and
    vmap, which raise errors. torch.compile breaks its graph here, as what is computed and sent follows from
    numbers of other processes; with fullgraph=True, and in torch.export, that is an error.
    Saved for the backward pass: this process's own tensors, output, in 16-bit dtypes what rounding took from
    it, and three numbers for each query.

    Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers for Near-Infinite Context, 2023;
    Milakov and Gimelshein, Online normalizer calculation for softmax, 2018. That the order of the rows can
    balance the work of a causal mask: Brandon et al., Striped Attention, 2023.

    Example:
        >>> import torch.distributed as dist  # torchrun starts a process for each part; here is one
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> query, key, value = (torch.randn(2, 4, 10, 16) for _ in range(3))  # this process's part
        >>> output = fastseq.distributed.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> whole = fastseq.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> output.shape, torch.allclose(output, whole, atol=1e-6)
        (torch.Size([2, 4, 10, 16]), True)
        >>> dist.destroy_process_group()
    """
    if is_compiling():
        _leave_the_graph()
    group = _group(group)
    prepared = partial(
        prepare,
        query,
        key,
        value,
        attn_mask,
        sinks,
        key_lengths,
        (dropout_p, is_causal, scale, enable_gqa, causal, window, softcap),
        split,
        bool(replicated_query),
    )
    call, table = agree(prepared, group)
    options, schedule = plan(call, table, group)
    tensors = (call.query, call.key, call.value, call.attn_mask, call.key_lengths, call.sinks, call.seed)
    output, lse = split_attention(options._replace(deterministic=bool(deterministic)), schedule, *tensors)
    if call.drop_all:
        output = output.masked_fill(torch.ones((), dtype=torch.bool, device=output.device), 0)
    if call.lead is not None:
        output, lse = (_as_it_was(x, call.lead, call.rank) for x in (output, lse))
    return (output, lse) if return_lse else output


def sequence_positions(
    length: int, *, split: str = "contiguous", group: Any = None, device: Any = None
) -> Tensor:
    """Which rows of a sequence this process holds: for cutting it, for position embeddings, for targets.

    Args:
        length: of the whole sequence.
        split: as for `scaled_dot_product_attention`. Contiguous parts are as even as can be, the longer
            ones first.
        group: as there.
        device: of the result.

    Returns:
        (n,) int64, the places of this process's rows in the whole sequence, in the order in which it holds
        them.

    Raises:
        RuntimeError: no process group. ValueError: an unknown split, a negative length.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.randn(2, 10, 16)
        >>> mine = fastseq.distributed.sequence_positions(x.shape[1], split="zigzag")
        >>> x[:, mine].shape  # all of it, for here is one process
        torch.Size([2, 10, 16])
        >>> dist.destroy_process_group()
    """
    group, split = _group(group), known_split(split)
    if length < 0:
        raise ValueError(problem(f"length={length}", "a length of at least 0", "x.shape[1]"))
    size = dist.get_world_size(group)
    lengths = shares(length, size)  # in a zigzag only their sum counts
    parts = parts_of(lengths, split)[dist.get_rank(group)]
    return torch.cat([torch.arange(p.start, p.start + p.length, device=device) for p in parts])


def _leave_the_graph() -> None:
    """What is computed and sent follows from numbers of other processes, so that no graph can have it."""
    given, accepted = "attention that is split between processes, in a graph", "calls outside of graphs"
    if not is_dynamo_compiling():
        raise RuntimeError(problem(given, accepted, "torch.export of what is before and behind it"))
    torch._dynamo.graph_break(
        msg=problem(given, accepted, "torch.compile without fullgraph, which leaves it out")
    )


# ------------------------------------------------------------------------------------------------- the group


def _group(given: Any) -> dist.ProcessGroup:
    if not dist.is_available():
        raise RuntimeError(
            problem("a torch without torch.distributed", "one that was built with it", "another torch")
        )
    if given is None or given is dist.group.WORLD:
        if not dist.is_initialized():
            raise RuntimeError(
                problem(
                    "no process group",
                    "an initialized default group, or group=...",
                    "torch.distributed.init_process_group first, and torchrun to start the processes; "
                    "fastseq.scaled_dot_product_attention in a single one",
                )
            )
        return dist.group.WORLD
    if hasattr(given, "get_group"):  # a DeviceMesh
        if given.ndim != 1:
            raise RuntimeError(
                problem(
                    f"group, a DeviceMesh of {given.ndim} dimensions",
                    "a DeviceMesh of one dimension",
                    "mesh['name'], the dimension along which the sequence is split",
                )
            )
        given = given.get_group()
    if given is dist.GroupMember.NON_GROUP_MEMBER or not isinstance(given, dist.ProcessGroup):
        raise RuntimeError(
            problem(
                f"group of type {type(given).__name__}, of which this process is no member",
                "a ProcessGroup that this process is in, a DeviceMesh, or None",
                "torch.distributed.new_group, and calls by its members only",
            )
        )
    return given
