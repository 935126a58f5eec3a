"""The operators torch.ops.fastseq.*, which are the only callers of the kernels.

    recurrent            one layer with all its directions, over a whole sequence
    recurrent_cell       one step of one direction
    recurrent_backward   the gradients of either

Each operator checks its arguments, allocates its results and passes addresses, sizes and strides on. The fake
implementations (torch.compile, torch.export, meta tensors) share the checks and the allocation with the real
ones, and so return the same shapes and strides. None of the operators is differentiable: see
fastseq.autograd. The arguments' types are those of the schemas.

T steps, B batch, I input_size, H hidden_size, R recurrent size (proj_size or H), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _C
from .checks import CELLS, DTYPES, Layer, check_batch_sizes, check_layer, check_like, problem, unsupported

_library = torch.library.Library("fastseq", "DEF")
# weights: for each direction weight_ih, weight_hh, then bias_ih, bias_hh if `bias`, then weight_hr of a
# projected LSTM. output is (T, B, D*R), in memory (B, T, D*R) if batch_first. c_n and saved are empty if
# there are none.
_library.define(
    "recurrent(Tensor input, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, str mode, "
    "int directions, bool bias, bool batch_first, bool save) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)"
)
# Returns [h, c of an LSTM, saved if `save`].
_library.define(
    "recurrent_cell(Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, str mode, bool save) -> Tensor[]"
)
# For a cell input is (B, I) and batch_sizes None. `wanted` says for which of [input, h0, c0, *weights] to
# return a gradient.
_library.define(
    "recurrent_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor output, Tensor saved, str mode, "
    "int directions, bool bias, bool[] wanted) -> Tensor[]"
)


# ------------------------------------------------------------------------------------------------ addresses


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of step, row and feature; a packed sequence or a single step has none of its own for steps."""
    if tensor is None:
        return (0, 0, 0)
    return tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride())


def _state_addresses(tensors: Sequence[Tensor | None], directions: int) -> list[list[int]]:
    """For each direction, which come first in their shapes, the addresses in dense tensors; 0 if empty."""
    addresses = [[0 if t is None else t.data_ptr() for t in tensors]]
    if directions == 2:
        addresses.append([0 if t is None else t.data_ptr() + t.nbytes // 2 for t in tensors])
    return addresses


def _weight_addresses(weights: Sequence[Tensor | None], layer: Layer) -> list[list[int]]:
    """For each direction the addresses of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, or 0."""
    flat = [0 if weight is None else weight.data_ptr() for weight in weights]
    count = len(flat) // layer.directions
    addresses = []
    for start in range(0, len(flat), count):
        a = flat[start : start + count]
        if not layer.bias:
            a[2:2] = (0, 0)
        if not layer.projected:
            a.append(0)
        addresses.append(a)
    return addresses


# ------------------------------------------------------------------------------------------------ one layer


def _allocate_layer(
    input: Tensor, layer: Layer, batch_first: bool, save: bool
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
    if save and cell.saved:
        saved = input.new_empty((directions, layer.rows, cell.saved, hidden))
    else:
        saved = input.new_empty(0) if cell.cell_state else torch.empty_like(c_n)
    return output, h_n, c_n, saved


def _recurrent_fake(
    input, batch_sizes, h0, c0, weights, mode, directions, bias, batch_first, save
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = check_layer(input, batch_sizes, h0, c0, weights, mode, directions, bias)
    return _allocate_layer(input, layer, batch_first, save)


def _recurrent(
    input, batch_sizes, h0, c0, weights, mode, directions, bias, batch_first, save
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = check_layer(input, batch_sizes, h0, c0, weights, mode, directions, bias)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, layer)
    output, h_n, c_n, saved = _allocate_layer(input, layer, batch_first, save)
    batch_sizes, h0, c0 = _dense(batch_sizes), _dense(h0), _dense(c0)
    weights = [weight.contiguous() for weight in weights]
    states = _state_addresses((h0, c0, h_n, c_n, saved), directions)
    _C.recurrent_forward(
        layer.cell.code,
        DTYPES[input.dtype],
        torch.get_num_threads(),
        layer.steps,
        layer.batch,
        _address(batch_sizes),
        layer.input_size,
        layer.hidden_size,
        layer.width if layer.projected else 0,
        False,
        input.data_ptr(),
        *_strides(input),
        output.data_ptr(),
        *_strides(output)[:2],
        tuple([(*w, *s) for w, s in zip(_weight_addresses(weights, layer), states, strict=True)]),
    )
    return output, h_n, c_n, saved


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


def _recurrent_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save) -> list[Tensor]:
    _check_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode)
    weight_ih, weight_hh = weight_ih.contiguous(), weight_hh.contiguous()
    bias_ih, bias_hh, h0, c0 = _dense(bias_ih), _dense(bias_hh), _dense(h0), _dense(c0)
    return _step(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save)


def _allocate_step(input: Tensor, batch: int, hidden: int, mode: str, save: bool) -> list[Tensor]:
    cell = CELLS[mode]
    results = [input.new_empty((batch, hidden))]
    if cell.cell_state:
        results.append(torch.empty_like(results[0]))
    if save:
        results.append(input.new_empty((batch, cell.saved, hidden) if cell.saved else (0,)))
    return results


def _step(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save) -> list[Tensor]:
    """One step with arguments that are checked and, but for the input, dense."""
    code, _, slots, cell_state = CELLS[mode]
    batch, input_size = input.shape
    hidden = weight_hh.shape[1]
    results = _allocate_step(input, batch, hidden, mode, save)
    row, feature = input.stride()
    _C.recurrent_forward(
        code,
        DTYPES[input.dtype],
        torch.get_num_threads(),
        1,
        batch,
        0,
        input_size,
        hidden,
        0,
        True,
        input.data_ptr(),
        0,
        row,
        feature,
        results[0].data_ptr(),
        0,
        hidden,
        (
            (
                weight_ih.data_ptr(),
                weight_hh.data_ptr(),
                0 if bias_ih is None else bias_ih.data_ptr(),
                0 if bias_hh is None else bias_hh.data_ptr(),
                0,
                0 if h0 is None else h0.data_ptr(),
                0 if c0 is None else c0.data_ptr(),
                0,
                results[1].data_ptr() if cell_state else 0,
                results[-1].data_ptr() if save and slots else 0,
            ),
        ),
    )
    return results


_PLAIN = {Tensor, torch.nn.Parameter}


def _nobody_listens() -> bool:
    """Whether the dispatcher could only find a kernel: nothing compiles, traces, transforms or profiles."""
    return not (
        is_compiling()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _plain(*tensors: Tensor | None) -> bool:
    """Whether all are dense tensors on the CPU as they come, so that the CPU kernel is the one to call."""
    plain, strided = _PLAIN, torch.strided
    for t in tensors:
        if t is not None and not (type(t) in plain and t.is_cpu and t.layout is strided and not t.is_neg()):
            return False
    return True


# Whether the compiled module reads this torch's tensors itself.
_READS_TENSORS = _C.use_tensors(Tensor, torch.nn.Parameter)


def recurrent_cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mode, save) -> list[Tensor]:
    """torch.ops.fastseq.recurrent_cell, but without the dispatcher where that could only find the CPU kernel.

    Dispatching takes longer than a small step does. So where nobody listens, the compiled module looks at the
    tensors; whatever is unusual or wrong it leaves to the operator.
    """
    tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    if not _nobody_listens():
        return torch.ops.fastseq.recurrent_cell.default(*tensors, mode, save)
    if _READS_TENSORS and input.dim() == weight_hh.dim() == 2:
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
    plain = _plain(*tensors)
    return (_recurrent_cell if plain else torch.ops.fastseq.recurrent_cell.default)(*tensors, mode, save)


# ------------------------------------------------------------------------------------------------ gradients


def _check_backward(
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    batch_sizes,
    h0,
    c0,
    weights,
    output,
    saved,
    mode,
    directions,
    bias,
) -> Layer:
    one_step = batch_sizes is None and input.dim() == 2
    layer = check_layer(input, batch_sizes, h0, c0, weights, mode, directions, bias, one_step)
    lead = () if one_step else (directions,)
    shape = (*input.shape[:-1], directions * layer.width)
    check_like("output", output, shape, "that of the forward pass", input)
    slots, rows, hidden = layer.cell.saved, layer.rows, layer.hidden_size
    check_like(
        "saved", saved, (*lead, rows, slots, hidden) if slots else (0,), "that of the forward pass", input
    )
    for name, grad, like in (
        ("grad_output", grad_output, shape),
        ("grad_h_n", grad_h_n, (*lead, layer.batch, layer.width)),
        ("grad_c_n", grad_c_n, (*lead, layer.batch, hidden)),
    ):
        if grad is not None:
            check_like(name, grad, like, "that of the forward pass", input)
    return layer


def _allocate_gradients(
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


def _recurrent_backward_fake(
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    batch_sizes,
    h0,
    c0,
    weights,
    output,
    saved,
    mode,
    directions,
    bias,
    wanted,
) -> list[Tensor]:
    _check_backward(
        grad_output,
        grad_h_n,
        grad_c_n,
        input,
        batch_sizes,
        h0,
        c0,
        weights,
        output,
        saved,
        mode,
        directions,
        bias,
    )
    return [grad for grad in _allocate_gradients(input, h0, c0, weights, wanted) if grad is not None]


def _recurrent_backward(
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    batch_sizes,
    h0,
    c0,
    weights,
    output,
    saved,
    mode,
    directions,
    bias,
    wanted,
) -> list[Tensor]:
    layer = _check_backward(
        grad_output,
        grad_h_n,
        grad_c_n,
        input,
        batch_sizes,
        h0,
        c0,
        weights,
        output,
        saved,
        mode,
        directions,
        bias,
    )
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, layer)
    grads = _allocate_gradients(input, h0, c0, weights, wanted)
    grad_input, grad_h0, grad_c0, *grad_weights = grads
    batch_sizes, h0, c0 = _dense(batch_sizes), _dense(h0), _dense(c0)
    grad_h_n, grad_c_n = _dense(grad_h_n), _dense(grad_c_n)
    # As the forward pass made them, unless a hook on saved tensors laid them out anew.
    saved, output = saved.contiguous(), output if output.stride(-1) == 1 else output.contiguous()
    weights = [weight.contiguous() for weight in weights]
    rows = zip(
        _weight_addresses(weights, layer),
        _state_addresses((h0, c0, None, None, saved, grad_h_n, grad_c_n), directions),
        _weight_addresses(grad_weights, layer),
        _state_addresses((grad_h0, grad_c0), directions),
        strict=True,
    )
    _C.recurrent_backward(
        layer.cell.code,
        DTYPES[input.dtype],
        torch.get_num_threads(),
        layer.steps,
        layer.batch,
        _address(batch_sizes),
        layer.input_size,
        layer.hidden_size,
        layer.width if layer.projected else 0,
        input.data_ptr(),
        *_strides(input),
        output.data_ptr(),
        *_strides(output)[:2],
        _address(grad_output),
        *_strides(grad_output),
        _address(grad_input),
        *_strides(grad_input)[:2],
        tuple([(*w, *states, *grad_w, *grad_states) for w, states, grad_w, grad_states in rows]),
    )
    return [grad for grad in grads if grad is not None]


# --------------------------------------------------------------------------------------------- registration


def _register(name: str, cpu, fake) -> None:
    _library.impl(name, cpu, "CPU")
    # Every other device and layout ends here, unless an engine registers for it.
    _library.impl(
        name, lambda *arguments: unsupported(f"fastseq.{name}", arguments), "CompositeExplicitAutograd"
    )
    torch.library.register_fake(f"fastseq::{name}", fake, lib=_library)


_register("recurrent", _recurrent, _recurrent_fake)
_register("recurrent_cell", _recurrent_cell, _recurrent_cell_fake)
_register("recurrent_backward", _recurrent_backward, _recurrent_backward_fake)


def recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.fastseq.recurrent, without the dispatcher where possible: see recurrent_cell."""
    tensors = (input, batch_sizes, h0, c0)
    plain = _nobody_listens() and _plain(*tensors, *weights)
    return (_recurrent if plain else torch.ops.fastseq.recurrent.default)(*tensors, weights, *options)


def recurrent_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    saved: Tensor,
    *options: Any,
) -> list[Tensor]:
    """torch.ops.fastseq.recurrent_backward, without the dispatcher where possible: see recurrent_cell."""
    tensors = (grad_output, grad_h_n, grad_c_n, input, batch_sizes, h0, c0)
    plain = _nobody_listens() and _plain(*tensors, *weights, output, saved)
    op = _recurrent_backward if plain else torch.ops.fastseq.recurrent_backward.default
    return op(*tensors, weights, output, saved, *options)
