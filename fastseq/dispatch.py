"""What the operators torch.ops.fastseq.* share: how they are registered, and when their kernels are called
without asking torch's dispatcher, which takes longer than small work does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _C

library = torch.library.Library("fastseq", "DEF")


def register(
    name: str,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    unsupported: Callable[[str, Sequence[Any]], Any],
) -> Any:
    """Registers an operator that `library` has defined, by device type, and returns what calls it.

    On every other device and layout it calls unsupported(name, arguments), which raises.
    """
    for device, implementation in implementations.items():
        library.impl(name, implementation, device.upper())
    # Every other device and layout ends here, unless an engine registers for it.
    library.impl(
        name,
        lambda *arguments: unsupported(f"fastseq.{name}", arguments),
        "CompositeExplicitAutograd",
    )
    torch.library.register_fake(f"fastseq::{name}", fake, lib=library)
    return getattr(torch.ops.fastseq, name).default


def implementations(kernels: Mapping[str, Any], name: str) -> dict[str, Callable[..., Any]]:
    """By device type, for register(): those that `kernels` has when they are called, so that tests can run
    another device's in a device's place."""

    def call(device: str, *arguments: Any) -> Any:
        return getattr(kernels[device], name)(*arguments)

    return {device: partial(call, device) for device in kernels}


_PLAIN = {Tensor, torch.nn.Parameter}
# Whether the compiled module reads this torch's tensors itself.
READS_TENSORS = _C.use_tensors(Tensor, torch.nn.Parameter)


def nobody_listens() -> bool:
    """Whether the dispatcher could only find a kernel: nothing compiles, traces, transforms or profiles."""
    return not (
        is_compiling()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.func see the calls. They know the operators' own gradients
    and batching rules, and a graph has one operator where a Function has two graphs."""
    return is_compiling() or torch._C._are_functorch_transforms_active()


_LEVEL = 0  # of forward mode: torch has one, or one within each level of torch.func


def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Number and tangent at the innermost level. forward_ad knows none where torch.compile's graph entered
    it."""
    return torch._VF._unpack_dual(x, level=_LEVEL)


def make_dual(x: Tensor, tangent: Tensor) -> Tensor:
    return torch._VF._make_dual(x, tangent, level=_LEVEL)


def has_tangent(tensors: Iterable[Any]) -> bool:
    """Whether any does, of lists of tensors too. Those of other layouts, which no kernel takes, cannot be
    asked."""
    for x in tensors:
        if isinstance(x, Tensor):
            if x.layout is torch.strided and unpack_dual(x)[1] is not None:
                return True
        elif isinstance(x, (list, tuple)) and has_tangent(x):
            return True
    return False


def plain_device(*tensors: Tensor | None) -> str:
    """Where all are dense tensors as they come, so that its kernel is the one to call: a device type."""
    plain, strided = _PLAIN, torch.strided
    device = ""
    for t in tensors:
        if t is None:
            continue
        if not (type(t) in plain and t.layout is strided and not t.is_neg()):
            return ""
        where = "cpu" if t.is_cpu else "cuda" if t.is_cuda else ""
        if not where or (device and where != device):
            return ""
        device = where
    return device
