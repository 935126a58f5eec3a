"""Keys and values on their way between the processes that share a sequence, and their gradients back again.

Every process sends its own parts directly to each process that sees something of them, at step t to the t-th
after it, while the one before computes: nothing is forwarded, what nobody sees is not sent, and a process
holds its own keys, those that it works on, and those that arrive, never all. All processes go through the
same steps in the same order, so that the messages between any two of them keep their order too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .sequence_parts import Block


class Task(NamedTuple):
    """What a process computes with one part of the keys: blocks that cover nothing twice."""

    source: int  # the process whose part it is
    part: int  # which of its parts
    blocks: Sequence[Block]


class Schedule(NamedTuple):
    """Who needs which parts of whom; the same in every process."""

    group: dist.ProcessGroup
    rank: int
    size: int
    lengths: Sequence[Sequence[int]]  # of the parts of the keys, of every process
    tasks: Sequence[Sequence[Task]]  # of every process; only what has blocks
    wants_grad: Sequence[tuple[bool, bool]]  # of every process: whether of its keys, and of its values

    @property
    def keys(self) -> int:
        """Of all processes."""
        return sum(map(sum, self.lengths))

    def parts(self, of: int, source: int) -> list[int]:
        """Which parts of `source` process `of` works on."""
        return [task.part for task in self.tasks[of] if task.source == source]

    def after(self, steps: int) -> int:
        return (self.rank + steps) % self.size


class Transfer:
    """Messages on their way; wait() returns what arrived."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.operations: list[dist.P2POp] = []
        self.arriving: list[tuple[Tensor, ...]] = []
        self.works: Sequence[dist.Work] = ()

    def send(self, to: int, *tensors: Tensor) -> None:
        self._add(dist.isend, to, tensors)

    def receive(self, source: int, *buffers: Tensor) -> None:
        self._add(dist.irecv, source, buffers)
        self.arriving.append(buffers)

    def _add(self, operation: object, peer: int, tensors: Sequence[Tensor]) -> None:
        peer = dist.get_global_rank(self.group, peer)
        self.operations += [dist.P2POp(operation, x, peer, self.group) for x in tensors if x.numel()]

    def start(self) -> Transfer:
        if self.operations:
            self.works = dist.batch_isend_irecv(self.operations)
        return self

    def wait(self) -> list[tuple[Tensor, ...]]:
        for work in self.works:
            work.wait()
        self.operations.clear()  # which keep what was sent
        return self.arriving


def visiting(
    schedule: Schedule, key: Sequence[Tensor], value: Sequence[Tensor]
) -> Iterator[tuple[int, list[tuple[Task, Tensor, Tensor]]]]:
    """For every step, the tasks of this process with the keys and values that they need, its own first.

    key, value: the parts of this process, (B, heads, rows, features), dense.
    """
    rank, size = schedule.rank, schedule.size

    def start(step: int) -> Transfer:
        transfer, source, target = Transfer(schedule.group), schedule.after(-step), schedule.after(step)
        for part in schedule.parts(rank, source):
            rows = schedule.lengths[source][part]
            transfer.receive(
                source, *(x[0].new_empty((*x[0].shape[:2], rows, x[0].shape[3])) for x in (key, value))
            )
        for part in schedule.parts(target, rank):
            transfer.send(target, key[part], value[part])
        return transfer.start()

    transfer = start(1) if size > 1 else None
    arrived = [(key[part], value[part]) for part in schedule.parts(rank, rank)]
    for step in range(size):
        if step:
            assert transfer is not None
            arrived = transfer.wait()  # type: ignore[assignment]
            transfer = start(step + 1) if step + 1 < size else None
        source = schedule.after(-step)
        tasks = [task for task in schedule.tasks[rank] if task.source == source]
        yield step, [(task, *pair) for task, pair in zip(tasks, arrived, strict=True)]


class Returns:
    """Gradients of keys and values, each sent to the process that holds these, which adds them up."""

    def __init__(
        self, schedule: Schedule, key: Sequence[Tensor], value: Sequence[Tensor], sums: torch.dtype
    ) -> None:
        of_key, of_value = schedule.wants_grad[schedule.rank]
        self.schedule, self.dtype = schedule, key[0].dtype
        self.sums = [
            tuple(
                torch.zeros_like(x, dtype=sums) if want else None for x, want in ((k, of_key), (v, of_value))
            )
            for k, v in zip(key, value, strict=True)
        ]
        self.pending: Transfer | None = None
        self.expected: list[int] = []  # the parts of which it brings gradients

    def give(self, step: int, grads: Sequence[tuple[Task, Tensor | None, Tensor | None]]) -> None:
        """At every step, what this process has computed with the parts that visited it then."""
        schedule = self.schedule
        if step == 0:
            for task, *own in grads:
                self._add(task.part, own)
            return
        self.finish()
        source, target = schedule.after(-step), schedule.after(step)
        transfer = Transfer(schedule.group)
        for part in schedule.parts(target, schedule.rank):
            sums = [x for x in self.sums[part] if x is not None]
            transfer.receive(target, *(torch.empty_like(x, dtype=self.dtype) for x in sums))
        for _, *sent in grads:
            transfer.send(source, *(x.to(self.dtype) for x in sent if x is not None))
        self.pending, self.expected = transfer.start(), schedule.parts(target, schedule.rank)

    def finish(self) -> None:
        if self.pending is not None:
            for part, arrived in zip(self.expected, self.pending.wait(), strict=True):
                remaining = iter(arrived)
                self._add(part, [None if x is None else next(remaining) for x in self.sums[part]])
            self.pending = None

    def _add(self, part: int, grads: Sequence[Tensor | None]) -> None:
        for total, grad in zip(self.sums[part], grads, strict=True):
            if total is not None:
                total += grad
