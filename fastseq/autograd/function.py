"""What the autograd Functions of the operators share.

The Functions stand outside of the operators, and are skipped when no gradient is needed. Each one's backward
pass is a Function too, of class Backward, so that a second derivative is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..checks import problem
from ..dispatch import refuse_vmap


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

    vmap = staticmethod(refuse_vmap)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


class Backward(Function):
    """A backward pass as a part of the graph: a second derivative is an error, not silently zero.

    forward(*constants, wanted, *grad_outputs, *tensors) returns the gradients that are wanted, backward is
    what refuse() returns.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        pass


def refuse(what: str, instead: str) -> Any:
    """The backward pass of a Backward: `what` has no second derivative, `instead` has."""

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        raise RuntimeError(
            problem(
                f"a second derivative through {what}",
                "first derivatives",
                f"create_graph=False, or {instead}",
            )
        )

    return staticmethod(backward)


def gradients(
    function: type[Backward],
    grad_outputs: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    constants: tuple[Any, ...],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of all that `wanted` tells of, None where not wanted."""
    if not is_compiling() and any(map(_is_batched, grad_outputs)):
        return _batched_gradients(function, grad_outputs, tensors, constants, wanted)
    if not is_compiling():  # what torch.func.vjp has saved outlives its transform
        tensors = unwrap_dead_wrappers(tuple(tensors))
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # create_graph=True, or tangents
        grads = function.apply(*constants, wanted, *grad_outputs, *tensors)
    else:
        grads = function.forward(*constants, wanted, *grad_outputs, *tensors)
    remaining = iter(grads)
    return [next(remaining) if want else None for want in wanted]


def _is_batched(grad: Tensor | None) -> bool:
    return grad is not None and is_legacy_batchedtensor(grad)


def _batched_gradients(
    function: type[Backward], grad_outputs: Sequence[Tensor | None], *rest: Any
) -> list[Tensor | None]:
    """gradients() for each entry of a batch of gradients, which torch.autograd.grad(is_grads_batched=True)
    and torch.autograd.functional.jacobian(vectorize=True) hide in tensors without memory of their own."""
    level = torch._C._vmapmode_increment_nesting() - 1  # the only way to read it
    torch._C._vmapmode_decrement_nesting()
    batched = [grad for grad in grad_outputs if _is_batched(grad)]
    size = 0
    while level > 0 and size == 0:  # removing a level that is not there gives a batch of the size asked for
        size = max(torch._remove_batch_dim(grad, level, 0, 0).shape[0] for grad in batched)
        level -= size == 0
    if size == 0:
        raise RuntimeError(problem("a batch of no gradients", "at least one", "torch.zeros_like(tensor)"))
    entries = [
        [None] * size if grad is None else torch._remove_batch_dim(grad, level, size, 0).unbind(0)
        for grad in grad_outputs
    ]
    columns = zip(*(gradients(function, entry, *rest) for entry in zip(*entries, strict=True)), strict=True)
    return [
        None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
        for column in columns
    ]
