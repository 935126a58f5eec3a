"""Masks for transformers that say what they hide, and are made in full only if somebody looks at them.

A model of transformers makes its mask once and hands it to all layers. What it hands is a tensor, which the
model may cut or change on the way. So mask() returns a Mask: to everybody else a tensor (B, 1, Sq, Sk) of
bool, made at the first operation on it; to attention() in transformers.py a Structure, in the terms of
fastseq.scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map_only


class Structure(NamedTuple):
    """What is visible, as arguments of fastseq.scaled_dot_product_attention."""

    keys: int  # of the first so many keys
    causal: str | None
    window: tuple[int | None, int | None] | None
    lengths: Tensor | None = None  # (B,), of padding on the right
    padding: Tensor | None = None  # (B, 1, 1, keys) of bool, of any other
    starts: Tensor | None = None  # (sequences + 1,), of packed sequences, in the rows of all batch entries

    @property
    def trivial(self) -> bool:
        return self[1:] == (None,) * 5


class Mask(Tensor):
    """(B, 1, Sq, Sk) of bool, True where visible."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: torch.device, *_: Any) -> Mask:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(
        self, shape: tuple[int, ...], device: torch.device, structure: Structure, make: Callable[[], Tensor]
    ) -> None:
        self._structure: Structure | None = structure
        self._make = make
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    def structure(self, query: Tensor, key: Tensor) -> Structure | None:
        """None if it is that of other queries and keys, or was changed in place."""
        batch, _, queries, keys = self.shape
        fits = query.shape[0] == batch and (query.shape[2], key.shape[2]) == (queries, keys)
        return self._structure if fits else None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def dense(mask: Mask) -> Tensor:
            if func._schema.is_mutable:
                mask._structure = None
            return mask.dense()

        if func is torch.ops.aten.detach.default:  # as checkpointing does
            return args[0]
        args, kwargs = tree_map_only(Mask, dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What a model of transformers calls to have a mask, in the terms of its "sdpa".

    Query i is at the position q_offset + i, key j at kv_offset + j; mask_function says of two positions
    whether the key is visible, attention_mask, (B, positions), which keys are no padding. None is a mask
    that follows from the layer's is_causal.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    make = partial(sdpa_mask, *sizes, device=device, **kwargs)
    structure = None
    if not (is_compiling() or torch.jit.is_tracing()):
        structure = _structure(*sizes[1:])
    if structure is None:
        return make(
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip
        )
    if allow_is_bidirectional_skip and structure.trivial:
        return None
    plain = structure.window is structure.lengths is structure.padding is structure.starts is None
    square = structure.keys == q_length == kv_length and structure.causal is not None
    if allow_is_causal_skip and plain and (square or (q_length == 1 and structure.causal is None)):
        return None
    make = partial(make, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return Mask((batch_size, 1, q_length, kv_length), torch.device(device), structure, make)


def _structure(
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
) -> Structure | None:
    """None if fastseq's attention has no words for it."""
    terms = _terms(mask_function)
    starts = None
    if packed := _packed(terms):
        ids, terms = packed
        if attention_mask is not None or not (queries == keys == ids.shape[1]) or q_offset or kv_offset:
            return None
        starts = _starts(ids)
    limits = _limits(terms)
    if limits is None or (isinstance(q_offset, Tensor) and not q_offset.is_cpu):  # which would be waited for
        return None
    if attention_mask is not None and (attention_mask.dim() != 2 or type(attention_mask) is not Tensor):
        return None
    left, right = limits
    offset = int(q_offset) - kv_offset  # query i is where key i + offset is
    if left is not None and left >= queries - 1 + offset:
        left = None  # farther than the first key
    if right is not None and right >= keys - 1 - offset:
        right = None  # the last key, of the first query
    causal = None
    if right == 0:
        # The kernels know the first query beside the first key, or the last beside the last.
        if offset == 0:
            causal, keys = "top_left", min(keys, queries)
        elif 0 < offset <= keys - queries:
            causal, keys = "bottom_right", offset + queries
        else:
            return None
        right = None
    elif offset != 0 and not left is right is None:
        return None
    window = None if left is right is None else (left, right)
    structure = Structure(keys, causal, window, starts=starts)
    return structure if attention_mask is None else _with_padding(structure, attention_mask, kv_offset)


def _limits(functions: list[Callable[..., Any]]) -> tuple[int | None, int | None] | None:
    """How many keys to the left and to the right of its position a query sees; None if it is not that."""
    from transformers import masking_utils

    left: list[int] = []
    right: list[int] = []
    for function in functions:
        if function is masking_utils.causal_mask_function:
            right.append(0)
        elif function is masking_utils.bidirectional_mask_function:
            pass
        elif _is_made_by(function, "sliding_window_overlay.<locals>.inner_mask"):
            left.append(_captured(function)["sliding_window"] - 1)
        elif _is_made_by(function, "sliding_window_bidirectional_overlay.<locals>.inner_mask"):
            left.append(_captured(function)["sliding_window"])
            right.append(left[-1])
        else:
            return None
    if min(left + right, default=0) < 0:  # a window of nothing
        return None
    return min(left, default=None), min(right, default=None)


def _terms(mask_function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions of which masking_utils.and_masks made one."""
    if not _is_made_by(mask_function, "and_masks.<locals>.and_mask"):
        return [mask_function]
    return [term for function in _captured(mask_function)["mask_functions"] for term in _terms(function)]


def _packed(functions: list[Callable[..., Any]]) -> tuple[Tensor, list[Callable[..., Any]]] | None:
    """Of packed sequences, (B, S), in which of them a token is, and the terms of each sequence's own mask.

    The positions that transformers puts in their place go up by one within a sequence, so that what a query
    sees to its left and right is the same in both.
    """
    names = [f"{name}.<locals>.inner_mask" for name in ("packed_sequence_mask_function", _REMAP)]
    if len(functions) != 2 or not all(map(_is_made_by, functions, names)):
        return None
    which, own = map(_captured, functions)
    ids = which["packed_sequence_mask"]
    return (ids, _terms(own["mask_function"])) if type(ids) is Tensor and not ids.is_meta else None


_REMAP = "remap_positions_for_packed_sequence"


def _starts(ids: Tensor) -> Tensor:
    is_first = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    return torch.nn.functional.pad(is_first.flatten().nonzero().flatten(), (0, 1), value=ids.numel())


def _is_made_by(function: Any, name: str) -> bool:
    from transformers import masking_utils

    where = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return where == (masking_utils.__name__, name)


def _captured(function: Any) -> dict[str, Any]:
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _with_padding(structure: Structure, attention_mask: Tensor, kv_offset: int) -> Structure | None:
    if attention_mask.is_meta:
        return None
    seen = attention_mask.bool()[:, kv_offset : kv_offset + structure.keys]
    seen = torch.nn.functional.pad(seen, (0, structure.keys - seen.shape[1]))
    lengths = seen.sum(-1)
    of_lengths = torch.arange(structure.keys, device=seen.device) < lengths[:, None]
    # Once for all layers, so that on a GPU one wait for it is worth a kernel that skips what is hidden.
    all_seen, on_the_right = torch.stack([seen.all(), (seen == of_lengths).all()]).tolist()
    if all_seen:
        return structure
    if on_the_right and structure.causal != "bottom_right":  # whose last key would be each sequence's own
        return structure._replace(lengths=lengths)
    return structure._replace(padding=seen[:, None, None, :])
