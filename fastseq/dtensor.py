"""Attention of DTensors: each process computes what its mesh gives it, of whole sequences.

Entries of the batch and heads do not know of each other, so a mesh may split both. What is split otherwise is
gathered first, as for every operator of DTensors that needs it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .checks import problem

_BATCH, _HEADS = 0, 1
# Of the first Arguments: the dimensions of the batch and the heads.
_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    "query": (0, 1),
    "key": (0, 1),
    "value": (0, 1),
    "attn_mask": (0, 1),
    "key_lengths": (0, None),
    "cu_seqlens_q": (None, None),
    "cu_seqlens_k": (None, None),
    "alibi_slopes": (0, 1),
    "sinks": (None, 0),
}
_OF_RESULTS = {"output": (0, 1), "lse": (0, 1), "weights": (0, 1), "remainder": (0, 1), "normalizer": (1, 2)}


def attention(local: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """local(*arguments), those of autograd.attention, among them DTensors; the results are DTensors."""
    tensors = dict(zip(_DIMENSIONS, arguments, strict=False))
    seed, average_weights, rest = arguments[9], arguments[17], arguments[9:]
    for name in ("query", "key", "value"):
        if not isinstance(tensors[name], DTensor):
            raise RuntimeError(
                problem(
                    f"{name} of type {type(tensors[name]).__name__} beside a DTensor",
                    "DTensors for query, key and value, or for none of them",
                    "torch.distributed.tensor.distribute_tensor",
                )
            )
    if seed is not None:  # every process has drawn its own
        raise NotImplementedError(
            problem(
                "dropout_p with DTensors", "dropout_p=0.0", "query.to_local(), and key and value likewise"
            )
        )
    query: DTensor = tensors["query"]
    mesh, split = query.device_mesh, _split(query, tensors, average_weights)
    given = []
    for name, x in tensors.items():
        if x is not None:
            if not isinstance(x, DTensor):
                whole = [Replicate()] * mesh.ndim
                x = DTensor.from_local(x, mesh, whole, run_check=False)
            dims = _broadcast(_DIMENSIONS[name], x)
            x = x.redistribute(mesh, _placements(split, dims, Replicate()))
            # Of what is the same for all entries or heads, each process has a part of the gradient.
            x = x.to_local(grad_placements=_placements(split, dims, Partial()))
        given.append(x)
    results = local(*given, *rest)
    return tuple(
        DTensor.from_local(
            x, mesh, _placements(split, dims if x.dim() > 1 else (None, None), Replicate()), run_check=False
        )  # those of one dimension are empty
        for x, dims in zip(results, _OF_RESULTS.values(), strict=True)
    )


def _split(query: DTensor, tensors: dict[str, Any], average_weights: bool) -> Sequence[int | None]:
    """What each dimension of the mesh splits; None: nothing, there every process computes the same."""
    packed = tensors["cu_seqlens_q"] is not None or tensors["cu_seqlens_k"] is not None
    sizes = (0 if packed else query.shape[0], 0 if packed or average_weights else tensors["key"].shape[1])
    split: list[int | None] = [
        p.dim if type(p) is Shard and p.dim in (_BATCH, _HEADS) else None for p in query.placements
    ]
    for what, size in enumerate(sizes):  # evenly, or not at all
        parts = prod(query.device_mesh.size(i) for i, x in enumerate(split) if x == what)
        if size == 0 or size % parts:
            split = [None if x == what else x for x in split]
    return split


def _broadcast(dims: Sequence[int | None], x: Tensor) -> Sequence[int | None]:
    """The dimensions without those of size 1."""
    return [None if dim is None or x.shape[dim] == 1 else dim for dim in dims]


def _placements(
    split: Sequence[int | None], dims: Sequence[int | None], without: Placement
) -> list[Placement]:
    """Of a tensor with the batch and heads in these dimensions; `without`, where it lacks what is split."""

    def place(what: int | None) -> Placement:
        if what is None:
            return Replicate()
        dim = dims[what]
        return without if dim is None else Shard(dim)

    return [place(what) for what in split]
