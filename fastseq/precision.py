"""tf32 or not: recurrent networks have a setting of their own in torch, and matrix products another.

Within cuDNN both sides of a layer follow the first one. Here torch makes the products around the loop, so
they are made to follow it for the time of a call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_get = getattr(torch._C, "_get_fp32_precision_getter", None)  # from torch 2.9 on
_set = getattr(torch._C, "_set_fp32_precision_setter", None)

# What a user writes to allow tf32 in recurrent networks.
SETTING = "torch.backends.cudnn." + ("allow_tf32 = True" if _get is None else "rnn.fp32_precision = 'tf32'")
# And in matrix products, which attention is.
SETTING_OF_PRODUCTS = "torch.backends.cuda.matmul." + (
    "allow_tf32 = True" if _get is None else "fp32_precision = 'tf32'"
)


def of_recurrent_networks(dtype: torch.dtype) -> str | None:
    """ "tf32" or "ieee", by torch.backends.cudnn's fp32_precision or allow_tf32; None for another dtype."""
    if dtype is not torch.float32:
        return None
    allowed = torch.backends.cudnn.allow_tf32 if _get is None else _get("cuda", "rnn") == "tf32"
    return "tf32" if allowed else "ieee"


def of_products(dtype: torch.dtype) -> str | None:
    """ "tf32" or "ieee", as torch multiplies matrices, which attention follows; None for another dtype."""
    return _of_products() if dtype is torch.float32 else None


def _of_products() -> str:
    allowed = torch.backends.cuda.matmul.allow_tf32 if _get is None else _get("cuda", "matmul") == "tf32"
    return "tf32" if allowed else "ieee"


def _set_products(precision: str) -> str:
    """Sets it and returns what to set afterwards."""
    if _get is None or _set is None:
        before = _of_products()
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        return before
    before = _get("cuda", "matmul")
    if before in (_get("cuda", "all"), _get("generic", "all")):
        before = "none"  # inherited, and to be inherited again
    _set("cuda", "matmul", precision)
    return before


class _Change:
    """One change of the process's setting, shared by the calls that overlap: the first one makes it, the last
    one takes it back. Another thread's products may see it meanwhile."""

    def __init__(self) -> None:
        self.lock, self.calls, self.before = threading.Lock(), 0, ""

    @contextmanager
    def to(self, precision: str) -> Iterator[None]:
        with self.lock:
            if self.calls == 0:
                self.before = _set_products(precision)
            self.calls += 1
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1
                if self.calls == 0:
                    _set_products(self.before)


_change = _Change()


def products(precision: str | None) -> AbstractContextManager[None]:
    """Torch's products have this precision meanwhile; None leaves them alone."""
    if precision is None or (_change.calls == 0 and precision == _of_products()):
        return nullcontext()
    return _change.to(precision)
