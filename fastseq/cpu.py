"""The operators on the CPU: one call of the compiled module for a layer, a step, or their gradients.

What the arguments are, ops.py says, which has checked them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C
from .addresses import address, strides
from .checks import DTYPES, Layer
from .lengths import padded_backward, padded_forward


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


def _problem(
    layer: Layer, input: Tensor, batch_sizes: Tensor | None, resets: Tensor | None
) -> tuple[int, ...]:
    """What every call of the kernels begins with."""
    return (
        layer.cell.code,
        DTYPES[input.dtype],
        torch.get_num_threads(),
        layer.steps,
        layer.batch,
        address(batch_sizes),
        layer.input_size,
        layer.hidden_size,
        layer.width if layer.projected else 0,
        layer.reverse,
        address(resets),
    )


def layer_forward(
    layer, mode, input, batch_sizes, lengths, resets, h0, c0, weights, save, output, h_n, c_n, saved
) -> None:
    if lengths is not None:
        padded_forward(
            layer_forward,
            layer,
            mode,
            input,
            lengths,
            resets,
            h0,
            c0,
            weights,
            save,
            output,
            h_n,
            c_n,
            saved,
        )
        return
    states = _state_addresses((h0, c0, h_n, c_n, saved), layer.directions)
    _C.recurrent_forward(
        *_problem(layer, input, batch_sizes, resets),
        False,
        save == "states",
        input.data_ptr(),
        *strides(input),
        output.data_ptr(),
        *strides(output, 2),
        tuple([(*w, *s) for w, s in zip(_weight_addresses(weights, layer), states, strict=True)]),
    )


def cell_forward(layer, _, input, h0, c0, weights, h, c, saved) -> None:
    row, feature = input.stride()
    (weight_addresses,) = _weight_addresses(weights, layer)
    _C.recurrent_forward(
        *_problem(layer, input, None, None),
        True,
        False,
        input.data_ptr(),
        0,
        row,
        feature,
        h.data_ptr(),
        0,
        layer.hidden_size,
        ((*weight_addresses, address(h0), address(c0), 0, address(c), address(saved)),),
    )


def backward(
    layer,
    mode,
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    batch_sizes,
    lengths,
    resets,
    h0,
    c0,
    weights,
    output,
    saved,
    grad_clip,
    truncate,
    grads,
    grad_hidden=None,
) -> None:
    if lengths is not None:
        padded_backward(
            backward,
            layer,
            mode,
            grad_output,
            grad_h_n,
            grad_c_n,
            input,
            lengths,
            resets,
            h0,
            c0,
            weights,
            output,
            saved,
            grad_clip,
            truncate,
            grads,
            grad_hidden,
        )
        return
    grad_input, grad_h0, grad_c0, *grad_weights = grads
    rows = zip(
        _weight_addresses(weights, layer),
        _state_addresses((h0, c0, None, None, saved, grad_h_n, grad_c_n), layer.directions),
        _weight_addresses(grad_weights, layer),
        _state_addresses((grad_h0, grad_c0, grad_hidden), layer.directions),
        strict=True,
    )
    _C.recurrent_backward(
        *_problem(layer, input, batch_sizes, resets),
        -1.0 if grad_clip is None else grad_clip,
        truncate,
        input.data_ptr(),
        *strides(input),
        output.data_ptr(),
        *strides(output, 2),
        address(grad_output),
        *strides(grad_output),
        address(grad_input),
        *strides(grad_input, 2),
        tuple([(*w, *states, *grad_w, *grad_states) for w, states, grad_w, grad_states in rows]),
    )


def plan_in_data(
    layer: Layer,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    one_step: bool,
    backward: bool,
    planes: int = 1,
) -> dict[str, Any]:
    """What the CPU's engine does with a call, see ops.Kernels.plan; planes: 2 with tangents."""

    def cut(threads: int) -> dict[str, Any]:
        return _C.recurrent_plan(
            layer.cell.code,
            DTYPES[dtype],
            threads,
            layer.steps,
            layer.batch,
            layer.input_size,
            layer.hidden_size,
            layer.width if layer.projected else 0,
            layer.directions,
            backward,
            planes,
        )

    # The backward pass packs its weights even for one step, and so does what has tangents.
    kernel = "sequence" if backward or layer.steps != 1 or planes > 1 else "cell" if one_step else "step"
    threads = _C.available_threads(torch.get_num_threads())
    return {
        "engine": "cpu",
        "kernel": kernel,
        "partition": cut(threads),
        "available_threads": threads,
        "threads_on_all_cpus": cut(len(os.sched_getaffinity(0)))["threads"],
    }
