"""The calls that fastseq.explain lists: what operators are called with, the plans of that, and the words.

    READERS               for each operator, how it is called, and what its arguments and results say
    plan_words.ENGINES    for each engine that a plan may name, the plan in words and the reasons

Another operator needs an entry in the first, another engine one in the second.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import attention_dual_ops, attention_ops, dual_ops, ops, plan_words, windows
from .attention_checks import Arguments, Attention, check_attention
from .checks import Layer, check_layer
from .plan_words import amount, many

_ALONG = {*dual_ops.OPERATORS, "recurrent_tangents", *attention_dual_ops.OPERATORS}  # a direction


class Plan(NamedTuple):
    """How one pass of a call runs."""

    # CPU: sequence, step, cell; tiles, decode of attention; CUDA: cluster, grid, stream, steps, cell; none if
    # nothing runs
    kernel: str
    architecture: str  # the instruction set of a CPU, or a GPU's compute capability
    partition: dict[str, Any]  # the plan's numbers
    words: tuple[str, ...]  # the same, in words
    reasons: tuple[str, ...]  # why it is not faster, each with the setting that would change it


class Call(NamedTuple):
    """One call of an operator of torch.ops.fastseq."""

    operator: str
    title: str  # what it is called with, in words
    mode: str  # LSTM, GRU, GRU_RESET_BEFORE, RNN_TANH, RNN_RELU, ATTENTION
    weight: str  # which layer: the name of its first recurrent weight in the state_dict, "" if it has none
    layer: Layer | Attention  # the sizes; those of attention if the mode is that
    packed: bool
    dtype: torch.dtype
    device: torch.device
    plan: Plan
    backward: Plan | None  # the plan of the backward pass for which this call saved; None if it saved nothing
    saved: dict[str, int]  # bytes of the tensors that are kept for the backward pass
    options: tuple[str, ...] = ()  # what torch's networks do not have: "lengths", "grad_clip 0.5", ...

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())

    def __str__(self) -> str:
        return _call_in_words(self)

    __repr__ = __str__


# -------------------------------------------------------------------------------- operators and their plans


def _read_layer(names: dict[int, str], arguments: Sequence[Any], results: Sequence[Tensor]) -> Call:
    input, batch_sizes, lengths, resets, h0, c0, weights, mode, directions, bias, _, save = arguments[:12]
    grad_clip, truncate, memory = (*arguments[12:], *(None, 0, "fast")[len(arguments) - 12 :])
    layer = check_layer(input, batch_sizes, h0, c0, weights, mode, directions, bias)
    output, _, _, gates = results
    kept = {"input": input, "batch_sizes": batch_sizes, "lengths": lengths, "resets": resets}
    kept |= {"h0": h0, "c0": c0, "output": output, save: gates}
    keeps, options = kept if save != "nothing" else None, _options(lengths, resets, grad_clip, truncate)
    call = _call("recurrent", names, mode, layer, input, weights, keeps, batch_sizes, options=options)
    if save != "states":
        return call
    return _in_windows(call, input, weights, "recompute" if memory == "fast" else memory, truncate)


def _options(
    lengths: Tensor | None, resets: Tensor | None, grad_clip: float | None = None, truncate: int = 0
) -> tuple[str, ...]:
    words = ["lengths"] * (lengths is not None) + ["resets"] * (resets is not None)
    if grad_clip is not None:
        words.append(f"grad_clip {grad_clip:g}")
    if truncate:
        words.append(f"truncate {truncate}")
    return tuple(words)


def _in_windows(call: Call, input: Tensor, weights: Sequence[Tensor], memory: str, truncate: int) -> Call:
    """A call whose backward pass makes the gates of some steps at a time."""
    layer = call.layer
    steps = windows.steps_of_window(layer, input.element_size(), memory)
    count = windows.count_of(layer.steps, steps, truncate)
    part = layer._replace(steps=steps, rows=-(-layer.rows * steps // max(1, layer.steps)))
    plan = _plan(call.mode, part, input, weights, call.packed, False, True)
    again = "as one step of all their rows" if memory == "recompute" else "by running their steps again"
    words = f"{many(count, 'window')} of at most {many(steps, 'step')}, whose gates are made again {again}"
    plan = plan._replace(words=(words, *plan.words))
    title, options = f"{call.title}, memory {memory}", (*call.options, f"memory {memory}")
    if call.backward is None:
        return call._replace(title=title, options=options, plan=plan)
    return call._replace(title=title, options=options, backward=plan)


def with_checkpoints(call: Call, results: Sequence[Tensor]) -> Call:
    """The forward pass that kept the states between windows alone."""
    saved = {name: size for name, size in call.saved.items() if name not in ("output", "states")}
    saved |= {name: x.nbytes for name, x in zip(("h", "c"), results, strict=True) if x.nbytes}
    return call._replace(saved=saved)


def _read_cell(names: dict[int, str], arguments: Sequence[Any], results: Sequence[Tensor]) -> Call:
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save = arguments
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    layer = check_layer(input, None, h0, c0, weights, mode, 1, bias_ih is not None, one_step=True)
    kept = {"input": input, "h0": h0, "c0": c0, "output": results[0], "gates": results[-1]}
    return _call("recurrent_cell", names, mode, layer, input, weights, kept if save else None, one_step=True)


def _read_gradients(names: dict[int, str], arguments: Sequence[Any], _: Any) -> Call:
    a, *_ = ops.split_backward(arguments)
    one_step = a.batch_sizes is None and a.input.dim() == 2
    layer = check_layer(a.input, *a[4:5], *a[7:10], a.mode, a.directions, a.bias, one_step)
    options = _options(a.lengths, a.resets, a.grad_clip, a.truncate)
    rest = (a.batch_sizes, one_step, options)
    return _call("recurrent_backward", names, a.mode, layer, a.input, a.weights, None, *rest)


def _read_layer_along(names: dict[int, str], arguments: Sequence[Any], results: Sequence[Tensor]) -> Call:
    constants = (*arguments[11:14], *arguments[15:17])  # without batch_first
    return _call_along("recurrent_dual", names, arguments[:11], constants, results)


def _read_tangents(names: dict[int, str], arguments: Sequence[Any], results: Sequence[Tensor]) -> Call:
    output, saved = arguments[7:9]
    given = (*arguments[:7], *arguments[9:13])
    made = (output, None, None, saved, *results)
    return _call_along("recurrent_tangents", names, given, arguments[13:], made)


def _call_along(
    operator: str,
    names: dict[int, str],
    tensors: Sequence[Any],
    constants: Sequence[Any],
    results: Sequence[Tensor | None],
) -> Call:
    input, batch_sizes, lengths, resets, h0, c0, weights, *tangents, of_weights = tensors
    mode, directions, bias, truncate, save = constants
    layer = check_layer(input, batch_sizes, h0, c0, weights, mode, directions, bias)
    kept = {"input": input, "batch_sizes": batch_sizes, "lengths": lengths, "resets": resets}
    kept |= {"h0": h0, "c0": c0, "output": results[0], "gates": results[3]}
    of_tensors = dict(zip(("input", "h0", "c0"), tangents, strict=True))
    of_tensors |= {"output": results[4], "gates": results[7]}
    kept |= {f"tangent of {name}": x for name, x in of_tensors.items()}
    along = dual_ops.multiplies_by_tangents(layer, of_weights)
    rest = (batch_sizes, False, _options(lengths, resets, None, truncate), along)
    return _call(operator, names, mode, layer, input, weights, kept if save else None, *rest)


def _read_gradients_along(names: dict[int, str], arguments: Sequence[Any], _: Any) -> Call:
    a = dual_ops.split_backward(arguments)
    (input, h0, c0, weights), tangents = a.arguments
    batch_sizes, lengths, resets = a.sequences
    layer = check_layer(input, batch_sizes, h0, c0, weights, a.mode, a.directions, a.bias)
    along = dual_ops.multiplies_by_tangents(layer, tangents.weights)
    rest = (batch_sizes, False, _options(lengths, resets, a.grad_clip, a.truncate), along)
    return _call("recurrent_dual_backward", names, a.mode, layer, input, weights, None, *rest)


def _read_windows(names: dict[int, str], arguments: Sequence[Any], _: Any) -> Call:
    a = windows.Call(*arguments)
    layer = windows.check(a)
    options = _options(a.lengths, a.resets, a.grad_clip, a.truncate)
    rest = (a.batch_sizes, False, options)
    call = _call("recurrent_windows_backward", names, a.mode, layer, a.input, a.weights, None, *rest)
    return _in_windows(call, a.input, a.weights, a.memory, a.truncate)


def _read_attention(_: dict[int, str], arguments: Sequence[Any], results: Sequence[Tensor]) -> Call:
    a = Arguments(*arguments)
    kept = {
        **{name: x for name, x in zip(a._fields, a, strict=True) if isinstance(x, Tensor)},
        **dict(zip(("output", "lse", "weights", "remainder", "normalizer"), results, strict=True)),
    }
    del kept["lse"]  # made again from the normalizer
    return _call_of_attention("attention", a, kept if a.save else None)


def _read_attention_gradients(_: dict[int, str], arguments: Sequence[Any], __: Any) -> Call:
    a, running = attention_ops.forward_arguments(arguments), attention_ops.running(arguments)
    return _call_of_attention("attention_backward", a, None, running)


def _read_attention_dual(_: dict[int, str], arguments: Sequence[Any], __: Any) -> Call:
    return _call_of_attention("attention_dual", attention_dual_ops.arguments_of(arguments), None)


def _read_attention_dual_gradients(_: dict[int, str], arguments: Sequence[Any], __: Any) -> Call:
    return _call_of_attention(
        "attention_dual_backward", attention_dual_ops.backward_arguments_of(arguments), None
    )


READERS: dict[str, tuple[Callable[..., Any], Callable[..., Call]]] = {
    "recurrent": (ops.recurrent, _read_layer),
    "recurrent_cell": (ops.recurrent_cell, _read_cell),
    "recurrent_backward": (ops.recurrent_backward, _read_gradients),
    "recurrent_checkpoints": (windows.recurrent_checkpoints, with_checkpoints),
    "recurrent_windows_backward": (windows.recurrent_windows_backward, _read_windows),
    "recurrent_dual": (dual_ops.recurrent_dual, _read_layer_along),
    "recurrent_tangents": (dual_ops.recurrent_tangents, _read_tangents),
    "recurrent_dual_backward": (dual_ops.recurrent_dual_backward, _read_gradients_along),
    "attention": (attention_ops.attention, _read_attention),
    "attention_backward": (attention_ops.attention_backward, _read_attention_gradients),
    "attention_dual": (attention_dual_ops.attention_dual, _read_attention_dual),
    "attention_dual_backward": (attention_dual_ops.attention_dual_backward, _read_attention_dual_gradients),
}


def _call(
    operator: str,
    names: dict[int, str],
    mode: str,
    layer: Layer,
    input: Tensor,
    weights: Sequence[Tensor],
    kept: dict[str, Tensor | None] | None,
    batch_sizes: Tensor | None = None,
    one_step: bool = False,
    options: tuple[str, ...] = (),
    along: bool | None = None,  # of dual numbers, whether weights that a step multiplies by have tangents
) -> Call:
    plan = partial(_plan, mode, layer, input, weights, batch_sizes is not None, one_step, along=along)
    saved = {name: x.nbytes for name, x in (kept or {}).items() if x is not None}
    if kept is not None:
        saved["weights"] = sum(weight.nbytes for weight in weights)
    weight = names.get(address_of(weights[1]), "")
    return Call(
        operator,
        ", ".join([_title(operator, mode, weight, layer, input, batch_sizes is not None), *options]),
        mode,
        weight,
        layer,
        batch_sizes is not None,
        input.dtype,
        input.device,
        plan(operator.endswith("_backward")),
        plan(True) if kept is not None else None,
        {name: size for name, size in saved.items() if size},
        options,
    )


def _plan(
    mode: str,
    layer: Layer,
    input: Tensor,
    weights: Sequence[Tensor],
    packed: bool,
    one_step: bool,
    backward: bool,
    along: bool | None = None,
) -> Plan:
    copied = any(not weight.is_contiguous() for weight in weights)
    more = ["weights that are not contiguous are copied in every call: weight.contiguous()"] * copied
    options = (packed, one_step if along is None else along, backward)
    kernels = (ops if along is None else dual_ops).KERNELS.get(input.device.type)
    return _plan_of(kernels, mode, layer, input, (layer, input.dtype, input.device, *options), more)


def _plan_of(
    kernels: ops.Kernels | dual_ops.Kernels | attention_ops.Kernels | attention_dual_ops.Kernels | None,
    mode: str,
    layer: Layer | Attention,
    input: Tensor,
    asked: tuple[Any, ...],
    more_reasons: list[str],
) -> Plan:
    """What the owner of the device's kernels says when it is asked, and its engine in words."""
    if kernels is None or kernels.plan is None:
        return Plan("none", "", {}, (), (f"nothing is computed on device {input.device}",))
    try:
        plan = kernels.plan(*asked)
    except RuntimeError as error:  # of a backward pass that will fail: a call that failed has raised
        return Plan(
            "none", "", {}, (), tuple(f"it will fail, {line}" for line in str(error).splitlines()[:1])
        )
    architecture, words, reasons = plan_words.ENGINES[plan["engine"]](plan, mode, layer, input.dtype)
    return Plan(plan["kernel"], architecture, plan["partition"], tuple(words), (*reasons, *more_reasons))


def _call_of_attention(
    operator: str,
    a: Arguments,
    kept: dict[str, Tensor] | None,
    running: attention_ops.Running | None = None,
) -> Call:
    sizes, query = check_attention(a), a.query
    longest = _longest(a, sizes)
    more = [
        f"{name}, whose features do not lie next to each other, is copied in every call: {name}.contiguous()"
        for name in ("query", "key", "value")
        if getattr(a, name).stride(-1) != 1 and getattr(a, name).shape[-1] > 1
    ]
    if a.return_weights and operator == "attention":
        heads = 1 if a.average_weights else sizes.heads
        size = query.element_size() * sizes.batch * heads * sizes.queries * sizes.keys
        more.append(f"return_weights writes {amount(size)} of weights, which are never stored without it")

    def plan(backward: bool) -> Plan:
        mask = a.attn_mask if backward and a.attn_mask is not None and a.attn_mask.requires_grad else None
        of_mask = None if mask is None else tuple(size > 1 for size in mask.shape)
        if operator in _ALONG:
            kernels = attention_dual_ops.KERNELS.get(query.device.type)
            asked = (longest, a, of_mask, bool(a.return_weights), backward)
        else:
            kernels = attention_ops.KERNELS.get(query.device.type)
            asked = (longest, a, backward, of_mask, running)
        return _plan_of(kernels, "ATTENTION", longest, query, asked, more)

    saved = {name: x.nbytes for name, x in (kept or {}).items()}
    return Call(
        operator,
        _title_of_attention(operator, a, sizes),
        "ATTENTION",
        "",
        sizes,
        a.cu_seqlens_q is not None,
        query.dtype,
        query.device,
        plan(operator.endswith("_backward")),
        plan(True) if kept is not None else None,
        {name: size for name, size in saved.items() if size},
    )


def _longest(a: Arguments, sizes: Attention) -> Attention:
    """The sizes of which a plan is made: with as many queries and keys as the longest sequence has."""
    if a.query.is_meta:
        return sizes
    longest = {}
    for name, seqlens in (("queries", a.cu_seqlens_q), ("keys", a.cu_seqlens_k)):
        if seqlens is not None and seqlens.shape[0] > 1:
            longest[name] = int(seqlens.diff().max())
    if a.key_lengths is not None and sizes.batch:
        longest["keys"] = int(a.key_lengths.max())
    return sizes._replace(**longest)


def address_of(weight: Tensor) -> int:
    """0 of tensors that have none: those of subclasses, without data, or in another layout."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided and not weight.is_meta
    return weight.data_ptr() if plain else 0


# ---------------------------------------------------------------------------------------------------- words


def _of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_INDENT = 12 * " "


def _wrap(text: str, begin: str) -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=begin, subsequent_indent=len(begin) * " ")


def _title(operator: str, mode: str, weight: str, layer: Layer, input: Tensor, packed: bool) -> str:
    words = ["the gradients of " * operator.endswith("_backward") + mode]
    words[0] += " along a direction" * (operator in _ALONG)
    words += [f"{_of_dtype(input.dtype)} on {input.device}"]
    words += [f"T {layer.steps}"] * (operator != "recurrent_cell")
    words += [f"B {layer.batch}", f"I {layer.input_size}", f"H {layer.hidden_size}"]
    words += [f"R {layer.width}"] * layer.projected
    words += ["both directions"] * (layer.directions == 2)
    words += [f"packed in {layer.rows} rows"] * packed
    return ", ".join(words) + f" ({weight})" * bool(weight)


def _title_of_attention(operator: str, a: Arguments, sizes: Attention) -> str:
    words = ["the gradients of " * operator.endswith("_backward") + "attention"]
    words[0] += " along a direction" * (operator in _ALONG)
    words += [f"{_of_dtype(a.query.dtype)} on {a.query.device}", f"B {sizes.batch}"]
    grouped, narrower = sizes.heads != sizes.kv_heads, sizes.head_size != sizes.value_size
    words += [f"Hq {sizes.heads}", f"Hkv {sizes.kv_heads}"] if grouped else [f"heads {sizes.heads}"]
    words += [f"Sq {sizes.queries}", f"Sk {sizes.keys}", f"D {sizes.head_size}"]
    words += [f"Dv {sizes.value_size}"] * narrower
    words += ["packed"] * (a.cu_seqlens_q is not None)
    if a.left >= 0 or a.right >= 0:
        limits = "causal" if a.left < 0 and a.right == 0 else f"window ({a.left}, {a.right})"
        words += [limits + " from the bottom right" * a.bottom_right]
    if a.attn_mask is not None:
        words += [f"attn_mask {_of_dtype(a.attn_mask.dtype)} {tuple(a.attn_mask.shape)}"]
    words += [name for name in ("key_lengths", "alibi_slopes", "sinks") if getattr(a, name) is not None]
    words += [f"softcap {a.softcap:g}"] * (a.softcap != 0) + [f"dropout {a.dropout_p:g}"] * (a.dropout_p != 0)
    return ", ".join(words)


def _call_in_words(call: Call) -> str:
    lines = _wrap(call.title, "")
    plans = {"forward": call.plan, "backward": call.backward}
    if call.operator.endswith("_backward"):
        plans = {"backward": call.plan}
    for name, plan in plans.items():
        if plan is None:
            continue
        where = f", {plan.architecture}" if plan.architecture else ""
        first, *rest = plan.words or ("",)
        lines += _wrap(f"{plan.kernel}{where}{', ' if first else ''}{first}", f"  {name:<9} ")
        for line in rest:
            lines += _wrap(line, _INDENT)
    if call.saved:
        parts = ", ".join(f"{name} {amount(size)}" for name, size in call.saved.items())
        lines += _wrap(f"{amount(call.saved_bytes)} for the backward pass: {parts}", f"  {'saved':<9} ")
    elif not call.operator.endswith("_backward"):
        lines.append(f"  {'saved':<9} nothing")
    for reason in _reasons_of(plans):
        lines += _wrap(reason, "  - ")
    return "\n".join(lines)


def _reasons_of(plans: dict[str, Plan | None]) -> list[str]:
    """Those of both passes once, those of one with its name."""
    of_pass = {name: plan.reasons for name, plan in plans.items() if plan is not None}
    lines: list[str] = []
    for name, reasons in of_pass.items():
        for reason in reasons:
            everywhere = all(reason in others for others in of_pass.values())
            line = reason if everywhere else f"{name}: {reason}"
            if line not in lines:
                lines.append(line)
    return lines
