"""The operators of attention over dual numbers: every number with its tangent beside it, in one pass.

    attention_dual             the results of attention, and how they change along tangents of the arguments
    attention_dual_backward    the gradients of attention_backward, and how they change

The first is forward mode; what is made of both for second derivatives is said in autograd/attention.py.
What attention_ops.py says holds here too. A tangent is like the tensor that it belongs to; None is zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, cpu_attention_dual, cuda_attention_dual, loops
from .attention_checks import Arguments, Attention, check_attention, dtype_of_sums, unsupported
from .attention_ops import (
    NUMBERS,
    TENSORS,
    Gradients,
    allocate,
    allocate_gradients,
    check_wanted,
    dense,
    require_like,
    result,
    rows_of,
)
from .checks import problem
from .dispatch import library, nobody_listens, plain_device, register

_TANGENTS = (
    "Tensor? query_tangent, Tensor? key_tangent, Tensor? value_tangent, Tensor? attn_mask_tangent, "
    "Tensor? sinks_tangent"
)
# The first five are those of attention with `save`; normalizer is the business of attention_dual_backward.
library.define(
    f"attention_dual({TENSORS}, {_TANGENTS}, {NUMBERS}, bool return_weights) -> "
    "(Tensor output, Tensor lse, Tensor weights, Tensor remainder, Tensor normalizer, "
    "Tensor output_tangent, Tensor lse_tangent, Tensor weights_tangent, Tensor remainder_tangent)"
)
# output to remainder_tangent: what attention_dual returned for these arguments and tangents. Returned are the
# gradients that `wanted` tells of, of [query, key, value, attn_mask, sinks], and then the tangents of
# gradients that `wanted_tangents` tells of.
library.define(
    "attention_dual_backward(Tensor? grad_output, Tensor? grad_lse, Tensor? grad_weights, "
    "Tensor? grad_output_tangent, Tensor? grad_lse_tangent, Tensor? grad_weights_tangent, "
    f"{TENSORS}, {_TANGENTS}, Tensor output, Tensor? weights, Tensor? remainder, Tensor normalizer, "
    "Tensor output_tangent, Tensor lse_tangent, Tensor? weights_tangent, Tensor? remainder_tangent, "
    f"{NUMBERS}, bool[] wanted, bool[] wanted_tangents) -> Tensor[]"
)


class Tangents(NamedTuple):
    """Of the arguments."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    attn_mask: Tensor | None
    sinks: Tensor | None


class DualResults(NamedTuple):
    """Of attention_dual; those that are not made are empty."""

    output: Tensor
    lse: Tensor
    weights: Tensor
    remainder: Tensor
    normalizer: Tensor
    output_tangent: Tensor
    lse_tangent: Tensor
    weights_tangent: Tensor
    remainder_tangent: Tensor


class OfResults(NamedTuple):
    """Gradients of the results, or tangents of these."""

    output: Tensor | None
    lse: Tensor | None
    weights: Tensor | None


class DualIncoming(NamedTuple):
    """What the backward pass has beside arguments and their tangents."""

    grads: OfResults
    grad_tangents: OfResults
    output: Tensor
    weights: Tensor | None
    remainder: Tensor | None
    normalizer: Tensor
    output_tangent: Tensor
    lse_tangent: Tensor
    weights_tangent: Tensor | None
    remainder_tangent: Tensor | None


class DualGradients(NamedTuple):
    """What it fills."""

    primal: Gradients
    tangent: Gradients


def _check_tangents(a: Arguments, tangents: Tangents) -> None:
    for name, tangent in zip(Tangents._fields, tangents, strict=True):
        if tangent is None:
            continue
        of: Tensor | None = getattr(a, name)
        if of is None or not of.is_floating_point():
            raise RuntimeError(
                problem(
                    f"a tangent of {name}, which is " + ("None" if of is None else f"of dtype {of.dtype}"),
                    "tangents of tensors of a float dtype",
                    f"None for the tangent of {name}",
                )
            )
        require_like(f"the tangent of {name}", tangent, of.shape, of.dtype, of.device, name)


# ------------------------------------------------------------------------------------------------- forward


def arguments_of(arguments: Sequence[Any]) -> Arguments:
    """Of a call of attention_dual."""
    return Arguments(*arguments[:10], *arguments[15:22], save=True)


def _read(arguments: Sequence[Any]) -> tuple[Arguments, Attention, Tangents]:
    a = arguments_of(arguments)
    sizes, tangents = check_attention(a), Tangents(*arguments[10:15])
    _check_tangents(a, tangents)
    return a, sizes, _dense_tangents(tangents)


def _dense_tangents(given: Tangents) -> Tangents:
    """As the kernels take them: see attention_ops.dense."""
    *_, attn_mask, sinks = given
    query, key, value = (None if x is None or x._is_zerotensor() else rows_of(x) for x in given[:3])
    attn_mask = None if attn_mask is None or attn_mask._is_zerotensor() else attn_mask
    return Tangents(query, key, value, attn_mask, _contiguous(sinks))


def _allocate(a: Arguments, sizes: Attention) -> DualResults:
    results = allocate(a, sizes)
    return DualResults(*results, *(torch.empty_like(x) for x in results[:4]))


def _attention_dual_fake(*arguments: Any) -> tuple[Tensor, ...]:
    a, sizes, _ = _read(arguments)
    return tuple(_allocate(a, sizes))


def _run(run: Callable[..., None], looks: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Checks, allocates, has run(sizes, arguments, tangents, results) fill the results."""
    a, sizes, tangents = _read(arguments)
    results = _allocate(a, sizes)
    run(sizes, dense(a, sizes, looks), tangents, results)
    return tuple(results)


# ------------------------------------------------------------------------------------------------ gradients


def backward_arguments_of(arguments: Sequence[Any]) -> Arguments:
    """Of a call of attention_dual_backward; return_weights: whether these have a gradient, or its tangent."""
    of_weights = arguments[2] is not None or arguments[5] is not None
    return Arguments(*arguments[6:16], *arguments[29:35], of_weights, save=True)


def _read_backward(
    arguments: Sequence[Any],
) -> tuple[Arguments, Attention, Tangents, DualIncoming, tuple[Sequence[bool], Sequence[bool]]]:
    grads, grad_tangents = OfResults(*arguments[:3]), OfResults(*arguments[3:6])
    incoming = DualIncoming(grads, grad_tangents, *arguments[21:29])
    a = backward_arguments_of(arguments)
    sizes, tangents = check_attention(a), Tangents(*arguments[16:21])
    _check_tangents(a, tangents)
    query, dtype, sums = a.query, a.query.dtype, dtype_of_sums(a.query.dtype)
    output = (*query.shape[:-1], sizes.value_size)
    lse = query.shape[:-1] if a.cu_seqlens_q is None else (sizes.heads, sizes.queries)
    weights = (*lse, sizes.keys)
    for name, tensor, shape, of in (
        ("grad_output", grads.output, output, dtype),
        ("grad_lse", grads.lse, lse, sums),
        ("grad_weights", grads.weights, weights, dtype),
        ("grad_output_tangent", grad_tangents.output, output, dtype),
        ("grad_lse_tangent", grad_tangents.lse, lse, sums),
        ("grad_weights_tangent", grad_tangents.weights, weights, dtype),
        ("output", incoming.output, output, dtype),
        ("weights", incoming.weights, weights, dtype),
        ("remainder", incoming.remainder, output, dtype),
        ("normalizer", incoming.normalizer, (2, *lse), sums),
        ("output_tangent", incoming.output_tangent, output, dtype),
        ("lse_tangent", incoming.lse_tangent, lse, sums),
        ("weights_tangent", incoming.weights_tangent, weights, dtype),
        ("remainder_tangent", incoming.remainder_tangent, output, dtype),
    ):
        if tensor is not None:
            require_like(name, tensor, shape, of, query.device, "the forward pass")
    for name, of_weights in (("", grads.weights), ("_tangent", grad_tangents.weights)):
        if of_weights is not None and (incoming.weights is None or incoming.weights_tangent is None):
            raise RuntimeError(
                problem(
                    f"grad_weights{name} without weights or weights_tangent",
                    "those of attention_dual",
                    "pass both",
                )
            )
    wanted, wanted_tangents = arguments[35:37]
    check_wanted("wanted", wanted, a)
    check_wanted("wanted_tangents", wanted_tangents, a)
    return a, sizes, _dense_tangents(tangents), incoming, (wanted, wanted_tangents)


def _allocate_gradients(
    a: Arguments, sizes: Attention, wanted: tuple[Sequence[bool], Sequence[bool]]
) -> DualGradients:
    grads = (allocate_gradients(a, sizes, of) for of in wanted)
    return DualGradients(*(of._replace(attn_mask=_zeros_for_mask(of.attn_mask, a)) for of in grads))


def _zeros_for_mask(grad: Tensor | None, a: Arguments) -> Tensor | None:
    """In the dtype of sums, whatever is broadcast."""
    return None if grad is None else grad.new_zeros(grad.shape, dtype=dtype_of_sums(a.query.dtype))


def _dense_incoming(incoming: DualIncoming) -> DualIncoming:
    """As the kernels take them: see attention_ops.dense."""

    def dense_of(x: Tensor | None) -> Tensor | None:
        return None if x is None or x._is_zerotensor() else rows_of(x)

    grads, grad_tangents, *rest = incoming
    normalizer, lse_tangent = incoming.normalizer.contiguous(), incoming.lse_tangent.contiguous()
    dense_grads = [
        OfResults(dense_of(of.output), _contiguous(of.lse), dense_of(of.weights))
        for of in (grads, grad_tangents)
    ]
    return DualIncoming(*dense_grads, *map(dense_of, rest))._replace(
        normalizer=normalizer, lse_tangent=lse_tangent
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None or x._is_zerotensor() else x.contiguous()


def _results(grads: DualGradients, a: Arguments) -> list[Tensor]:
    return [
        result(grad, name, a)
        for of in grads
        for name, grad in zip(of._fields, of, strict=True)
        if grad is not None
    ]


def _attention_dual_backward_fake(*arguments: Any) -> list[Tensor]:
    a, sizes, _, _, wanted = _read_backward(arguments)
    return _results(_allocate_gradients(a, sizes, wanted), a)


def _run_backward(run: Callable[..., None], looks: bool, *arguments: Any) -> list[Tensor]:
    """Checks, allocates, has run(sizes, arguments, tangents, incoming, grads) fill the gradients."""
    a, sizes, tangents, incoming, wanted = _read_backward(arguments)
    grads = _allocate_gradients(a, sizes, wanted)
    a = dense(a, sizes, looks)
    if sizes.heads:
        run(sizes, a, tangents, _dense_incoming(incoming), grads)
    else:  # keys and values that no query head reads
        for grad in (*grads.primal, *grads.tangent):
            if grad is not None:
                grad.zero_()
    return _results(grads, a)


# --------------------------------------------------------------------------------------------- registration

OPERATORS = ("attention_dual", "attention_dual_backward")


class Kernels(NamedTuple):
    """The two operators on one device.

    plan(longest, arguments, of_mask, of_weights, backward), for fastseq.explain: what a call runs, as in
    attention_ops.Kernels. of_weights: whether weights are returned, or have a gradient.
    """

    attention_dual: Callable[..., Any]
    attention_dual_backward: Callable[..., Any]
    plan: Callable[..., dict[str, Any]] | None = None


def cuda_kernels(engine: loops.Engine) -> Kernels:
    """The operators where attention runs on `engine`."""
    return Kernels(
        partial(_run, partial(cuda_attention_dual.forward, engine), False),
        partial(_run_backward, partial(cuda_attention_dual.backward, engine), False),
        partial(cuda_attention_dual.plan_in_data, engine),
    )


KERNELS = {
    "cpu": Kernels(
        partial(_run, cpu_attention_dual.forward, True),
        partial(_run_backward, cpu_attention_dual.backward, True),
        cpu_attention_dual.plan_in_data,
    )
}
if _C.cuda_info()["built"]:
    KERNELS["cuda"] = cuda_kernels(loops.CUDA)

_DISPATCHED = Kernels(
    *(
        register(name, {where: getattr(k, name) for where, k in KERNELS.items()}, fake, unsupported)
        for name, fake in zip(OPERATORS, (_attention_dual_fake, _attention_dual_backward_fake), strict=True)
    )
)


def _kernels(*tensors: Tensor | None) -> Kernels:
    return KERNELS.get(plain_device(*tensors), _DISPATCHED) if nobody_listens() else _DISPATCHED


def attention_dual(*arguments: Any) -> DualResults:
    """torch.ops.fastseq.attention_dual, without the dispatcher where possible."""
    return DualResults(*_kernels(*arguments[:9], *arguments[10:15]).attention_dual(*arguments))


def attention_dual_backward(*arguments: Any) -> list[Tensor]:
    """torch.ops.fastseq.attention_dual_backward, without the dispatcher where possible."""
    return _kernels(*arguments[:15], *arguments[16:29]).attention_dual_backward(*arguments)
