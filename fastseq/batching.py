"""Batching rules of the operators: what they do with the dimension that torch.func.vmap maps over.

That dimension becomes a part of the batch wherever the operator has one, so that one call computes all
entries, with the bits and at the cost of one larger batch:

    B rows in each of N entries      ->      B * N or N * B rows

Recurrent layers have the entries behind the batch, because the rows of a sequence in `saved`, T * B, can then
be looked at as (T * B, N) without a copy; attention has them before it, where vmap usually finds them. What
all entries share is repeated.

What has no batch cannot be folded into one: weights of each entry, packed sequences of other lengths,
gradients of shared weights for each entry. Then the operator is called for each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention_dual_ops, attention_ops, dual_ops, ops, windows  # noqa: F401  they define operators
from .dispatch import library

Named = Mapping[str, Any]  # an operator's arguments, or where vmap's dimension is in each, by name
Result = tuple[Sequence[Tensor], Sequence[int | None]]  # results, and where vmap's dimension is in each
Rule = Callable[[Callable[..., Any], int, Named, Named], Result]  # of operator, N, dimensions, arguments


class Layout(NamedTuple):
    """Which dimension is the batch."""

    arguments: Mapping[str, int]
    results: Sequence[int]
    entries_first: bool = False

    def fold(self, tensor: Tensor, mapped: int | None, size: int, batch: int) -> Tensor:
        """With the entries, that are in dimension `mapped` or share the tensor, in its batch."""
        if tensor.dim() - (mapped is not None) <= batch:  # empty: of an RNN nothing is saved
            return tensor if mapped is None else tensor.select(mapped, 0)
        where = batch if self.entries_first else batch + 1
        if mapped is None:
            tensor = tensor.unsqueeze(where)
            tensor = tensor.expand(*tensor.shape[:where], size, *tensor.shape[where + 1 :])
        else:
            tensor = tensor.movedim(mapped, where)
        return tensor.flatten(batch, batch + 1)

    def unfold(self, tensor: Tensor, size: int, batch: int) -> tuple[Tensor, int | None]:
        """The opposite, and where the entries are then."""
        if tensor.dim() <= batch:
            return tensor, None
        rows = tensor.shape[batch] // size
        if self.entries_first:
            return tensor.unflatten(batch, (size, rows)), batch
        return tensor.unflatten(batch, (rows, size)), batch + 1

    def fold_all(self, size: int, dims: Named, given: Named) -> dict[str, Any]:
        folded = {
            name: self.fold(value, dims[name], size, self.arguments[name])
            if name in self.arguments and value is not None
            else value
            for name, value in given.items()
        }
        if folded.get("batch_sizes") is not None:
            folded["batch_sizes"] = folded["batch_sizes"] * size
        return folded

    def unfold_all(self, results: Sequence[Tensor], size: int) -> Result:
        pairs = [self.unfold(x, size, batch) for x, batch in zip(results, self.results, strict=False)]
        return type(results)(x for x, _ in pairs), type(results)(dim for _, dim in pairs)

    def folds(self, dims: Named) -> bool:
        """Whether vmap's dimension is only where there is a batch."""
        return not any(_is_mapped(dim) for name, dim in dims.items() if name not in self.arguments)


def _is_mapped(dim: Any) -> bool:
    return any(d is not None for d in dim) if isinstance(dim, (list, tuple)) else dim is not None


def at_once(op: Callable[..., Any], size: int, dims: Named, given: Named, layout: Layout) -> Result:
    """One call for all entries; a call for each where that cannot be."""
    if not layout.folds(dims):
        return each_entry(op, size, dims, given)
    return layout.unfold_all(op(*layout.fold_all(size, dims, given).values()), size)


def each_entry(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    def entry(value: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [entry(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    calls = [op(*(entry(value, dims[name], i) for name, value in given.items())) for i in range(size)]
    results = type(calls[0])(torch.stack(column) for column in zip(*calls, strict=True))
    return results, type(results)(0 for _ in results)


# ------------------------------------------------------------------------------------------ recurrent layers


def _recurrent_layout(dims: Named, given: Named, results: str) -> Layout:
    """results: r for each that has the rows of the input, s for each with those of the states."""
    rank = given["input"].dim() - (dims["input"] is not None)
    one_step = rank == 2 and given.get("batch_sizes") is None
    rows, states = int(rank == 3), int(not one_step)  # (T, B, I), else (rows, I); (D, B, H), else (B, H)
    arguments = dict.fromkeys(("input", "output", "grad_output"), rows)
    arguments |= dict.fromkeys(("h0", "c0", "grad_h_n", "grad_c_n", "saved", "grad_hidden"), states)
    arguments |= {f"{name}_tangent": dim for name, dim in arguments.items()}
    if rank == 3:
        arguments["resets"] = 1
        if dims.get("lengths") is None:  # else the rows of `saved` would not lie as those of each entry
            arguments["lengths"] = 0
    return Layout(arguments, [rows if letter == "r" else states for letter in results])


def _recurrent(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    return at_once(op, size, dims, given, _recurrent_layout(dims, given, "rsss"))


def _recurrent_cell(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    return at_once(op, size, dims, given, _recurrent_layout(dims, given, "rss"))


def _recurrent_dual(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    return at_once(op, size, dims, given, _recurrent_layout(dims, given, "rsssrsss"))


def _recurrent_tangents(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    return at_once(op, size, dims, given, _recurrent_layout(dims, given, "rsss"))


def _recurrent_dual_backward(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    letters = ""
    for wanted in (given["wanted"], given["wanted_tangents"]):
        if any(wanted[3:]):  # weights have no batch
            return each_entry(op, size, dims, given)
        letters += "".join(letter for letter, want in zip("rss", wanted, strict=False) if want)
    return at_once(op, size, dims, given, _recurrent_layout(dims, given, letters))


def _recurrent_backward(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    of_states, of_weights = given["wanted"][:3], given["wanted"][3:]
    if any(of_weights):  # a larger batch would sum them up over the entries
        return each_entry(op, size, dims, given)
    letters = "".join(letter for letter, want in zip("rss", of_states, strict=True) if want)
    letters += "s" * bool(given.get("keep"))
    layout = _recurrent_layout(dims, given, letters)
    if "memory" in given:
        in_windows = windows.steps_of(given["memory"])  # (D, windows, B, size), else like output and saved
        of_h, of_c = (2, 2) if in_windows else (layout.arguments["input"], 1)
        layout = layout._replace(arguments={**layout.arguments, "kept_h": of_h, "kept_c": of_c})
    return at_once(op, size, dims, given, layout)


def _recurrent_checkpoints(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    layout = _recurrent_layout({**dims, "input": dims["output"]}, {**given, "input": given["output"]}, "")
    layout = Layout({**layout.arguments, "states": 1}, (2, 2))
    if layout.folds(dims):
        given = {**given, "batch": given["batch"] * size}
    return at_once(op, size, dims, given, layout)


# ------------------------------------------------------------------------------------------------- attention

_TENSORS = ("query", "key", "value", "attn_mask", "key_lengths", "alibi_slopes")
_INCOMING = ("grad_output", "grad_lse", "grad_weights", "output", "weights", "remainder")
_DUAL = ("query", "key", "value", "attn_mask", "grad_output", "grad_lse", "grad_weights")
_DUAL_RESULTS = ("output", "lse", "weights", "remainder")
_ATTENTION = dict.fromkeys(_TENSORS + _INCOMING, 0) | {"normalizer": 1}
_ATTENTION |= {f"{name}_tangent": 0 for name in _DUAL + _DUAL_RESULTS}


def _attention(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    return _attend(op, size, dims, given, (0, 0, 0, 0, 1), False)


def _attention_backward(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    wanted = given["wanted"]
    of_mask, of_sinks = wanted[3:]
    if of_sinks:  # they have no batch
        return each_entry(op, size, dims, given)
    grads, where = _attend(op, size, dims, given, (0, 0, 0, 0), of_mask)
    if of_mask:
        rows = _rows(given["attn_mask"], dims["attn_mask"])
        if grads[-1].shape[1] != rows:  # of a mask that is broadcast over the batch
            grads = [*grads[:-1], grads[-1].sum(1, keepdim=True)]
    return grads, where


def _attention_dual(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    given, dims = _mask_and_tangent(size, dims, given)
    return _attend(op, size, dims, given, (0, 0, 0, 0, 1, 0, 0, 0, 0), False)


def _attention_dual_backward(op: Callable[..., Any], size: int, dims: Named, given: Named) -> Result:
    wanted = (*given["wanted"], *given["wanted_tangents"])
    if any(wanted[3:5]) or any(wanted[8:]):  # of masks and sinks
        return each_entry(op, size, dims, given)
    given, dims = _mask_and_tangent(size, dims, given)
    return _attend(op, size, dims, given, (0,) * sum(wanted), False)


def _mask_and_tangent(size: int, dims: Named, given: Named) -> tuple[Named, Named]:
    """If either of both differs between entries, each entry and row has its own."""
    names, batch = ("attn_mask", "attn_mask_tangent"), _rows(given["query"], dims["query"])
    if given[names[1]] is None or all(dims[name] is None for name in names):
        return given, dims
    for name in names:
        x = given[name]
        x = x.unsqueeze(0) if dims[name] is None else x.movedim(dims[name], 0)
        given = {**given, name: x.expand(size, batch, *x.shape[2:])}
    return given, {**dims, **dict.fromkeys(names, 0)}


def _attend(
    op: Callable[..., Any], size: int, dims: Named, given: Named, results: Sequence[int], of_mask: bool
) -> Result:
    """of_mask: whether the mask gets a gradient, for each entry another one."""
    if given["cu_seqlens_q"] is not None:
        return each_entry(op, size, dims, given)
    if given["dropout_p"] != 0:
        if dims["seed"] is None or given["sinks"] is not None:
            # The same weights are dropped in all entries; or in each its own, which gradients of sinks,
            # made for each entry, have to find again.
            return each_entry(op, size, dims, given)
        # One seed drops other weights in each row of a batch.
        given, dims = {**given, "seed": given["seed"].select(dims["seed"], 0)}, {**dims, "seed": None}
    batch, arguments = _rows(given["query"], dims["query"]), dict(_ATTENTION)
    for name in ("attn_mask", "alibi_slopes"):
        x, mapped = given[name], dims[name]
        if x is None:
            continue
        rows = _rows(x, mapped)
        if rows == 1 and mapped is None and not (of_mask and name == "attn_mask"):
            arguments.pop(name)  # broadcast over all entries as well
            arguments.pop(f"{name}_tangent", None)
        elif rows != batch:
            x = x.unsqueeze(0) if mapped is None else x.movedim(mapped, 0)
            given = {**given, name: x.expand(size, batch, *x.shape[2:])}
            dims = {**dims, name: 0}
    return at_once(op, size, dims, given, Layout(arguments, results, entries_first=True))


def _rows(tensor: Tensor, mapped: int | None) -> int:
    """The size of the first dimension, as one entry sees it."""
    return tensor.shape[1 if mapped == 0 else 0]


# ---------------------------------------------------------------------------------------------- registration


def _register(name: str, rule: Rule) -> None:
    op = getattr(torch.ops.fastseq, name).default
    schema = op._schema.arguments

    def batched(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Result:
        # torch leaves out what is the default
        given = {a.name: a.default_value for a in schema} | dict(
            zip((a.name for a in schema), arguments, strict=False)
        )
        dims = dict.fromkeys(given) | dict(zip(given, in_dims, strict=False))
        return rule(op, info.batch_size, dims, given)

    torch.library.register_vmap(f"fastseq::{name}", batched, lib=library)


for _name, _rule in {
    "recurrent": _recurrent,
    "recurrent_cell": _recurrent_cell,
    "recurrent_backward": _recurrent_backward,
    "recurrent_checkpoints": _recurrent_checkpoints,
    "recurrent_windows_backward": _recurrent_backward,
    "recurrent_dual": _recurrent_dual,
    "recurrent_tangents": _recurrent_tangents,
    "recurrent_dual_backward": _recurrent_dual_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_dual": _attention_dual,
    "attention_dual_backward": _attention_dual_backward,
}.items():
    _register(_name, _rule)
