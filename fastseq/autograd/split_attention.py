"""Attention over a sequence split between processes, with its gradients.

Each process computes the blocks of its own queries, with the keys and values that visit it, by the operators
of attention_ops. The forward pass merges the blocks' outputs by their log-sum-exps, in the dtype of sums:

    lse = log(sum_b exp(lse_b))        output = sum_b exp(lse_b - lse) output_b

The backward pass gives every block the output, the remainder and the normalizer of the whole row, so that the
operator makes the weights that the block has in it; its gradients only have to be added up. Saved are this
process's own tensors, output, lse, remainder and normalizer, and nothing for each block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import attention_ops
from ..attention_checks import dtype_of_sums
from ..checks import problem
from ..exchange import Returns, Schedule, visiting
from ..sequence_parts import Block
from .function import recording


class Options(NamedTuple):
    scale: float
    softcap: float
    dropout_p: float
    deterministic: bool
    replicated: bool  # whether every process has all queries, and its own keys alone to look at
    wanted: tuple[bool, bool, bool]  # the gradients of query, attn_mask and sinks


def split_attention(options: Options, schedule: Schedule, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and lse of query, key, value, attn_mask, key_lengths, sinks, seed in four dimensions.

    attn_mask and key_lengths are of all keys. The schedule says whose keys these are.
    """
    if recording() and any(x is not None and x.requires_grad for x in tensors):
        return _SplitAttention.apply(options, schedule, *tensors)
    return _forward(options, schedule, False, *tensors)[:2]


# ---------------------------------------------------------------------------------------------------- merging


class _Merged:
    """Rows of output, of which more and more keys are known."""

    def __init__(self, query: Tensor, value_size: int, sink: Tensor | None) -> None:
        sums, rows = dtype_of_sums(query.dtype), query.shape[:-1]
        if query.shape[-1] == value_size:
            self.output = torch.zeros_like(query, dtype=sums)
        else:
            self.output = query.new_zeros((*rows, value_size), dtype=sums)
        self.lse = query.new_full(rows, -math.inf, dtype=sums)
        if sink is not None:
            self.lse.copy_(sink.view(-1, 1).expand(rows))
        self.highest = query.new_full(rows, -math.inf, dtype=sums)  # as the operator's normalizer
        self.inverse_sum = query.new_zeros(rows, dtype=sums)

    def add(self, rows: slice, output: Tensor, lse: Tensor, remainder: Tensor, normalizer: Tensor) -> None:
        """Of keys that were not among those before. The remainder is empty where there is none."""
        merged = self.output[:, :, rows]
        before, highest, inverse_sum = (x[:, :, rows] for x in (self.lse, self.highest, self.inverse_sum))
        total = torch.logaddexp(before, lse)
        share_before, share = _share(before, total), _share(lse, total)
        merged *= share_before.unsqueeze(-1)
        merged += share.unsqueeze(-1) * output
        if remainder.dim() > 1:
            merged += share.unsqueeze(-1) * remainder
        if normalizer.dim() > 1:
            # That of the block with the highest score, which makes no weight overflow.
            of_block = normalizer[0].masked_fill(lse == -math.inf, -math.inf)
            inverse_sum.copy_(
                torch.where(of_block > highest, normalizer[1] * share, inverse_sum * share_before)
            )
            highest.copy_(torch.maximum(of_block, highest))
        before.copy_(total)

    def add_other_processes(self, schedule: Schedule) -> None:
        """Every process has merged its own keys, and becomes the same as all others."""
        lses = [torch.empty_like(self.lse) for _ in range(schedule.size)]
        dist.all_gather(lses, self.lse, group=schedule.group)
        total = torch.stack(lses).logsumexp(0)
        share = _share(self.lse, total)
        self.output *= share.unsqueeze(-1)
        self.output = _sum_of_all(self.output, schedule)
        self.inverse_sum *= share
        self.lse = total

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """output, lse, remainder and normalizer, as the operator returns them."""
        output, remainder = _rounded(self.output, dtype)
        highest = self.highest.masked_fill(self.highest == -math.inf, 0)
        return output, self.lse, remainder, torch.stack([highest, self.inverse_sum])


def _rounded(output: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """And what rounding took from it, if the dtype has 16 bits."""
    rounded = output.to(dtype)
    if dtype.itemsize != 2:
        return rounded, None
    return rounded, (output - rounded).nan_to_num_(0.0, 0.0, 0.0).to(dtype)


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """exp(lse - total), 0 of nothing."""
    return torch.exp(lse - total.masked_fill(total == -math.inf, 0))


def _sum_of_all(x: Tensor, schedule: Schedule) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=schedule.group)
    return x


# ----------------------------------------------------------------------------------------------------- blocks


class _Forward(NamedTuple):
    """Tensors of the forward pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    key_lengths: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None

    def of_block(
        self, options: Options, block: Block, key: Tensor, value: Tensor, keys: int
    ) -> tuple[Any, ...]:
        """The operator's first arguments, up to bottom_right. `keys`: of all processes."""
        count, mask, lengths, seed = block.keys.stop - block.keys.start, *self[3:5], self.seed
        if mask is not None:
            mask = mask[_in_mask(mask, block)]
        if lengths is not None:
            lengths = (lengths - block.first_key).clamp(0, count)
        if seed is not None:  # other weights are dropped in every block
            seed = (seed + (block.first_query * keys + block.first_key)) & (2**63 - 1)
        return (
            *(self.query[:, :, block.queries], key[:, :, block.keys], value[:, :, block.keys]),
            *(mask, lengths, None, None, None, None, seed),
            *(options.scale, options.softcap, options.dropout_p, block.left, block.right, False),
        )


def _in_mask(mask: Tensor, block: Block) -> tuple[slice, ...]:
    everything, keys = slice(None), block.keys.stop - block.keys.start
    rows = block.queries if mask.shape[2] != 1 else everything
    columns = slice(block.first_key, block.first_key + keys) if mask.shape[3] != 1 else everything
    return everything, everything, rows, columns


def _dense_parts(x: Tensor, schedule: Schedule) -> list[Tensor]:
    """The parts of this process's keys or values, as messages want them."""
    return [part.contiguous() for part in x.split(list(schedule.lengths[schedule.rank]), dim=2)]


def _forward(
    options: Options, schedule: Schedule, save: bool, *tensors: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """output, lse, remainder and normalizer."""
    a = _Forward(*tensors)
    counts = a.sinks is not None and not (options.replicated and schedule.rank)  # once
    merged = _Merged(a.query, a.value.shape[3], a.sinks if counts else None)
    parts = _dense_parts(a.key, schedule), _dense_parts(a.value, schedule)
    save = save or a.query.itemsize == 2  # for the remainder, so that no rounded numbers are added up
    for _, visitors in visiting(schedule, *parts):
        for task, key, value in visitors:
            for block in task.blocks:
                of_block = a.of_block(options, block, key, value, schedule.keys)
                output, lse, _, remainder, normalizer = attention_ops.attention(*of_block, False, False, save)
                merged.add(block.queries, output, lse, remainder, normalizer)
    if options.replicated:
        merged.add_other_processes(schedule)
    return merged.results(a.query.dtype)


# -------------------------------------------------------------------------------------------------- gradients


class _Incoming(NamedTuple):
    """What the backward pass has beside the tensors of the forward pass."""

    grad_output: Tensor | None
    grad_lse: Tensor | None
    output: Tensor
    lse: Tensor
    remainder: Tensor | None
    normalizer: Tensor

    def of_rows(self, rows: slice) -> _Incoming:
        *of_queries, normalizer = self
        return _Incoming(
            *(None if x is None else x[:, :, rows] for x in of_queries), normalizer[:, :, :, rows]
        )

    def whole_output(self) -> Tensor:
        output = self.output.to(self.lse.dtype)
        return output if self.remainder is None else output + self.remainder


def _makes_its_own_delta(of_block: tuple[Any, ...]) -> bool:
    """Whether the operator may, of some rows, of the weights that it sees and not of output."""
    _, key, _, _, key_lengths, *_, left, right, _ = of_block
    kernels = attention_ops.KERNELS.get(key.device.type)
    has_window = left >= 0 or right >= 0
    return kernels is None or kernels.makes_delta(key.shape[2], key_lengths is not None, has_window)


def _with_delta_of_block(incoming: _Incoming, of_block: tuple[Any, ...]) -> _Incoming:
    """The same gradients, whether the operator makes delta of output or of weights: the output is the block's
    share of it, and the other keys' part of delta is in grad_lse."""
    if incoming.grad_output is None:
        return incoming
    output, lse, _, remainder, _ = attention_ops.attention(*of_block, False, False, True)
    block = incoming._replace(output=output, remainder=remainder if remainder.dim() > 1 else None)
    share = block.whole_output() * _share(lse, incoming.lse).unsqueeze(-1)
    delta = (incoming.grad_output * (incoming.whole_output() - share)).sum(-1)
    grad_lse = -delta if incoming.grad_lse is None else incoming.grad_lse - delta
    output, remainder = _rounded(share, output.dtype)
    return incoming._replace(grad_lse=grad_lse, output=output, remainder=remainder)


def _backward(
    options: Options, schedule: Schedule, a: _Forward, incoming: _Incoming
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, attn_mask and sinks."""
    sums = incoming.lse.dtype
    of_query, of_mask, of_sinks = options.wanted
    grad_query = torch.zeros_like(a.query, dtype=sums) if of_query else None
    grad_mask = torch.zeros_like(a.attn_mask, dtype=sums) if of_mask else None
    parts = _dense_parts(a.key, schedule), _dense_parts(a.value, schedule)
    returns = Returns(schedule, *parts, sums)
    for step, visitors in visiting(schedule, *parts):
        of_visitors = []
        for task, key, value in visitors:
            wants = schedule.wants_grad[task.source]
            grad_key, grad_value = (
                torch.zeros_like(x, dtype=sums) if want else None
                for x, want in zip((key, value), wants, strict=True)
            )
            wanted = [of_query, *wants, of_mask, False]
            for block in task.blocks if any(wanted) else ():
                of_block = a.of_block(options, block, key, value, schedule.keys)
                given = incoming.of_rows(block.queries)
                if _makes_its_own_delta(of_block):
                    given = _with_delta_of_block(given, of_block)
                tensors, numbers = of_block[:10], of_block[10:]
                grads = iter(
                    attention_ops.attention_backward(
                        given.grad_output,
                        given.grad_lse,
                        None,
                        *tensors,
                        given.output,
                        given.normalizer,
                        None,
                        given.remainder,
                        *numbers,
                        wanted,
                        options.deterministic,
                    )
                )
                if grad_query is not None:
                    grad_query[:, :, block.queries] += next(grads)
                for total in (grad_key, grad_value):
                    if total is not None:
                        total[:, :, block.keys] += next(grads)
                if grad_mask is not None:
                    grad_mask[_in_mask(grad_mask, block)] += next(grads)
            of_visitors.append((task, grad_key, grad_value))
        returns.give(step, of_visitors)
    returns.finish()
    if options.replicated:
        grad_query, grad_mask = (
            None if x is None else _sum_of_all(x, schedule) for x in (grad_query, grad_mask)
        )
    grad_key, grad_value = (
        None if column[0] is None else torch.cat(column, dim=2) for column in zip(*returns.sums, strict=True)
    )
    return (
        *(None if x is None else x.to(a.query.dtype) for x in (grad_query, grad_key, grad_value)),
        None if grad_mask is None else grad_mask.to(a.attn_mask.dtype),
        _of_sinks(a.sinks, incoming) if of_sinks else None,
    )


def _of_sinks(sinks: Tensor, incoming: _Incoming) -> Tensor:
    """A sink has a weight like a key's, and the value 0."""
    grad = torch.zeros_like(incoming.lse) if incoming.grad_lse is None else incoming.grad_lse
    if incoming.grad_output is not None:
        grad = grad - (incoming.whole_output() * incoming.grad_output).sum(-1)
    weight = _share(sinks.view(-1, 1).expand_as(grad), incoming.lse)
    return (weight * grad).sum((0, 2))


def _gradients(options: Options, schedule: Schedule, *tensors: Any) -> tuple[Tensor | None, ...]:
    return _backward(options, schedule, _Forward(*tensors[:7]), _Incoming(*tensors[7:]))


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, schedule: Schedule, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        results = _forward(options, schedule, True, *tensors)
        ctx.save_for_backward(*tensors, *results)
        ctx.options, ctx.schedule = options, schedule
        ctx.set_materialize_grads(False)
        return results[:2]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # asked for once, as checkpoints want it
        # With create_graph=True a second derivative is an error, not silently zero.
        run = _SplitAttentionBackward.apply if torch.is_grad_enabled() else _gradients
        grads = run(ctx.options, ctx.schedule, *saved[:7], grad_output, grad_lse, *saved[7:])
        of_query, of_key, of_value, of_mask, of_sinks = grads
        return None, None, of_query, of_key, of_value, of_mask, None, of_sinks, None


class _SplitAttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            problem(
                "a second derivative through attention that is split between processes",
                "first derivatives",
                "create_graph=False",
            )
        )
