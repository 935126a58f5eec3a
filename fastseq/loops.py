"""The operators on CUDA: the time loop is a persistent kernel, what lies around it torch's products.

    forward   pre = x W_ih^T + b_ih for all steps, then the loop
    backward  the loop, which makes the gradient of pre and of U h, then the products that give the gradients
              of input and weights

An Engine is a device that runs loops: the GPU, and in the tests the kernels' host twin, to which CPU tensors
are device memory. Nothing in here waits for the device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, precision, steps
from .addresses import addresses, strides
from .checks import DTYPES, Layer, problem
from .steps import Gradients


class Engine(NamedTuple):
    """Where loops run. Of a device index, `facts`: compute capability (two numbers), multiprocessors,
    bytes of shared memory of a block, bytes of L2, and, where it was asked, most blocks of a cluster and
    how many clusters of 2, 4, 8 and 16 blocks run at the same time; `stream`: the address of the current
    stream. `current` makes a device the current one for a while. device_type: of its memory, as DLPack
    counts."""

    module: Any
    facts: Callable[[int], tuple[int, ...]]
    stream: Callable[[int], int]
    current: Callable[[torch.device], AbstractContextManager[Any]] = lambda device: nullcontext()
    device_type: int = 1


@lru_cache
def _cuda_facts(index: int) -> tuple[int, ...]:
    facts = _C.cuda_device_facts(index)
    if facts[0] < 8:
        raise NotImplementedError(
            problem(
                f"cuda:{index}, a GPU of compute capability {facts[0]}.{facts[1]}",
                "compute capability 8.0 or later (A100, H100, ...)",
                "module.cpu() and input.cpu(), or torch.nn's module with the same state_dict",
            )
        )
    return facts


def _cuda_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)  # a small part of what torch.cuda.current_stream takes


CUDA = Engine(_C, _cuda_facts, _cuda_stream, torch.cuda.device, 2)


def _plainly(function: Callable[..., None]) -> Callable[..., None]:
    """Torch's operations within `function` record nothing, and take and give the dtypes that they see."""

    @wraps(function)
    def plain(engine: Engine, layer: Layer, *arguments: Any) -> None:
        device = next(x for x in arguments if isinstance(x, Tensor)).device
        with torch.no_grad(), engine.current(device):
            if not torch._C._is_any_autocast_enabled():
                return function(engine, layer, *arguments)
            with torch.autocast(device.type, enabled=False):
                return function(engine, layer, *arguments)

    return plain


# ------------------------------------------------------------------------------------------------------ plans


class Loop(NamedTuple):
    """What a plan is made for."""

    cell: int
    dtype: int
    tf32: bool
    steps: int
    batch: int
    hidden_size: int
    proj_size: int
    directions: int
    packed: bool
    backward: bool


@lru_cache(maxsize=1024)
def _plan(module: Any, loop: Loop, facts: tuple[int, ...], forced: str) -> Any:
    return module.loop_plan(*loop, facts, forced)


def _loop_of(layer: Layer, dtype: torch.dtype, of_rnn: str | None, packed: bool, backward: bool) -> Loop:
    proj_size = layer.width if layer.projected else 0
    return Loop(
        layer.cell.code,
        DTYPES[dtype],
        of_rnn == "tf32",
        layer.steps,
        layer.batch,
        layer.hidden_size,
        proj_size,
        layer.directions,
        packed,
        backward,
    )


def plan_of(engine: Engine, loop: Loop, device: torch.device, forced: str | None = None) -> Any:
    """The plan for a loop on a device; FASTSEQ_CUDA_PLAN=kernel[:blocks[xcolumns]][:exchange] forces one."""
    if forced is None:
        forced = os.environ.get("FASTSEQ_CUDA_PLAN", "")
    # Only what is done once a call, and the room for offsets of packed rows, goes by the steps: their next
    # power of two, so that sequences of many lengths have few plans.
    loop = loop._replace(steps=1 << (loop.steps - 1).bit_length())
    return _plan(engine.module, loop, engine.facts(device.index or 0), forced)


def plan_in_data(
    engine: Engine,
    layer: Layer,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    one_step: bool,
    backward: bool,
) -> dict[str, Any]:
    """What the engine does with a call, see ops.Kernels.plan. Beside the plan, those that each kernel would
    have if it were forced, and that there would be with other settings; None where nothing fits."""
    plan = {"engine": "loop", "facts": engine.facts(device.index or 0), "partition": {}}
    if layer.rows == 0:
        return plan | {"kernel": "none"}
    if one_step:
        fused = not backward and steps.may_fuse(layer.cell, layer.batch)
        return plan | {"kernel": "cell", "partition": {"fused": fused}}
    loop = _loop_of(layer, dtype, precision.of_recurrent_networks(dtype), packed, backward)

    def described(loop: Loop, forced: str | None) -> dict[str, Any] | None:
        try:
            return plan_of(engine, loop, device, forced).describe()
        except RuntimeError:  # nothing fits
            return None

    chosen = plan_of(engine, loop, device).describe()
    return plan | {
        "kernel": chosen.pop("kernel"),
        "partition": chosen,
        "tf32": loop.tf32,
        "alone": {kernel: described(loop, kernel) for kernel in ("cluster", "grid", "stream", "steps")},
        "not_forced": described(loop, ""),
        "in_tf32": described(loop._replace(tf32=True), "") if dtype is torch.float32 else None,
    }


# --------------------------------------------------------------------------------------------- the two passes


class _Direction(NamedTuple):
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None


def _by_direction(weights: Sequence[Any], layer: Layer) -> list[_Direction]:
    count = len(weights) // layer.directions
    directions = []
    for start in range(0, len(weights), count):
        group = list(weights[start : start + count])
        if not layer.bias:
            group[2:2] = (None, None)
        if not layer.projected:
            group.append(None)
        directions.append(_Direction(*group))
    return directions


def _part(tensor: Tensor | None, direction: int) -> Tensor | None:
    """The part of a direction, which comes first in the shapes of states and of `saved`; None if empty."""
    return None if tensor is None or tensor.numel() == 0 else tensor[direction]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


class Bounds(NamedTuple):
    grad_clip: float  # of the gradients of states at each step; infinite: none
    truncate: int  # the gradients do not cross before every such step; 0: they do


class Rows(NamedTuple):
    """Which rows have a step, and which states do not come from the step before, as the kernels take them."""

    lengths: Tensor | None  # int64 (B), on the device
    resets: Tensor | None  # bool like the rows; false where there is no step
    at_start: Tensor | None  # bool (B): of step 0, whose states are not h0 and c0 in the forward direction
    behind: Tensor | None  # bool (T, B): there is no step

    def first(self, state: Tensor | None, layer: Layer) -> Tensor | None:
        """h0 or c0 (D, B, size), zero where it is not used."""
        if state is None or self.at_start is None or layer.reverse:
            return state
        state = state.clone()
        state[0].masked_fill_(self.at_start.unsqueeze(1), 0)
        return state

    def finish(self, grad: Tensor | None, layer: Layer) -> None:
        """The gradient of h0 or c0, which is zero where these are not used."""
        if grad is not None and self.at_start is not None and not layer.reverse:
            grad[0].masked_fill_(self.at_start.unsqueeze(1), 0)


def _rows_of(layer: Layer, lengths: Tensor | None, resets: Tensor | None, device: torch.device) -> Rows:
    behind = None
    if lengths is not None:
        lengths = lengths.to(device, torch.int64)
        behind = torch.arange(layer.steps, device=device).unsqueeze(1) >= lengths
        resets = None if resets is None else resets & ~behind
    at_start = None if resets is None else resets.reshape(-1)[: layer.batch]
    return Rows(lengths, resets, at_start, behind)


def _cuts(
    layer: Layer, batch_sizes: Tensor | None, resets: Tensor | None, truncate: int, device: torch.device
) -> Tensor | None:
    """Like the resets, where no gradient of a state crosses."""
    if not truncate:
        return resets
    if batch_sizes is None:
        at = torch.arange(layer.steps, device=device).remainder(truncate) == 0
        cuts = at.unsqueeze(1).expand(layer.steps, layer.batch)
    else:
        at = torch.arange(layer.steps, device="cpu").remainder(truncate) == 0
        cuts = at.repeat_interleave(batch_sizes).to(device)
    return cuts.contiguous() if resets is None else cuts | resets


def _without(tensor: Tensor, behind: Tensor | None) -> Tensor:
    """(T, B, features) with zeros where there is no step, so that NaN there meets no factor of zero."""
    return tensor if behind is None else tensor.masked_fill(behind.unsqueeze(2), 0)


def _workspace(plan: Any, like: Tensor) -> Tensor:
    return torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=like.device)


@_plainly
def forward(
    engine: Engine,
    layer: Layer,
    mode: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    save: str,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    saved: Tensor,
) -> None:
    """Fills output (T, B, D*R), h_n, c_n and saved; see ops.recurrent. All but the input is dense."""
    if layer.rows == 0:
        return
    given = _rows_of(layer, lengths, resets, input.device)
    h0, c0 = given.first(h0, layer), given.first(c0, layer)
    if lengths is not None:
        output.zero_()
        saved.zero_()  # what lies behind the ends is multiplied by gradients of zero
    of_rnn = precision.of_recurrent_networks(input.dtype)
    loop = _loop_of(layer, input.dtype, of_rnn, batch_sizes is not None, backward=False)
    plan = plan_of(engine, loop, input.device)
    directions = _by_direction(weights, layer)
    x = input.reshape(layer.rows, layer.input_size)
    weight_ih = _joined([d.weight_ih for d in directions])
    with precision.products(of_rnn):
        if layer.bias:
            pre = torch.addmm(
                _joined([d.bias_ih for d in directions if d.bias_ih is not None]), x, weight_ih.t()
            )
        else:
            pre = x @ weight_ih.t()
    if plan.kernel == "steps":
        h_n.zero_() if h0 is None else h_n.copy_(h0)
        c = torch.empty_like(c_n, dtype=steps.wide_dtype(c_n)) if layer.cell.cell_state else None
        if c is not None:
            c.zero_() if c0 is None else c.copy_(c0)
        kernels = _cell_kernels(engine, layer, input)
        layout = _layout(layer, batch_sizes, given)
        kept = ([output], [_if_any(saved)], save == "states")
        with precision.products(of_rnn):
            h = steps.Matrix(h_n, (h_n,))
            steps.forward(kernels, mode, layout, _weights(directions), [pre], h, [c], *kept)
        if c is not None:
            c_n.copy_(c)
        return
    workspace, index = _workspace(plan, input), input.device.index or 0
    engine.module.loop_forward(
        plan,
        loop.cell,
        loop.dtype,
        loop.tf32,
        index,
        engine.stream(index),
        loop.steps,
        loop.batch,
        *addresses(batch_sizes),
        loop.hidden_size,
        loop.proj_size,
        layer.reverse,
        *addresses(given.lengths, given.resets),
        save == "states" and layer.cell.cell_state,
        pre.data_ptr(),
        output.data_ptr(),
        *strides(output, 2),
        workspace.data_ptr(),
        tuple(
            addresses(
                d.weight_hh,
                d.bias_hh,
                d.weight_hr,
                _part(h0, i),
                _part(c0, i),
                _part(h_n, i),
                _part(c_n, i),
                _part(saved, i),
            )
            for i, d in enumerate(directions)
        ),
    )


@_plainly
def cell(
    engine: Engine,
    layer: Layer,
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    saved: Tensor | None,
) -> None:
    """Fills h, c and saved; see ops.recurrent_cell."""
    if layer.rows == 0:
        return
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    with precision.products(precision.of_recurrent_networks(input.dtype)):
        pre = input @ weight_ih.t() if bias_ih is None else torch.addmm(bias_ih, input, weight_ih.t())
        kernels = _cell_kernels(engine, layer, input)
        steps.cell(kernels, mode, weight_hh, bias_hh, pre, h0, c0, h, c, saved)


def _cell_kernels(engine: Engine, layer: Layer, input: Tensor) -> steps.Kernels:
    index = input.device.index or 0
    engine.facts(index)  # says so if the GPU is too old
    return steps.Kernels(engine.module, layer.cell.code, DTYPES[input.dtype], index, engine.stream(index))


def _if_any(tensor: Tensor) -> Tensor | None:
    """None if empty."""
    return tensor if tensor.numel() else None


def _layout(layer: Layer, batch_sizes: Tensor | None, given: Rows, truncate: int = 0) -> steps.Layout:
    rows = (given.lengths, given.resets, truncate)
    return steps.Layout(layer.steps, layer.batch, batch_sizes, layer.reverse, *rows)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Side by side, so that one product is for all directions."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _weights(directions: Sequence[_Direction]) -> steps.Weights:
    biases = [d.bias_hh for d in directions if d.bias_hh is not None]
    projections = [d.weight_hr for d in directions if d.weight_hr is not None]
    hh = _stacked([d.weight_hh for d in directions])
    return steps.Weights(hh, [biases or None], _stacked(projections) if projections else None)


@_plainly
def backward(
    engine: Engine,
    layer: Layer,
    mode: str,
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
    grad_clip: float | None,
    truncate: int,
    grads: Sequence[Tensor | None],
) -> None:
    """Fills `grads`, of input, h0, c0 and the weights, each dense or None; see ops.recurrent_backward. Of the
    arguments, grad_output, input and output may have any strides, with features of output side by side."""
    grad_input, grad_h0, grad_c0, *grad_weights = grads
    if layer.rows == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    given = _rows_of(layer, lengths, resets, input.device)
    input, (h0, c0) = _without(input, given.behind), (given.first(h0, layer), given.first(c0, layer))
    bounds = Bounds(math.inf if grad_clip is None else grad_clip, truncate)
    one_step = batch_sizes is None and input.dim() == 2  # of a cell
    if one_step:
        states = (h0, c0, saved, grad_h_n, grad_c_n, grad_h0, grad_c0)
        lead = [None if t is None else t.unsqueeze(0) for t in states]
        h0, c0, saved, grad_h_n, grad_c_n, grad_h0, grad_c0 = lead
    of_rnn = precision.of_recurrent_networks(input.dtype)
    loop = _loop_of(layer, input.dtype, of_rnn, batch_sizes is not None, backward=True)
    # One step is never worth a persistent kernel.
    plan = None if one_step else plan_of(engine, loop, input.device)
    in_steps = plan is None or plan.kernel == "steps"
    directions, wanted = _by_direction(weights, layer), _by_direction(grad_weights, layer)
    rows, count, hidden, width = layer.rows, layer.directions, layer.hidden_size, layer.width
    hh_wanted = any(w.weight_hh is not None for w in wanted)
    candidate_wanted = mode == "GRU" and (hh_wanted or any(w.bias_hh is not None for w in wanted))
    grad_pre = input.new_empty((rows, count, layer.cell.gates * hidden))
    previous = input.new_empty((count, rows, width)) if hh_wanted else None
    grad_candidate = input.new_empty((count, rows, hidden)) if candidate_wanted else None
    hr_wanted = any(w.weight_hr is not None for w in wanted)
    grad_hidden = input.new_empty((count, rows, width)) if hr_wanted else None
    if lengths is not None:  # nothing is made behind the ends
        for made_of_rows in (grad_pre, previous, grad_candidate, grad_hidden):
            if made_of_rows is not None:
                made_of_rows.zero_()
    made = Gradients(grad_pre, previous, grad_candidate, grad_hidden, grad_h0, grad_c0)
    arguments = (grad_output, grad_h_n, grad_c_n, batch_sizes, given, h0, c0, directions, output, saved)
    arguments = (*arguments, bounds, made)
    if in_steps:
        with precision.products(of_rnn):
            _backward_in_steps(engine, layer, mode, *arguments)
    else:
        _backward_loop(engine, layer, loop, plan, input.device, *arguments)
    given.finish(grad_h0, layer)
    given.finish(grad_c0, layer)
    with precision.products(of_rnn):
        if grad_input is not None:
            weight_ih = _joined([d.weight_ih for d in directions])
            _product(grad_pre.view(rows, -1), weight_ih, grad_input)
            if given.behind is not None:
                grad_input.masked_fill_(given.behind.unsqueeze(2), 0)
        for i in range(count):
            d_h = None if grad_candidate is None else grad_candidate[i]
            h = None if previous is None else previous[i]
            _weight_gradients(mode, wanted[i], input, grad_pre[:, i], d_h, h, _part(saved, i))
            if grad_hidden is not None and (grad := wanted[i].weight_hr) is not None:
                o, c = saved[i, :, 3], saved[i, :, 4]
                _product(grad_hidden[i].t(), o * torch.tanh(c), grad)


def _backward_loop(
    engine: Engine,
    layer: Layer,
    loop: Loop,
    plan: Any,
    device: torch.device,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    batch_sizes: Tensor | None,
    given: Rows,
    h0: Tensor | None,
    c0: Tensor | None,
    directions: Sequence[_Direction],
    output: Tensor,
    saved: Tensor,
    bounds: Bounds,
    made: Gradients,
) -> None:
    cuts = _cuts(layer, batch_sizes, given.resets, bounds.truncate, output.device)  # as long as its address
    workspace, index = _workspace(plan, output), device.index or 0
    engine.module.loop_backward(
        plan,
        loop.cell,
        loop.dtype,
        loop.tf32,
        index,
        engine.stream(index),
        loop.steps,
        loop.batch,
        *addresses(batch_sizes),
        loop.hidden_size,
        loop.proj_size,
        layer.reverse,
        *addresses(given.lengths, given.resets),
        bounds.grad_clip,
        *addresses(cuts),
        made.pre.data_ptr(),
        output.data_ptr(),
        *strides(output, 2),
        *addresses(grad_output),
        *strides(grad_output, 3),
        workspace.data_ptr(),
        tuple(
            addresses(
                d.weight_hh,
                None,
                d.weight_hr,
                _part(h0, i),
                _part(c0, i),
                None,
                None,
                _part(saved, i),
                _part(grad_h_n, i),
                _part(grad_c_n, i),
                _part(made.h0, i),
                _part(made.c0, i),
                _part(made.previous, i),
                _part(made.candidate, i),
                _part(made.hidden, i),
            )
            for i, d in enumerate(directions)
        ),
    )


def _backward_in_steps(
    engine: Engine,
    layer: Layer,
    mode: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    batch_sizes: Tensor | None,
    given: Rows,
    h0: Tensor | None,
    c0: Tensor | None,
    directions: Sequence[_Direction],
    output: Tensor,
    saved: Tensor,
    bounds: Bounds,
    made: Gradients,
) -> None:
    kernels = _cell_kernels(engine, layer, output)
    wide = output.new_empty(0, dtype=steps.wide_dtype(output))

    def gradient(of_last: Tensor | None, width: int) -> Tensor:
        grad = wide.new_empty((layer.directions, layer.batch, width))
        return grad.zero_() if of_last is None else grad.copy_(of_last)

    grad_h = gradient(grad_h_n, layer.width)
    grad_c = gradient(grad_c_n, layer.hidden_size) if layer.cell.cell_state else None
    layout = _layout(layer, batch_sizes, given, bounds.truncate)
    of_loop = steps.Given(h0, c0, output, _if_any(saved), grad_output, grad_h, grad_c)
    clip = bounds.grad_clip
    steps.backward(kernels, mode, layout, _weights(directions), [of_loop], clip, [made])


def _weight_gradients(
    mode: str,
    wanted: _Direction,
    input: Tensor,
    grad_pre: Tensor,
    grad_candidate: Tensor | None,
    previous: Tensor | None,
    saved: Tensor | None,
) -> None:
    """Of one direction; grad_pre (rows, G*H), grad_candidate (rows, H), previous states (rows, R)."""
    if wanted.weight_ih is not None:
        _product(grad_pre.t(), input.reshape(len(grad_pre), -1), wanted.weight_ih)
    if wanted.bias_ih is not None:
        torch.sum(grad_pre, 0, out=wanted.bias_ih)
    # The candidate of a GRU has its own gradient, or its own operand, on the recurrent side.
    split = (grad_pre.shape[1] // 3) * 2 if mode.startswith("GRU") else grad_pre.shape[1]
    first, last = grad_pre[:, :split], grad_pre[:, split:]
    if mode == "GRU" and grad_candidate is not None:
        last = grad_candidate
    if wanted.weight_hh is not None and previous is not None:
        _product(first.t(), previous, wanted.weight_hh[:split])
        if mode == "GRU_RESET_BEFORE" and saved is not None:
            previous = saved[:, 0] * previous
        if split < grad_pre.shape[1]:
            _product(last.t(), previous, wanted.weight_hh[split:])
    if wanted.bias_hh is not None:
        torch.sum(first, 0, out=wanted.bias_hh[:split])
        if split < grad_pre.shape[1]:
            torch.sum(last, 0, out=wanted.bias_hh[split:])


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, where out may have more dimensions and other strides than the product."""
    if out.dim() == 2 and out.is_contiguous():
        torch.mm(a, b, out=out)
    elif out.is_contiguous():
        torch.mm(a, b, out=out.view(len(a), -1))
    else:
        out.copy_((a @ b).view(out.shape))
