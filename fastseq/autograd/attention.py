"""The derivatives of attention: autograd Functions around its operators.

With (y, y') = attention_dual(x, x') and (g, g') = attention_dual_backward(v, v', x, x'), where a prime marks
a tangent and J is the Jacobian of attention at x:

    y' = J x'        forward mode
    g  = J^T v       reverse mode; v is the gradient of y
    g' = what that changes by along (x', v')

    forward mode of attention            attention_dual(x, x')
    reverse mode of attention            attention_backward(x, v)
    ... of that, for a gradient u of g   J u for v, as attention_dual(x, u); for x the g' of (v, 0, x, u)
    forward mode of that                 the g' of (v, v', x, x')
    reverse mode of forward mode, w      J^T w for x', the g of (w, 0, x, x'); for x its g'

So two operators close first and second derivatives. Third ones raise an error, as does forward mode twice.

Saved for the backward pass are all tensors that the operator takes, output, remainder, normalizer and, if
asked for, weights; so none of these may be changed in place before the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from .. import attention_dual_ops, attention_ops
from ..attention_dual_ops import DualResults
from ..checks import problem
from ..dispatch import is_traced, make_dual, nobody_listens, unpack_dual
from .function import (
    Function,
    each_entry,
    gradients,
    is_batched,
    needed,
    needs_gradient,
    recording,
)

_TENSORS = 10  # of Arguments
_NUMBERS = 6  # of those that follow
_AT = (0, 1, 2, 3, 8)  # of those that have derivatives: query, key, value, attn_mask and sinks
_VALUES = 5  # of DualResults; behind them are their tangents


def attention(*arguments: Any) -> tuple[Tensor, ...]:
    """Output, lse, weights, empty if not asked for, remainder and normalizer: see attention_ops.

    The arguments are those of attention_checks.Arguments, and in place of the last, `save`, whether the
    backward pass has to be deterministic.
    """
    if not (type(arguments[0]) in _USUAL or is_compiling()) and _is_dtensor(arguments[0]):
        from .. import dtensor  # few need it, and it takes long to import

        return dtensor.attention(attention, *arguments)
    tensors, (*rest, average_weights, deterministic) = arguments[:9], arguments[9:]
    query, key, value, attn_mask, *_, sinks = tensors
    if is_traced():
        return attention_ops.attention(*arguments[:-1], False, deterministic)
    if not (recording() and needs_gradient(query, key, value, attn_mask, sinks)):
        return attention_ops.attention(*arguments[:-1])
    output, lse, weights, *saved = differentiable(AttentionFunction.apply, *tensors, *rest, deterministic)
    if average_weights:  # a gradient of the mean needs each head's
        weights = weights.mean(dim=1, keepdim=True)
    return output, lse, weights, *saved


_USUAL = {Tensor, Parameter}


def _is_dtensor(tensor: Tensor) -> bool:
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def differentiable(apply: Callable[..., Any], *arguments: Any) -> Sequence[Tensor]:
    """What the operator returns, with its derivatives; apply: that of AttentionFunction.

    Where arguments have tangents, the results and theirs come from one pass.
    """
    if forward_ad._current_level < 0 and apply == AttentionFunction.apply:  # a graph may know more
        return apply(*arguments)
    duals = _unpack(arguments[:_TENSORS])
    if all(tangent is None for _, tangent in duals):
        return apply(*arguments)
    primals, tangents = zip(*duals, strict=True)
    tangents = [tangents[i] for i in _AT]
    # A batched tensor does not tell whether it requires a gradient.
    wants = torch._C._any_requires_grad(*primals, *tangents) or any(map(is_batched, tangents))
    recorded = torch.is_grad_enabled() and wants
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_traced()):
        results = _along(primals, tangents, arguments[_TENSORS:-1])
    if recorded:
        return apply(*arguments, *results)
    weights = results.weights
    if arguments[-2]:
        weights = make_dual(weights, results.weights_tangent)
    output = make_dual(results.output, results.output_tangent)
    lse = make_dual(results.lse, results.lse_tangent)
    return output, lse, weights, results.remainder, results.normalizer


def _unpack(tensors: Sequence[Tensor | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Numbers and tangents of each, at the innermost level; what is batched is a tangent itself."""
    return [(x, None) if x is None or is_batched(x) else tuple(unpack_dual(x)) for x in tensors]


def _along(
    tensors: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    constants: Sequence[Any],
    results: Sequence[Tensor] = (),
) -> DualResults:
    """attention_dual, with its derivatives; constants: numbers, and whether weights are returned; results: if
    they are known already. Tangents may be batches of them, see each_entry."""
    arguments = (*tensors, *tangents, *constants)
    if is_traced():
        return DualResults(*results) if results else attention_dual_ops.attention_dual(*arguments)
    moving = (*tangents, *results[_VALUES:])
    if not any(map(is_batched, moving)):
        return DualResults(*Tangents.apply(*arguments, *results))
    nothing = (None,) * len(_AT)
    values = results[:_VALUES] or Tangents.apply(*tensors, *nothing, *constants)[:_VALUES]

    def of_entry(entry: Sequence[Tensor | None]) -> Sequence[Tensor]:
        along, known = entry[: len(_AT)], entry[len(_AT) :]
        known = (*values, *known) if known else ()
        return Tangents.apply(*tensors, *along, *constants, *known)[_VALUES:]

    return DualResults(*values, *each_entry(of_entry, moving))


# ------------------------------------------------------------------------------------------ first derivatives


def _backward_op(
    scale: float,
    softcap: float,
    dropout_p: float,
    left: int,
    right: int,
    bottom_right: bool,
    deterministic: bool,
    wanted: Sequence[bool],
    *tensors: Tensor | None,
) -> tuple[Tensor, ...]:
    if tensors[15] is None:  # torch.compile hands a gradient even to what is not differentiable
        tensors = (*tensors[:2], None, *tensors[3:])
    numbers = (scale, softcap, dropout_p, left, right, bottom_right)
    return tuple(attention_ops.attention_backward(*tensors, *numbers, wanted, deterministic))


class AttentionFunction(Function):
    """Its arguments are those of attention(); then the results of attention_dual may follow, if that was
    asked already."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        results = arguments[18:23]
        if results:  # as tensors of their own: what a Function returns must not be one of its arguments
            return tuple(result.clone() for result in results)
        return attention_ops.attention(*arguments[:17], False, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        output, _, weights, remainder, normalizer = outputs
        return_weights = inputs[16]
        kept = weights if return_weights else None
        remainder_kept = remainder if remainder.dim() > 1 else None
        ctx.save_for_backward(*inputs[:10], output, normalizer, kept, remainder_kept)
        ctx.save_for_forward(*inputs[:10], *inputs[18:])
        ctx.constants, ctx.numbers = inputs[10:16] + inputs[17:18], inputs[10:17]
        ctx.given = len(inputs) - 10
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(remainder, normalizer, *([] if return_weights else [weights]))

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_lse: Tensor | None,
        grad_weights: Tensor | None,
        *_: Tensor | None,
    ) -> Any:
        saved = ctx.saved_tensors
        asks = not nobody_listens() or _is_large(*saved[:2])  # a size that is traced is not compared
        needs = needed(ctx) if asks else ctx.needs_input_grad
        wanted = [needs[i] for i in _AT]
        incoming = (grad_output, grad_lse, grad_weights)
        grads = gradients(AttentionBackward, incoming, saved, ctx.constants, wanted)
        return (*_among_tensors(grads), *[None] * ctx.given)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True):  # for the levels outside of this one
            saved = [x for x, _ in _unpack(ctx.saved_tensors)]
            changed = _along(saved[:10], [tangents[i] for i in _AT], ctx.numbers, saved[10:])
        weights = changed.weights_tangent if ctx.numbers[-1] else None
        return changed.output_tangent, changed.lse_tangent, weights, None, None


def _is_large(query: Tensor, key: Tensor) -> bool:
    """Whether a gradient that nobody needs would take longer than asking which of them are needed: of a leaf
    torch tells that by an exception."""
    return query.numel() * key.shape[2 if key.dim() == 4 else 0] >= 2**18


def _among_tensors(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, attn_mask and sinks in their places among all tensors."""
    places: list[Tensor | None] = [None] * _TENSORS
    for i, grad in zip(_AT, grads, strict=True):
        places[i] = grad
    return tuple(places)


def _raise(what: str) -> NoReturn:
    raise RuntimeError(
        problem(
            f"{what} through attention",
            "first and second derivatives, of these at most one in forward mode",
            "torch.nn.functional.scaled_dot_product_attention within sdpa_kernel(SDPBackend.MATH)",
        )
    )


def _third(what: str) -> Any:
    """The backward pass, or forward mode, of what has no further derivative."""
    return staticmethod(lambda ctx, *_: _raise(what))


# ----------------------------------------------------------------------------------------- second derivatives


class AttentionBackward(Function):
    """Its arguments: scale to deterministic, wanted, three gradients of results, ten tensors of arguments,
    and what came from the forward pass."""

    forward = staticmethod(_backward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        tensors = inputs[8:21]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.numbers, ctx.wanted = inputs[:_NUMBERS], inputs[7]
        ctx.given = len(inputs) - 21
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = needed(ctx)
        saved = unwrap_dead_wrappers(ctx.saved_tensors)
        of_results, tensors = saved[:3], saved[3:]
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        remaining = iter(grads)
        tangents = [next(remaining) if want else None for want in ctx.wanted]
        results = _along(tensors, tangents, (*ctx.numbers, of_results[2] is not None))
        changed = (results.output_tangent, results.lse_tangent, results.weights_tangent)
        first = [x if need else None for x, need in zip(changed, needs[8:11], strict=True)]
        wanted = [needs[11 + i] for i in _AT]
        second = _changes(of_results, (None,) * 3, tensors, tangents, results, ctx.numbers, wanted)
        return (*[None] * 8, *first, *_among_tensors(second), *[None] * ctx.given)

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True):  # for the levels outside of this one
            saved = [x for x, _ in _unpack(ctx.saved_tensors)]
            of_results, tensors = saved[:3], saved[3:]
            changes, tangents = given[8:11], [given[11 + i] for i in _AT]
            return_weights = any(x is not None for x in (of_results[2], changes[2]))
            results = _along(tensors, tangents, (*ctx.numbers, return_weights))
            second = _changes(of_results, changes, tensors, tangents, results, ctx.numbers, ctx.wanted)
        return tuple(x for x, want in zip(second, ctx.wanted, strict=True) if want)


def _changes(
    grads: Sequence[Tensor | None],
    grad_tangents: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    results: DualResults,
    numbers: Sequence[Any],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The tangents of the gradients of query, key, value, attn_mask and sinks; None where not wanted."""
    if not any(wanted):
        return [None] * len(wanted)
    nothing = [False] * len(wanted)
    given = (*grads, *grad_tangents, *tensors, *tangents, *_kept(results))
    made = iter(_second_derivatives(*given, *numbers, nothing, wanted))
    return [next(made) if want else None for want in wanted]


def _second_derivatives(*arguments: Any) -> Sequence[Tensor]:
    """attention_dual_backward, with what derivatives it has; tensors may be batched, see each_entry."""
    if is_traced():
        return attention_dual_ops.attention_dual_backward(*arguments)
    tensors, constants = arguments[: -_NUMBERS - 2], arguments[-_NUMBERS - 2 :]
    if any(map(is_batched, tensors)):
        return each_entry(lambda entry: second_derivatives("apply", *entry, *constants), tensors)
    return second_derivatives("apply", *arguments)


def second_derivatives(apply: str, *arguments: Any) -> Sequence[Tensor]:
    """By way of "apply" or "apply_here" of the Functions."""
    final, call = getattr(_Final, apply), getattr(SecondDerivatives, apply)
    grads, grad_tangents, tensors, rest = arguments[:3], arguments[3:6], arguments[6:16], arguments[16:]
    return call(*_final(grads, final), *grad_tangents, *_final(tensors, final), *rest)


def _kept(r: DualResults) -> tuple[Tensor | None, ...]:
    """Of the results what attention_dual_backward takes, None for what is empty."""
    made = (r.output, r.weights, r.remainder, r.normalizer)
    made = (*made, r.output_tangent, r.lse_tangent, r.weights_tangent, r.remainder_tangent)
    return tuple(x if x.dim() != 1 else None for x in made)


class Tangents(Function):
    """attention_dual: its arguments, and then its results if they are known."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        results = arguments[22:]
        if results:
            return tuple(result.clone() for result in results)
        return tuple(attention_dual_ops.attention_dual(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:15], *outputs)
        ctx.numbers, return_weights = inputs[15:21], inputs[21]
        ctx.given = len(inputs) - 15
        ctx.set_materialize_grads(False)
        r = DualResults(*outputs)
        unused = [] if return_weights else [r.weights, r.weights_tangent]
        ctx.mark_non_differentiable(r.remainder, r.normalizer, r.remainder_tangent, *unused)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = unwrap_dead_wrappers(ctx.saved_tensors)
        tensors, results = saved[:15], DualResults(*saved[15:])
        needs = needed(ctx)
        wanted, wanted_tangents = list(needs[10:15]), [needs[i] for i in _AT]
        given = (*grads[5:8], *grads[:3], *tensors, *_kept(results))
        made = iter(_second_derivatives(*given, *ctx.numbers, wanted, wanted_tangents))
        of_tangents = [next(made) if want else None for want in wanted]
        of_arguments = [next(made) if want else None for want in wanted_tangents]
        return (*_among_tensors(of_arguments), *of_tangents, *[None] * ctx.given)

    jvp = _third("a third derivative, or forward mode twice,")


class SecondDerivatives(Function):
    """attention_dual_backward. It is linear in the tangents of arguments and of gradients, and for these it
    has a derivative: torch.autograd.functional.hvp asks for that. All else ends here, see _final."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(attention_dual_ops.attention_dual_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *inputs[6:16])
        ctx.numbers, ctx.wanted, ctx.wanted_tangents = inputs[29:35], inputs[35], inputs[36]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved, needs = unwrap_dead_wrappers(ctx.saved_tensors), needed(ctx)
        of_results, tensors = saved[:3], saved[3:]
        of_grads = sum(ctx.wanted)
        if any(grad is not None for grad in grads[:of_grads]):
            _raise("a third derivative")
        remaining = iter(grads[of_grads:])
        along = [next(remaining) if want else None for want in ctx.wanted_tangents]
        if all(x is None for x in along):
            return (None,) * len(needs)
        results = _along(tensors, along, (*ctx.numbers, of_results[2] is not None or needs[5]))
        changed = (results.output_tangent, results.lse_tangent, results.weights_tangent)
        first = [x if need else None for x, need in zip(changed, needs[3:6], strict=True)]
        nothing = (None,) * 3
        wanted = list(needs[16:21])
        second = _changes(of_results, nothing, tensors, along, results, ctx.numbers, wanted)
        return (*nothing, *first, *[None] * _TENSORS, *second, *[None] * 16)

    jvp = _third("a third derivative")


def _final(tensors: Sequence[Tensor | None], final: Callable[..., Tensor]) -> list[Tensor | None]:
    """The same; a gradient that arrives there, of what SecondDerivatives is not linear in, is an error."""
    if not torch.is_grad_enabled():
        return list(tensors)
    return [x if x is None or not x.requires_grad else final(x) for x in tensors]


class _Final(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
        pass

    backward = _third("a third derivative")
    jvp = _third("a third derivative")
