"""The operators torch.ops.fastseq.*, which are the only callers of the kernels.

    recurrent            one layer with all its directions, over a whole sequence
    recurrent_cell       one step of one direction
    recurrent_backward   the gradients of either

Each operator checks its arguments, allocates its results and passes addresses, sizes and strides on. The fake
implementations (torch.compile, torch.export, meta tensors) share the checks and the allocation with the real
ones, and so return the same shapes and strides. Their gradients are in fastseq.autograd, their batching rules
in batching.py. The arguments' types are those of the schemas.

T steps, B batch, I input_size, H hidden_size, R recurrent size (proj_size or H), D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, cpu, loops
from .checks import (
    CELLS,
    Layer,
    check_batch_sizes,
    check_bounds,
    check_layer,
    check_like,
    check_rows,
    problem,
    unsupported,
)
from .dispatch import (
    READS_TENSORS,
    implementations,
    library,
    nobody_listens,
    plain_device,
    register,
)
from .steps import wide_dtype

# weights: for each direction weight_ih, weight_hh, then bias_ih, bias_hh if `bias`, then weight_hr of a
# projected LSTM. output is (T, B, D*R), in memory (B, T, D*R) if batch_first. c_n and saved are empty if
# there are none. directions is 1, 2, or -1 for one that runs from the last step to the first.
#
# lengths (B), int64 or int32 on any device, unsorted, 0 to T: row b has the steps t < lengths[b]. Its output
# is zero after them, its last state that after them, and direction 1 begins with the last of them; what the
# input holds there reaches nothing. resets (T, B), of a packed sequence (rows), bool: neither a state nor the
# gradient of one crosses between the steps t - 1 and t of a row.
#
# save is "nothing", "gates", for the backward pass, or "states", c of an LSTM at every step: (D, rows, H).
# With lengths the rows of saved, T*B whatever the lengths are, lie as the device's kernels like.
#
# grad_clip, truncate (see recurrent_backward) and memory (see windows.py) are of the gradients that autograd
# gives the results; what is computed here does not depend on them.
library.define(
    "recurrent(Tensor input, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, str mode, int directions, bool bias, bool batch_first, str save, "
    'float? grad_clip=None, int truncate=0, str memory="fast") '
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)"
)
# Returns [h, c of an LSTM, saved if `save`].
library.define(
    "recurrent_cell(Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, str mode, bool save) -> Tensor[]"
)
# For a cell input is (B, I) and batch_sizes None; saved holds gates. `wanted` says for which of [input, h0,
# c0, *weights] to return a gradient. At every step the gradients of h_t and c_t are bounded to [-grad_clip,
# grad_clip] before they go on; no gradient of a state crosses between t - 1 and t where t is a multiple of
# truncate, if that is not 0. Where `keep`, the last result is the whole gradient of h at every step,
# (D, rows, R) in the dtype of sums, with rows as those of saved: dual_ops.recurrent_dual_backward takes it.
library.define(
    "recurrent_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor? batch_sizes, Tensor? lengths, Tensor? resets, Tensor? h0, Tensor? c0, Tensor[] weights, "
    "Tensor output, Tensor saved, str mode, int directions, bool bias, float? grad_clip, int truncate, "
    "bool[] wanted, bool keep=False) -> Tensor[]"
)


SAVES = ("nothing", "states", "gates")


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ------------------------------------------------------------------------------------------------ one layer


def _allocate_layer(
    input: Tensor, layer: Layer, batch_first: bool, save: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cell, steps, batch, hidden = layer.cell, layer.steps, layer.batch, layer.hidden_size
    directions, features = layer.directions, layer.directions * layer.width
    if input.dim() == 2:  # packed
        output = input.new_empty((layer.rows, features))
    else:  # no transposed view: autograd forbids changing a view from a Function in place
        strides = (features, steps * features, 1) if batch_first else (batch * features, features, 1)
        output = input.new_empty_strided((steps, batch, features), strides)  # faster than new_empty
    h_n = input.new_empty_strided((directions, batch, layer.width), (batch * layer.width, layer.width, 1))
    if not cell.cell_state:
        c_n = input.new_empty(0)
    else:
        c_n = input.new_empty((directions, batch, hidden)) if layer.projected else torch.empty_like(h_n)
    if save == "gates" and cell.saved:
        saved = input.new_empty((directions, layer.rows, cell.saved, hidden))
    elif save == "states" and cell.cell_state:
        saved = input.new_empty((directions, layer.rows, hidden))
    else:
        saved = input.new_empty(0) if cell.cell_state else torch.empty_like(c_n)
    return output, h_n, c_n, saved


def _check_recurrent(
    input, batch_sizes, lengths, resets, h0, c0, weights, mode, directions, bias, save
) -> Layer:
    layer = check_layer(input, batch_sizes, h0, c0, weights, mode, directions, bias)
    if lengths is not None or resets is not None:
        check_rows(input, batch_sizes, lengths, resets, layer)
    if save not in SAVES:
        raise RuntimeError(problem(f"save {save!r}", ", ".join(map(repr, SAVES)), "one of these"))
    return layer


def _recurrent_fake(
    input, batch_sizes, lengths, resets, h0, c0, weights, mode, directions, bias, batch_first, save, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = _check_recurrent(
        input, batch_sizes, lengths, resets, h0, c0, weights, mode, directions, bias, save
    )
    return _allocate_layer(input, layer, batch_first, save)


def _run_layer(
    run, input, batch_sizes, lengths, resets, h0, c0, weights, mode, directions, bias, batch_first, save, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks, allocates, has run(layer, mode, input, ..., weights, save, output, h_n, c_n, saved) fill the
    results."""
    layer = _check_recurrent(
        input, batch_sizes, lengths, resets, h0, c0, weights, mode, directions, bias, save
    )
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, layer)
    results = _allocate_layer(input, layer, batch_first, save)
    weights = [weight.contiguous() for weight in weights]
    sequence = (_dense(batch_sizes), lengths, _dense(resets))
    run(layer, mode, input, *sequence, _dense(h0), _dense(c0), weights, save, *results)
    return results


# ------------------------------------------------------------------------------------------------ one step


def _check_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode) -> Layer:
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError(
            problem("one of bias_ih and bias_hh", "both or none", "torch.zeros_like(...) for the other")
        )
    biases = [] if bias_ih is None or bias_hh is None else [bias_ih, bias_hh]
    weights = [weight_ih, weight_hh, *biases]
    return check_layer(input, None, h0, c0, weights, mode, 1, bool(biases), one_step=True)


def _recurrent_cell_fake(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save) -> list[Tensor]:
    layer = _check_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode)
    return _allocate_step(input, layer.batch, layer.hidden_size, mode, save)


def _run_cell(run, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save) -> list[Tensor]:
    """Checks, allocates, has run(layer, mode, input, h0, c0, weights, h, c, saved) take the step."""
    layer = _check_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode)
    results = _allocate_step(input, layer.batch, layer.hidden_size, mode, save)
    weights = [w.contiguous() for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    c = results[1] if layer.cell.cell_state else None
    saved = results[-1] if save and layer.cell.saved else None
    run(layer, mode, input, _dense(h0), _dense(c0), weights, results[0], c, saved)
    return results


def _allocate_step(input: Tensor, batch: int, hidden: int, mode: str, save: bool) -> list[Tensor]:
    cell = CELLS[mode]
    results = [input.new_empty((batch, hidden))]
    if cell.cell_state:
        results.append(torch.empty_like(results[0]))
    if save:
        results.append(input.new_empty((batch, cell.saved, hidden) if cell.saved else (0,)))
    return results


def recurrent_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save) -> list[Tensor]:
    """torch.ops.fastseq.recurrent_cell, but without the dispatcher where that could only find the CPU kernel.

    Dispatching takes longer than a small step does. So where nobody listens, the compiled module looks at the
    tensors; whatever is unusual or wrong it leaves to the operator.
    """
    tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    if not nobody_listens():
        return _DISPATCHED.recurrent_cell(*tensors, mode, save)
    if READS_TENSORS and input.is_cpu and input.dim() == weight_hh.dim() == 2:
        code, _, slots, cell_state = CELLS[mode]
        if save or h0 is None or h0.layout is not torch.strided:
            results = _allocate_step(input, input.shape[0], weight_hh.shape[1], mode, save)
        elif cell_state:
            results = [torch.empty_like(h0), torch.empty_like(h0)]  # the fastest call
        else:
            results = [torch.empty_like(h0)]
        c, saved = results[1] if cell_state else None, results[-1] if save and slots else None
        if _C.recurrent_cell(code, torch.get_num_threads(), *tensors, results[0], c, saved):
            return results
    kernels = KERNELS.get(plain_device(*tensors), _DISPATCHED)
    return kernels.recurrent_cell(*tensors, mode, save)


# ------------------------------------------------------------------------------------------------ gradients


class Backward(NamedTuple):
    """The arguments of recurrent_backward but the last ones, `wanted` and `keep`."""

    grad_output: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    input: Tensor
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    output: Tensor
    saved: Tensor
    mode: str
    directions: int
    bias: bool
    grad_clip: float | None
    truncate: int


def _check_backward(a: Backward) -> Layer:
    input = a.input
    one_step = a.batch_sizes is None and input.dim() == 2
    layer = check_layer(input, a.batch_sizes, a.h0, a.c0, a.weights, a.mode, a.directions, a.bias, one_step)
    if a.lengths is not None or a.resets is not None:
        check_rows(input, a.batch_sizes, a.lengths, a.resets, layer)
    if a.grad_clip is not None or a.truncate:
        check_bounds(a.grad_clip, a.truncate)
    lead = () if one_step else (layer.directions,)
    shape = (*input.shape[:-1], layer.directions * layer.width)
    check_like("output", a.output, shape, "that of the forward pass", input)
    slots, rows, hidden = layer.cell.saved, layer.rows, layer.hidden_size
    check_like(
        "saved", a.saved, (*lead, rows, slots, hidden) if slots else (0,), "that of the forward pass", input
    )
    for name, grad, like in (
        ("grad_output", a.grad_output, shape),
        ("grad_h_n", a.grad_h_n, (*lead, layer.batch, layer.width)),
        ("grad_c_n", a.grad_c_n, (*lead, layer.batch, hidden)),
    ):
        if grad is not None:
            check_like(name, grad, like, "that of the forward pass", input)
    return layer


def allocate_gradients(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    grads: list[Tensor | None] = []
    for i, (tensor, want) in enumerate(zip((input, h0, c0, *weights), wanted, strict=True)):
        if tensor is None or not want:
            grads.append(None)
        elif i == 0 and (grad := torch.empty_like(input)).stride(-1) == 1:
            grads.append(grad)  # batch-first like the input, if that is
        elif tensor.is_contiguous():  # the usual case, and the faster call
            grads.append(torch.empty_like(tensor))
        else:
            grads.append(torch.empty_like(tensor, memory_format=torch.contiguous_format))
    return grads


def split_backward(arguments: Sequence[Any]) -> tuple[Backward, Sequence[bool], bool]:
    """recurrent_backward's, `wanted` and `keep`, which torch leaves out where it is the default."""
    count = len(Backward._fields)
    return Backward(*arguments[:count]), arguments[count], len(arguments) > count + 1 and arguments[-1]


def _allocate_hidden(a: Backward, layer: Layer) -> Tensor:
    """For the gradient of h at every step."""
    lead = () if a.batch_sizes is None and a.input.dim() == 2 else (layer.directions,)
    return a.input.new_empty((*lead, layer.rows, layer.width), dtype=wide_dtype(a.input))


def _recurrent_backward_fake(*arguments: Any) -> list[Tensor]:
    a, wanted, keep = split_backward(arguments)
    layer = _check_backward(a)
    grads = allocate_gradients(a.input, a.h0, a.c0, a.weights, wanted)
    if keep:
        grads.append(_allocate_hidden(a, layer))
    return [grad for grad in grads if grad is not None]


def _run_backward(run: Callable[..., None], keeps: bool, *arguments: Any) -> list[Tensor]:
    """Checks, allocates, has run(layer, mode, grad_output, ..., saved, grad_clip, truncate, grads) fill the
    gradients; if it `keeps`, with that of h at every step, or None, as the last argument."""
    a, wanted, keep = split_backward(arguments)
    layer = _check_backward(a)
    if keep and not keeps:
        raise RuntimeError(
            problem(f"keep=True on {a.input.device.type}", "keep=True on the CPU's kernels", "keep=False")
        )
    if a.batch_sizes is not None:
        check_batch_sizes(a.batch_sizes, layer)
    grads = allocate_gradients(a.input, a.h0, a.c0, a.weights, wanted)
    # As the forward pass made them, unless a hook on saved tensors laid them out anew.
    output = a.output if a.output.stride(-1) == 1 else a.output.contiguous()
    sequence = (_dense(a.batch_sizes), a.lengths, _dense(a.resets))
    states = (_dense(a.h0), _dense(a.c0))
    bounds = (a.grad_clip, a.truncate)
    grads_of_states = (a.grad_output, _dense(a.grad_h_n), _dense(a.grad_c_n))
    weights = [weight.contiguous() for weight in a.weights]
    grad_hidden = _allocate_hidden(a, layer) if keep else None
    run(
        layer,
        a.mode,
        *grads_of_states,
        a.input,
        *sequence,
        *states,
        weights,
        output,
        a.saved.contiguous(),
        *bounds,
        grads,
        *((grad_hidden,) if keeps else ()),
    )
    return [grad for grad in (*grads, grad_hidden) if grad is not None]


# --------------------------------------------------------------------------------------------- registration


OPERATORS = ("recurrent", "recurrent_cell", "recurrent_backward")


class Kernels(NamedTuple):
    """The three operators on one device.

    plan(layer, dtype, device, packed, one_step, backward), for fastseq.explain: what such a call runs, as
    data; the name of the engine under "engine", which says what the rest means (see plan_words.ENGINES).
    keeps: whether recurrent_backward has `keep`, and dual_ops may read what `recurrent` saved.
    """

    recurrent: Callable[..., Any]
    recurrent_cell: Callable[..., Any]
    recurrent_backward: Callable[..., Any]
    plan: Callable[..., dict[str, Any]] | None = None
    keeps: bool = False


def loop_kernels(engine: loops.Engine) -> Kernels:
    """The operators where time loops run on `engine`."""
    return Kernels(
        partial(_run_layer, partial(loops.forward, engine)),
        partial(_run_cell, partial(loops.cell, engine)),
        partial(_run_backward, partial(loops.backward, engine), False),
        partial(loops.plan_in_data, engine),
    )


KERNELS = {
    "cpu": Kernels(
        partial(_run_layer, cpu.layer_forward),
        partial(_run_cell, cpu.cell_forward),
        partial(_run_backward, cpu.backward, True),
        cpu.plan_in_data,
        keeps=True,
    )
}
if _C.cuda_info()["built"]:
    KERNELS["cuda"] = loop_kernels(loops.CUDA)

_FAKES = (_recurrent_fake, _recurrent_cell_fake, _recurrent_backward_fake)
_DISPATCHED = Kernels(
    *(
        register(name, implementations(KERNELS, name), fake, unsupported)
        for name, fake in zip(OPERATORS, _FAKES, strict=True)
    )
)


def _kernels(*tensors: Tensor | None) -> Any:
    """The operators of the tensors' device, or those that ask the dispatcher first."""
    return KERNELS.get(plain_device(*tensors), _DISPATCHED) if nobody_listens() else _DISPATCHED


def recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.fastseq.recurrent, without the dispatcher where possible: see recurrent_cell."""
    # batch_sizes is on the CPU wherever the rest is, lengths anywhere.
    kernels = _kernels(input, resets, h0, c0, *weights)
    return kernels.recurrent(input, batch_sizes, lengths, resets, h0, c0, weights, *options)


def recurrent_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    saved: Tensor,
    *options: Any,
) -> list[Tensor]:
    """torch.ops.fastseq.recurrent_backward, without the dispatcher where possible: see recurrent_cell."""
    kernels = _kernels(grad_output, grad_h_n, grad_c_n, input, resets, h0, c0, *weights, output, saved)
    tensors = (grad_output, grad_h_n, grad_c_n, input, batch_sizes, lengths, resets, h0, c0)
    return kernels.recurrent_backward(*tensors, weights, output, saved, *options)
