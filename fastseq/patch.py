"""patched() routes torch's own attention, and torch.nn modules that are constructed, here for a while.

Two things of torch are replaced while anybody is inside, and put back by whoever leaves last:

    torch.nn.functional.scaled_dot_product_attention    by _attention
    __init__ of torch.nn.LSTM and its kin               by one that converts the module it has made

Whoever is inside counts what was routed, in a Routed of its own. All threads of the process are routed, not
only the one that entered: a backward pass that computes a forward pass again (checkpointing) runs in threads
of its own on a GPU, and has to find there what the forward pass found.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from . import attention_ops
from .attention import scaled_dot_product_attention
from .attention_checks import is_causal_bias
from .checks import DTYPES, problem, tensors_with_kernels
from .convert import OURS, to_ours, why_not

_lock = threading.RLock()
_inside: tuple[Routed, ...] = ()  # a new tuple at every change, so that others can read it without the lock
_replaced: list[tuple[Any, str, Any, Any]] = []  # owner, name, torch's, ours
_torchs_attention = F.scaled_dot_product_attention
_PLAIN = {Tensor, nn.Parameter}
_LATE = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


class Routed:
    """What was routed while inside of patched(); str() is made for people.

    here: how many calls of each function, and modules of each class, came to fastseq.
    left: how many went to torch's own, by (name, reason).
    """

    def __init__(self) -> None:
        self.here: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def __str__(self) -> str:
        lines = [f"{name}: {count} to fastseq" for name, count in self.here.items()]
        lines += [f"{name}: {count} to torch, {reason}" for (name, reason), count in self.left.items()]
        return "\n".join(lines) or "nothing was routed"

    __repr__ = __str__


class patched(ContextDecorator):
    """Inside of `with fastseq.patched():`, torch's attention and new torch.nn modules are fastseq's.

    Routed are calls of torch.nn.functional.scaled_dot_product_attention, also those that libraries make by
    this name, and torch.nn.RNN, LSTM, GRU, their cells and MultiheadAttention that are constructed inside:
    they are what `fastseq.convert` would make of them. Modules that exist already stay as they are.
    What fastseq cannot do goes to torch's own, and the reason is noted.

    It is for all threads of the process while anybody is inside, may be nested, entered by several threads
    at once and left by an exception; who leaves last puts back what was there. It may decorate a function,
    but no generator or coroutine, whose body runs when the call is over.

    Not reached are names bound before: after `from torch.nn.functional import scaled_dot_product_attention`
    that name stays torch's. (`from torch.nn import LSTM` is reached.) torch.compile compiles a function that
    is called inside with fastseq's operators, and once more for calls outside; what is compiled is not
    counted in the report.

    Returns:
        A report of what was routed inside, as the target of `with`: its `here` counts what came to fastseq by
        name, `left` what went to torch by (name, reason). Print it.

    Raises:
        TypeError: where it decorates a generator or coroutine function. RuntimeError: left, but not entered.

    Example:
        >>> query = torch.randn(1, 2, 5, 8)
        >>> with fastseq.patched() as routed:
        ...     output = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        ...     lstm = torch.nn.LSTM(8, 16)
        >>> type(lstm)
        <class 'fastseq.modules.lstm.LSTM'>
        >>> print(routed)
        scaled_dot_product_attention: 1 to fastseq
        torch.nn.LSTM: 1 to fastseq
        >>> @fastseq.patched()
        ... def attend(x):
        ...     return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> attend(query).shape
        torch.Size([1, 2, 5, 8])
    """

    def __init__(self) -> None:
        self._entered: list[Routed] = []

    def __enter__(self) -> Routed:
        routed = Routed()
        with _lock:
            if not _inside:
                _install()
            _set_inside((*_inside, routed))
            self._entered.append(routed)
        return routed

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _lock:
            if not self._entered:
                raise RuntimeError(
                    problem(
                        "patched() left that was not entered", "__enter__ first", "with fastseq.patched():"
                    )
                )
            routed = self._entered.pop()
            _set_inside(tuple(other for other in _inside if other is not routed))
            if not _inside:
                _restore()

    def __call__(self, function: Any) -> Any:
        if any(kind(function) for kind in _LATE):
            raise TypeError(
                problem(
                    "@patched() of a generator or coroutine function",
                    "a function whose body runs in the call",
                    "with fastseq.patched(): inside of it, around what is to be routed",
                )
            )
        return super().__call__(function)

    def _recreate_cm(self) -> patched:
        return patched()  # each call of a decorated function has its own


# ----------------------------------------------------------------------------------- what is replaced by what


def _set_inside(inside: tuple[Routed, ...]) -> None:
    global _inside
    _inside = inside


def _install() -> None:
    global _torchs_attention
    _torchs_attention = F.scaled_dot_product_attention
    _replace(F, "scaled_dot_product_attention", _attention)
    for cls in OURS:
        _replace(cls, "__init__", _converting(cls))


def _replace(owner: Any, name: str, by: Any) -> None:
    _replaced.append((owner, name, getattr(owner, name), by))
    setattr(owner, name, by)


def _restore() -> None:
    while _replaced:
        owner, name, original, ours = _replaced.pop()
        if getattr(owner, name) is ours:  # somebody else's goes on calling ours, which goes on to torch's
            setattr(owner, name, original)


def _note(name: str, reason: str) -> None:
    with _lock:
        for routed in _inside:
            if reason:
                routed.left[name, reason] += 1
            else:
                routed.here[name] += 1


# -------------------------------------------------------------------------------------------------- attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of torch.nn.functional.scaled_dot_product_attention, inside of fastseq.patched()."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    reason = _obstacle(query, key, value, attn_mask)
    if is_compiling():  # compiled inside, and guarded by what the name stands for
        function = _torchs_attention if reason else scaled_dot_product_attention
        return function(*arguments, **options)
    if not _inside:
        return _torchs_attention(*arguments, **options)
    if not reason:
        try:
            output = scaled_dot_product_attention(*arguments, **options)
        except (RuntimeError, TypeError, ValueError) as error:
            reason, *more = str(error).splitlines()
            if not (reason.startswith("given: ") and len(more) == 2):
                raise  # not what fastseq refuses, but what happened to it
        else:
            _note("scaled_dot_product_attention", "")
            return output
    _note("scaled_dot_product_attention", reason)
    return _torchs_attention(*arguments, **options)


def _obstacle(*tensors: Tensor | None) -> str:
    """What fastseq is not even asked to do; "" if nothing."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or is_causal_bias(tensor):
            continue  # what is no tensor is refused in due course
        if tensor.is_nested:
            return "given: nested tensors"
        kind = type(tensor)
        if kind not in _PLAIN and kind.__name__ != "FakeTensor":
            return f"given: a {kind.__name__}, which sees to torch's functions itself"
        if tensor.layout is not torch.strided or tensor.device.type not in (*attention_ops.KERNELS, "meta"):
            return f"given: {tensor.device.type} ({tensor.layout}), not {tensors_with_kernels()}"
    query = tensors[0]
    if isinstance(query, Tensor) and query.dtype not in DTYPES and not torch._C._is_any_autocast_enabled():
        return f"given: query of dtype {query.dtype}"
    return ""


# ---------------------------------------------------------------------------------------------------- modules


def _converting(cls: type[nn.Module]) -> Any:
    """cls.__init__, after which the module is fastseq's."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not _inside or isinstance(self, tuple(OURS.values())):
            return
        reason = why_not(self)
        if not reason:
            to_ours(self)
        _note(f"torch.nn.{cls.__name__}", reason)

    return __init__
