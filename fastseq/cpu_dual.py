"""The operators of dual_ops.py on the CPU: one call of the compiled module for numbers and tangents.

A plane is what belongs to the numbers, or to their tangents; dual_ops.py says what is in one, and has checked
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, cpu
from .addresses import address, strides
from .checks import Layer
from .cpu import _problem, _state_addresses, _weight_addresses
from .lengths import Packing, _of_rows, packing


def plan_in_data(
    layer: Layer, dtype: torch.dtype, device: torch.device, packed: bool, of_weights: bool, backward: bool
) -> dict[str, Any]:
    """What the CPU's engine does with a call; see dual_ops.Kernels.plan."""
    return cpu.plan_in_data(layer, dtype, device, packed, False, backward, 2)


def forward(layer: Layer, sequences: Any, planes: Sequence[Any], truncate: int, known: bool = False) -> None:
    """known: the numbers' output and saved are there, and read."""
    batch_sizes, lengths, resets = sequences
    p = None if lengths is None else packing(lengths, layer.steps)
    if p is not None:
        _padded_forward(p, layer, sequences, planes, truncate, known)
        return
    input = planes[0][0].input
    addresses: list[Any] = []
    for (of_plane, h0, c0, weights), (output, h_n, c_n, saved) in planes:
        states = _state_addresses((h0, c0, h_n, c_n, saved), layer.directions)
        rows = zip(_weight_addresses(weights, layer), states, strict=True)
        addresses += [address(of_plane), *strides(of_plane), output.data_ptr(), *strides(output, 2)]
        addresses.append(tuple([(*w, *s) for w, s in rows]))
    _C.recurrent_dual_forward(
        *_problem(layer, input, batch_sizes, resets), False, False, truncate, known, *addresses
    )


def backward(
    layer: Layer,
    sequences: Any,
    planes: Sequence[Any],
    grad_clip: float | None,
    truncate: int,
    grad_hidden: Tensor | None,
) -> None:
    batch_sizes, lengths, resets = sequences
    p = None if lengths is None else packing(lengths, layer.steps)
    if p is not None:
        _padded_backward(p, layer, sequences, planes, grad_clip, truncate, grad_hidden)
        return
    input = planes[0][1].input
    addresses: list[Any] = []
    for (grad_output, grad_h_n, grad_c_n), (of_plane, h0, c0, weights), (output, saved), grads in planes:
        grad_input, grad_h0, grad_c0, *grad_weights = grads
        states = _state_addresses((h0, c0, None, None, saved, grad_h_n, grad_c_n), layer.directions)
        rows = zip(
            _weight_addresses(weights, layer),
            states,
            _weight_addresses(grad_weights, layer),
            _state_addresses((grad_h0, grad_c0, grad_hidden), layer.directions),
            strict=True,
        )
        for tensor, count in ((of_plane, 3), (output, 2), (grad_output, 3), (grad_input, 2)):
            addresses += [address(tensor), *strides(tensor, count)]
        addresses.append(tuple([(*w, *s, *grad_w, *grad_s) for w, s, grad_w, grad_s in rows]))
    bound = -1.0 if grad_clip is None else grad_clip
    known = grad_hidden is not None
    _C.recurrent_dual_backward(
        *_problem(layer, input, batch_sizes, resets), bound, truncate, known, *addresses
    )


# Rows of unequal lengths run as a packed sequence; see lengths.py.


def _packed(p: Packing, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else p.packed(tensor)


def _packed_arguments(p: Packing, arguments: Any) -> Any:
    return arguments._replace(
        input=_packed(p, arguments.input), h0=p.of_state(arguments.h0), c0=p.of_state(arguments.c0)
    )


def _packed_sequences(p: Packing, sequences: Any) -> Any:
    return sequences._replace(batch_sizes=p.batch_sizes, lengths=None, resets=_packed(p, sequences.resets))


def _put_states(p: Packing, to: Tensor, of_others: Tensor | None, packed: Tensor) -> None:
    """Fills (D, B, size); rows without a step have the states that they began with."""
    to.zero_() if of_others is None else to.copy_(of_others)
    to.index_copy_(1, p.order, packed)


def _padded_forward(
    p: Packing, layer: Layer, sequences: Any, planes: Sequence[Any], truncate: int, known: bool
) -> None:
    packed = []
    for i, (arguments, (output, h_n, c_n, saved)) in enumerate(planes):
        is_read = known and i == 0
        if not is_read:
            p.clear_rest(saved)
        of_c = p.of_state(c_n) if layer.cell.cell_state else c_n
        to = p.packed(output) if is_read else output.new_empty((p.size, output.shape[2]))
        packed.append((_packed_arguments(p, arguments), (to, p.of_state(h_n), of_c, saved)))
    forward(_of_rows(layer, p), _packed_sequences(p, sequences), packed, truncate, known)
    for (arguments, (output, h_n, c_n, _)), (_, made) in list(zip(planes, packed, strict=True))[known:]:
        p.pad(made[0], output)
        _put_states(p, h_n, arguments.h0, made[1])
        if layer.cell.cell_state:
            _put_states(p, c_n, arguments.c0, made[2])


def _padded_backward(
    p: Packing,
    layer: Layer,
    sequences: Any,
    planes: Sequence[Any],
    grad_clip: float | None,
    truncate: int,
    grad_hidden: Tensor | None,
) -> None:
    packed = []
    for cotangents, arguments, results, (grad_input, grad_h0, grad_c0, *grad_weights) in planes:
        of_input = None if grad_input is None else grad_input.new_empty((p.size, grad_input.shape[2]))
        packed.append(
            (
                cotangents._replace(
                    output=_packed(p, cotangents.output),
                    h_n=p.of_state(cotangents.h_n),
                    c_n=p.of_state(cotangents.c_n),
                ),
                _packed_arguments(p, arguments),
                results._replace(output=p.packed(results.output)),
                [of_input, p.of_state(grad_h0), p.of_state(grad_c0), *grad_weights],
            )
        )
    sequences = _packed_sequences(p, sequences)
    backward(_of_rows(layer, p), sequences, packed, grad_clip, truncate, grad_hidden)
    for (cotangents, _, _, grads), (*_, made) in zip(planes, packed, strict=True):
        if grads[0] is not None:
            p.pad(made[0], grads[0])
        for to, of_last, from_packed in (
            (grads[1], cotangents.h_n, made[1]),
            (grads[2], cotangents.c_n, made[2]),
        ):
            if to is not None:
                _put_states(p, to, of_last, from_packed)
