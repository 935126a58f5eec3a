"""What the autograd Functions of the operators share.

The Functions stand outside of the operators, and are skipped when no gradient is needed. Each one's backward
pass is a Function too, which has second derivatives; a third is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.autograd_function import CtxWithSavedTensors, enable_single_level_autograd_function
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..checks import problem


def recording() -> bool:
    # In forward mode the Function says that it has no jvp, where the operator would drop the tangents.
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def needs_gradient(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    for tensor in tensors:  # noqa: SIM110  any() takes twice as long
        if tensor is not None and tensor.requires_grad:
            return True
    return False


class Function(torch.autograd.Function):
    """Function.apply binds its arguments by inspect.signature, 50 us a call, which only torch.func needs."""

    generate_vmap_rule = True  # by the rules of the operators, see batching.py

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)

    @classmethod
    def apply_here(cls, *args: Any) -> Any:
        """Where the dispatcher has come to autograd, within torch.func that of one of its levels."""
        if not torch._C._are_functorch_transforms_active():
            return super(torch.autograd.Function, cls).apply(*args)
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, _of_one_level(cls)).apply(*args)


@cache
def _of_one_level(function: type[Function]) -> type[Function]:
    """The Function for one level of torch.func: it does not hide what the levels outside of it differentiate,
    and its tensors outlive it where its backward pass is called later, as by torch.func.vjp."""

    def forward(*args: Any) -> Any:
        with (
            torch._C._AutoDispatchBelowAutograd(),
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
        ):
            return function.forward(*args)

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        saved = CtxWithSavedTensors(ctx, unwrap_dead_wrappers(ctx.saved_tensors))
        return function.backward(saved, *grad_outputs)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{function.__name__}OfOneLevel", (function,), methods)


def needed(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad, less what the call of autograd at hand has no use for: torch.autograd.grad(y, x)
    asks a layer for the gradient of x alone, whatever its parameters want at other times."""
    needs = ctx.needs_input_grad
    if is_compiling() or torch._C._are_functorch_transforms_active():
        return needs
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if len(nodes) != sum(needs):
        return needs
    remaining = iter(nodes)
    return tuple(need and _is_executed(next(remaining)) for need in needs)


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that the call asks for, or no call at all
        return True


def gradients(
    function: type[Function],
    grad_outputs: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    constants: tuple[Any, ...],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of all that `wanted` tells of, None where not wanted.

    And where no gradient comes in: as to a layer in the second derivative of its gradients, which go by its
    output.
    """
    if all(grad is None for grad in grad_outputs):
        return [None] * len(wanted)
    if not is_compiling() and any(map(is_batched, grad_outputs)):
        return each_entry(lambda entry: gradients(function, entry, tensors, constants, wanted), grad_outputs)
    if not is_compiling():  # what torch.func.vjp has saved outlives its transform
        tensors = unwrap_dead_wrappers(tuple(tensors))
    recording = torch.is_grad_enabled() or forward_ad._current_level >= 0  # create_graph=True, or a tangent
    if recording and not torch._C._are_functorch_transforms_active():
        grads = function.apply(*constants, wanted, *grad_outputs, *tensors)
    else:
        grads = function.forward(*constants, wanted, *grad_outputs, *tensors)
    remaining = iter(grads)
    return [next(remaining) if want else None for want in wanted]


def is_batched(tensor: Tensor | None) -> bool:
    return tensor is not None and is_legacy_batchedtensor(tensor)


def each_entry(
    call: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]], tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What call(tensors) returns for each entry of a batch of tensors, which
    torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional.jacobian(vectorize=True) hide in
    tensors without memory of their own."""
    level = torch._C._vmapmode_increment_nesting() - 1  # the only way to read it
    torch._C._vmapmode_decrement_nesting()
    batched = [tensor for tensor in tensors if is_batched(tensor)]
    size = 0
    while level > 0 and size == 0:  # removing a level that is not there gives a batch of the size asked for
        size = max(torch._remove_batch_dim(tensor, level, 0, 0).shape[0] for tensor in batched)
        level -= size == 0
    if size == 0:
        raise RuntimeError(problem("a batch of no gradients", "at least one", "torch.zeros_like(tensor)"))
    entries = [
        [None] * size if tensor is None else torch._remove_batch_dim(tensor, level, size, 0).unbind(0)
        for tensor in tensors
    ]
    columns = zip(*(call(entry) for entry in zip(*entries, strict=True)), strict=True)
    return [
        None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
        for column in columns
    ]
