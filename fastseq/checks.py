"""What an operator accepts: shapes, dtypes and devices, checked before any address reaches the kernels.

Everything in this file but check_batch_sizes, which reads values, works on fake tensors too, so that
torch.compile reports the same errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from . import _C


class Cell(NamedTuple):
    """A recurrent cell as the kernels know it."""

    code: int
    gates: int  # G, the blocks of hidden_size rows in weight_ih and weight_hh
    saved: int  # values per hidden unit and step that the backward pass needs beside the output
    cell_state: bool  # whether there is a cell state c beside the hidden state h


CELLS = {mode: Cell(**cell) for mode, cell in _C.CELLS.items()}
DTYPES = {getattr(torch, name): code for name, code in _C.DTYPES.items()}
WEIGHT_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
WEIGHT_SHAPES = (
    "(gates * hidden_size, input_size)",
    "(gates * hidden_size, recurrent size)",
    "(gates * hidden_size,)",
    "(gates * hidden_size,)",
    "(proj_size, hidden_size)",
)


class Layer(NamedTuple):
    """The sizes of one recurrent layer, or of one step of a cell."""

    cell: Cell
    directions: int  # D
    steps: int  # T
    batch: int  # B
    rows: int  # T * B, or the rows of a packed sequence
    input_size: int  # I
    hidden_size: int  # H
    width: int  # R: proj_size if there is a projection, else hidden_size
    bias: bool
    projected: bool
    reverse: bool = False  # whether the only direction runs from the last step to the first

    @property
    def mode(self) -> str:
        return next(mode for mode, cell in CELLS.items() if cell == self.cell)


def problem(given: str, accepted: str, remedy: str) -> str:
    """The three lines of every error message."""
    return f"given: {given}\naccepted: {accepted}\ntry: {remedy}"


def require_tensor(name: str, given: object, error: type[Exception] = TypeError) -> None:
    if not isinstance(given, Tensor):
        remedy = f"torch.as_tensor({name})"
        if given is None or isinstance(given, (tuple, str)):
            remedy = f"check what {name} is"
        raise error(problem(f"{name} of type {type(given).__name__}", "a torch.Tensor", remedy))


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str, input: Tensor) -> None:
    """Raises RuntimeError unless `tensor` has this shape and the dtype and device of `input`."""
    if tensor.shape == shape and tensor.dtype is input.dtype and tensor.device == input.device:
        return
    if tensor.shape != shape:
        raise RuntimeError(
            problem(
                f"{name} of shape {tuple(tensor.shape)}",
                f"shape {tuple(shape)}, that is {meaning}",
                f"check the sizes, and the order of the dimensions, of {name}",
            )
        )
    if tensor.dtype != input.dtype:
        raise RuntimeError(
            problem(
                f"{name} of dtype {tensor.dtype} beside an input of dtype {input.dtype}",
                "one dtype for the input, the states and the weights",
                f"{name}.to({input.dtype})",
            )
        )
    if tensor.device != input.device:
        raise RuntimeError(
            problem(
                f"{name} on device {tensor.device} beside an input on device {input.device}",
                "one device for the input, the states and the weights",
                f"{name}.to({str(input.device)!r}), or move the module",
            )
        )


def check_layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    bias: bool,
    one_step: bool = False,
) -> Layer:
    """Checks all that one layer is given and returns its sizes; `one_step` is a cell with input (B, I)."""
    if mode not in CELLS or directions not in (1, 2, -1):
        raise RuntimeError(
            problem(
                f"mode {mode!r}, directions {directions}",
                f"a mode of {list(CELLS)}; 1 or 2 directions, or -1 for the backward one alone",
                "one of these",
            )
        )
    reverse, directions = directions < 0, abs(directions)
    cell = CELLS[mode]
    if input.dtype not in DTYPES:
        raise RuntimeError(
            problem(
                f"input of dtype {input.dtype}",
                ", ".join(str(dtype) for dtype in DTYPES),
                "input.float(), with a module of the same dtype",
            )
        )
    count, left_over = divmod(len(weights), directions)
    projected = count == 3 + 2 * bias
    if left_over or not (count == 2 + 2 * bias or (projected and cell.cell_state)):
        raise RuntimeError(
            problem(
                f"weights with {len(weights)} tensors for {directions} direction(s), bias={bias}, {mode}",
                "weight_ih, weight_hh, then bias_ih, bias_hh if any, then weight_hr of a projected LSTM",
                "pass the weights of each direction in this order, as in module.all_weights",
            )
        )

    rank = 2 if one_step or batch_sizes is not None else 3
    if input.dim() != rank:
        raise RuntimeError(
            problem(
                f"input with {input.dim()} dimensions",
                f"{rank} dimensions",
                "input.unsqueeze(...) or input.flatten(...)",
            )
        )
    for i in (0, 1):
        try:  # isinstance takes as long as all else, of parameters
            dim = weights[i].dim()
        except AttributeError:
            require_tensor(WEIGHT_NAMES[i], weights[i])
            raise
        if dim != 2:
            raise RuntimeError(
                problem(f"{WEIGHT_NAMES[i]} with {dim} dimensions", "2 dimensions", "a matrix")
            )
    hidden, input_size = weights[1].shape[0] // cell.gates, weights[0].shape[1]
    width = weights[count - 1].shape[0] if projected else hidden
    if hidden < 1 or width < 1:
        raise RuntimeError(
            problem(
                f"weights for hidden_size {hidden} and recurrent size {width}",
                "sizes of at least 1",
                "larger weights",
            )
        )
    if input.shape[-1] != input_size:
        raise RuntimeError(
            problem(
                f"input of shape {tuple(input.shape)}, with {input.shape[-1]} features",
                f"{input_size} features in the last dimension, the input_size of the weights",
                f"an input of shape (..., {input_size}), or input_size={input.shape[-1]}",
            )
        )
    _check_weights(input, weights, count, cell.gates, hidden, width, bias)

    if batch_sizes is not None:
        steps, batch, rows = _packed_sizes(input, batch_sizes, h0)
    elif one_step:
        steps, batch, rows = 1, input.shape[0], input.shape[0]
    else:
        steps, batch, rows = input.shape[0], input.shape[1], input.shape[0] * input.shape[1]
    lead = () if one_step else (directions,)
    meaning = "(batch, size)" if one_step else "(directions, batch, size)"
    if h0 is not None:
        check_like("hx[0]" if cell.cell_state else "hx", h0, (*lead, batch, width), meaning, input)
    if c0 is not None:
        if not cell.cell_state:
            raise RuntimeError(problem(f"c0 for {mode}", "a cell state with LSTM only", "c0=None"))
        check_like("hx[1]", c0, (*lead, batch, hidden), meaning, input)
    return Layer(cell, directions, steps, batch, rows, input_size, hidden, width, bias, projected, reverse)


def _check_weights(
    input: Tensor, weights: Sequence[Tensor], count: int, gates: int, hidden: int, width: int, bias: bool
) -> None:
    rows, dtype, device = gates * hidden, input.dtype, input.device
    shapes: list[tuple[int, ...]] = [(rows, input.shape[-1]), (rows, width)]
    if bias:
        shapes += [(rows,), (rows,)]
    if len(shapes) < count:
        shapes.append((width, hidden))
    for i, weight in enumerate(weights):
        shape = shapes[i % count]
        try:
            if weight.shape == shape and weight.dtype is dtype and weight.device == device:
                continue
        except AttributeError:
            pass
        kind = i % count if bias or i % count < 2 else 4  # without biases the third one is weight_hr
        name = WEIGHT_NAMES[kind] if i < count else WEIGHT_NAMES[kind] + "_reverse"
        require_tensor(name, weight)
        check_like(name, weight, shape, WEIGHT_SHAPES[kind], input)


def _packed_sizes(input: Tensor, batch_sizes: Tensor, h0: Tensor | None) -> tuple[int, int, int]:
    """Steps, batch and rows of a packed sequence."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or h0 is None or h0.dim() != 3:
        raise RuntimeError(
            problem(
                f"batch_sizes of dtype {batch_sizes.dtype} with {batch_sizes.dim()} dimension(s)",
                "batch_sizes of dtype torch.int64 with 1 dimension, and an initial state",
                "torch.nn.utils.rnn.pack_padded_sequence(...).batch_sizes",
            )
        )
    if batch_sizes.shape[0] == 0:
        raise RuntimeError(no_batch_sizes())
    return batch_sizes.shape[0], h0.shape[1], input.shape[0]


def no_batch_sizes() -> str:
    return problem("batch_sizes of length 0", "one size for each step, at least one", "pack_padded_sequence")


def batch_sizes_elsewhere(batch_sizes: Tensor) -> str:
    return problem(
        f"batch_sizes on device {batch_sizes.device}", "batch_sizes on the CPU", "batch_sizes.cpu()"
    )


def check_batch_sizes(batch_sizes: Tensor, layer: Layer) -> None:
    """Raises RuntimeError if the values of batch_sizes would lead the kernels out of bounds.

    Every kernel that is about to run asks this, of subclasses of Tensor too; fake implementations, which
    read nothing, do not.
    """
    if not batch_sizes.is_cpu:
        raise RuntimeError(batch_sizes_elsewhere(batch_sizes))
    with torch._C.DisableTorchFunctionSubclass():
        sizes = batch_sizes.tolist()
    decreasing = all(a >= b for a, b in pairwise(sizes))
    if sizes[0] != layer.batch or sizes[-1] < 0 or sum(sizes) != layer.rows or not decreasing:
        raise RuntimeError(
            problem(
                f"batch_sizes that start with {sizes[0]} and add up to {sum(sizes)}, "
                f"for {layer.rows} rows of input and a state of batch {layer.batch}",
                "batch_sizes that never increase, start with the batch and add up to the rows",
                "torch.nn.utils.rnn.pack_padded_sequence, which returns both",
            )
        )


def check_rows(
    input: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, layer: Layer
) -> None:
    """Raises RuntimeError for lengths other than (B), resets other than (T, B) or packed (rows)."""
    if lengths is not None:
        if batch_sizes is not None:
            raise RuntimeError(
                problem(
                    "lengths of a packed sequence",
                    "one of both: lengths for a padded input, or batch_sizes for a packed one",
                    "lengths=None, or pad_packed_sequence",
                )
            )
        if lengths.is_meta and not input.is_meta:
            raise RuntimeError(
                problem(
                    f"lengths on device meta beside an input on device {input.device}",
                    "lengths that have values, on any device",
                    "torch.tensor([...], device='cpu')",
                )
            )
        if lengths.shape != (layer.batch,) or lengths.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(
                problem(
                    f"lengths of shape {tuple(lengths.shape)} and dtype {lengths.dtype}",
                    f"shape ({layer.batch},), one for each row of the batch, of torch.int64 or torch.int32",
                    "lengths.long(), one for each row",
                )
            )
    if resets is not None:
        shape = (layer.steps, layer.batch) if batch_sizes is None else (layer.rows,)
        if resets.shape != shape or resets.dtype != torch.bool:
            meaning = "(steps, batch), whatever batch_first is" if batch_sizes is None else "(rows,)"
            raise RuntimeError(
                problem(
                    f"resets of shape {tuple(resets.shape)} and dtype {resets.dtype}",
                    f"shape {shape}, that is {meaning}, of torch.bool",
                    "resets.t() of one that is (batch, steps); resets.bool()",
                )
            )
        if resets.device != input.device:
            raise RuntimeError(
                problem(
                    f"resets on device {resets.device} beside an input on device {input.device}",
                    "the input's device",
                    f"resets.to({str(input.device)!r})",
                )
            )


def check_lengths(lengths: Sequence[int], steps: int) -> None:
    """Raises RuntimeError unless all are in 0..steps. Asked where the values are at hand."""
    if lengths and not 0 <= min(lengths) <= max(lengths) <= steps:
        raise RuntimeError(
            problem(
                f"lengths from {min(lengths)} to {max(lengths)} for an input of {steps} steps",
                f"lengths from 0 to {steps}",
                f"lengths.clamp(0, {steps}), or a longer input",
            )
        )


def check_bounds(grad_clip: float | None, truncate: int, least: int = 0) -> None:
    """Raises RuntimeError unless gradients can be bounded by the one, and cut every so many steps; 0 is for
    never, which those who say None for it do not mean: least is 1 then."""
    if grad_clip is not None and not grad_clip >= 0:
        raise RuntimeError(
            problem(f"grad_clip={grad_clip}", "a number of at least 0, or None", "grad_clip=1.0, or None")
        )
    if truncate < least:
        raise RuntimeError(
            problem(f"truncate={truncate}", "a number of steps, at least 1, or None", "truncate=64, or None")
        )


def places_of(arguments: Sequence[object]) -> tuple[list[str], int]:
    """Devices with layouts of all tensors in an operator's arguments, in words, and how many devices."""
    tensors = [
        t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)
    ]
    return sorted({f"{t.device.type} ({t.layout})" for t in tensors}), len({t.device for t in tensors})


def tensors_with_kernels() -> str:
    cuda = _C.cuda_info()
    on_gpu = " or on a CUDA GPU" if cuda["built"] else f"; CUDA kernels are not built: {cuda['reason']}"
    return f"dense tensors on the CPU{on_gpu}"


def unsupported(op: str, arguments: Sequence[object]) -> NoReturn:
    """Raises for tensors on a device (or of a layout) for which there is no kernel."""
    where, devices = places_of(arguments)
    if devices > 1:
        raise RuntimeError(
            problem(
                f"input, hx and weights on different devices: {', '.join(where)}",
                "one device for the input, the states and the weights",
                "module.to(input.device)",
            )
        )
    raise NotImplementedError(
        problem(
            f"input and weights on {', '.join(where)}, where {op} has no kernel",
            tensors_with_kernels(),
            "input.cpu() and module.cpu(), or .to_dense(); fastseq.show_config() says what is built",
        )
    )
