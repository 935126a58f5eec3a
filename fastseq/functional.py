"""Stateless recurrent networks, whose weights are arguments, and attention, which has none.

A stack's `weights` hold one sequence of tensors for each layer and direction, as `module.all_weights` does:

    [weight_ih, weight_hh]                                    without biases
    [weight_ih, weight_hh, bias_ih, bias_hh]                  with biases
    [weight_ih, weight_hh, weight_hr]                         LSTM with projection, without biases
    [weight_ih, weight_hh, bias_ih, bias_hh, weight_hr]       LSTM with projection and biases

in the order layer 0, layer 0 reverse (if bidirectional), layer 1, ... Layers, sizes, biases and projection
follow from them. Shapes below: T steps, B batch, I input_size, H hidden_size, R recurrent size (proj_size or
H), L layers, D directions, G gates (LSTM 4, GRU 3, RNN 1). All tensors have one dtype: float32, float64,
bfloat16 or float16. Within torch.autocast they may differ, and come out as torch's own do: see autocast.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import autocast, autograd
from .attention import scaled_dot_product_attention
from .checks import CELLS, check_like, problem, require_tensor
from .recurrent_checks import (
    Options,
    check_cell_ranks,
    check_cell_states,
    check_input,
    check_state_ranks,
    packed_batch,
    refuse_weights,
    resets_of,
    state_name,
    two_states,
    unknown_nonlinearity,
)

__all__ = [
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]


def lstm(
    input: Tensor,
    weights: Sequence[Sequence[Tensor]],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    grad_clip: float | None = None,
    truncate: int | None = None,
    memory: str = "fast",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The LSTM of `fastseq.LSTM`, with its weights as an argument.

    Args:
        input: (T, B, I), or (B, T, I) if `batch_first`, or (T, I) without a batch, or (rows, I) with
            `batch_sizes`.
        weights: for each layer and direction weight_ih (4H, I), weight_hh (4H, R), and optionally bias_ih and
            bias_hh (4H) and weight_hr (R, H); see the head of this module.
        hx: h_0 `(L*D, B, R)` and c_0 `(L*D, B, H)`, without B if the input has no batch; zeros if None.
        batch_sizes: int64 (T) on the CPU, the rows of each step of a packed sequence; never increasing.
        bidirectional: whether each layer also runs from the last step to the first.
        batch_first: whether input and output are (B, T, ...).
        dropout: probability of zeroing an element between two layers, if `training`.
        training: whether dropout is applied.
        lengths: int64 or int32 (B), on any device, in any order, 0 to T: row b has the steps t < lengths[b].
            Its output is zero after them, its last state is that after them (the initial one if there are
            none), the backward direction begins with the last of them, and what the input holds there
            reaches nothing.
        resets: bool (T, B), also if `batch_first`: an episode begins at step t of row b. No state, and no
            gradient of a state, crosses between the steps t - 1 and t: the state before step t is zero,
            also before step 0, and in the backward direction that before step t - 1.
        grad_clip: at every step of the backward pass, the gradients of h_t and c_t are bounded to
            [-grad_clip, grad_clip] before they go through the step; NaN stays NaN. Not if None.
        truncate: in the backward pass no gradient of a state crosses between the steps t - 1 and t where t
            is a multiple of it, as if pieces of so many steps were fed with detached states between. All
            cross if None.
        memory: what is kept for the backward pass; see there. "fast" keeps the gates of all steps. Less is
            kept by "recompute", h and c of every step, and by "checkpoint:k", h and c every k steps: their
            backward passes make the gates again, of a window of steps at a time.

    Returns:
        output `(T, B, D*R)`, with the input's layout, and (h_n, c_n), with the shapes of `hx`.

    Raises:
        ValueError: input of the wrong rank, or of another dtype than the weights; another `memory`.
        AttributeError: input or a state that is no tensor, as in torch.nn. TypeError: anything else of
            another type; a grad_clip that is no number, a truncate that is no int.
        IndexError: one state instead of two.
        RuntimeError: wrong sizes, mixed dtypes or devices, no step at all, malformed batch_sizes; lengths or
            resets of another shape or dtype, or without a batch; lengths beside batch_sizes, or not in 0..T;
            grad_clip below 0, truncate below 1.
        NotImplementedError: a device or layout without a kernel.

    Saved for the backward pass: input, weights, initial states, output; i, f, g, o, c of every step. With
    memory="recompute" c of every step instead of these; with "checkpoint:k" only input, weights, initial
    states, and h and c every k steps.

    Example:
        >>> module = fastseq.LSTM(4, 5, num_layers=2, bidirectional=True)
        >>> output, (h_n, c_n) = fastseq.functional.lstm(
        ...     torch.randn(7, 3, 4), module.all_weights, bidirectional=True)
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([7, 3, 10]), torch.Size([4, 3, 5]), torch.Size([4, 3, 5]))
    """
    states = () if hx is None else two_states(hx)
    options = Options(lengths, resets, grad_clip, truncate, memory)
    output, h_n, c_n = _stack(
        "LSTM", input, weights, states, batch_sizes, bidirectional, batch_first, dropout, training, options
    )
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    weights: Sequence[Sequence[Tensor]],
    hx: Tensor | None = None,
    *,
    reset_after: bool = True,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    grad_clip: float | None = None,
    truncate: int | None = None,
    memory: str = "fast",
) -> tuple[Tensor, Tensor]:
    """The GRU of `fastseq.GRU`, with its weights as an argument.

    Args:
        input: (T, B, I), or (B, T, I) if `batch_first`, or (T, I) without a batch, or (rows, I) with
            `batch_sizes`.
        weights: for each layer and direction weight_ih (3H, I), weight_hh (3H, H), and optionally bias_ih and
            bias_hh (3H); see the head of this module.
        hx: h_0 `(L*D, B, H)`, without B if the input has no batch; zeros if None.
        reset_after: whether the reset gate acts after the recurrent product (torch) or before it.
        batch_sizes, bidirectional, batch_first, dropout, training, lengths, resets, grad_clip, truncate,
            memory: as for `lstm`.

    Returns:
        output `(T, B, D*H)`, with the input's layout, and h_n `(L*D, B, H)`.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as `lstm`.

    Saved for the backward pass: input, weights, initial state, output; r, z, n of every step, and the
    recurrent part of n if `reset_after`. With memory="recompute" no gates; with "checkpoint:k" only input,
    weights, initial state, and h every k steps.

    Example:
        >>> module = fastseq.GRU(4, 5)
        >>> output, h_n = fastseq.functional.gru(torch.randn(7, 3, 4), module.all_weights)
        >>> output.shape, h_n.shape
        (torch.Size([7, 3, 5]), torch.Size([1, 3, 5]))
    """
    mode = "GRU" if reset_after else "GRU_RESET_BEFORE"
    states = () if hx is None else (hx,)
    options = Options(lengths, resets, grad_clip, truncate, memory)
    output, h_n, _ = _stack(
        mode, input, weights, states, batch_sizes, bidirectional, batch_first, dropout, training, options
    )
    return output, h_n


def rnn(
    input: Tensor,
    weights: Sequence[Sequence[Tensor]],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    grad_clip: float | None = None,
    truncate: int | None = None,
    memory: str = "fast",
) -> tuple[Tensor, Tensor]:
    """The Elman network of `fastseq.RNN`, with its weights as an argument.

    Args:
        input: (T, B, I), or (B, T, I) if `batch_first`, or (T, I) without a batch, or (rows, I) with
            `batch_sizes`.
        weights: for each layer and direction weight_ih (H, I), weight_hh (H, H), and optionally bias_ih and
            bias_hh (H); see the head of this module.
        hx: h_0 `(L*D, B, H)`, without B if the input has no batch; zeros if None.
        nonlinearity: "tanh" or "relu".
        batch_sizes, bidirectional, batch_first, dropout, training, lengths, resets, grad_clip, truncate,
            memory: as for `lstm`.

    Returns:
        output `(T, B, D*H)`, with the input's layout, and h_n `(L*D, B, H)`.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as `lstm`; ValueError for another nonlinearity.

    Saved for the backward pass: input, weights, initial state, output; with memory="checkpoint:k" instead of
    the output h every k steps.

    Example:
        >>> module = fastseq.RNN(4, 5, nonlinearity="relu")
        >>> output, h_n = fastseq.functional.rnn(
        ...     torch.randn(7, 3, 4), module.all_weights, nonlinearity="relu")
        >>> output.shape, h_n.shape
        (torch.Size([7, 3, 5]), torch.Size([1, 3, 5]))
    """
    if nonlinearity not in _RNN_MODES:
        raise ValueError(unknown_nonlinearity(nonlinearity))
    mode, states = _RNN_MODES[nonlinearity], () if hx is None else (hx,)
    options = Options(lengths, resets, grad_clip, truncate, memory)
    output, h_n, _ = _stack(
        mode, input, weights, states, batch_sizes, bidirectional, batch_first, dropout, training, options
    )
    return output, h_n


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM; see `fastseq.LSTMCell`.

    Args:
        input: (B, I), or (I) without a batch.
        hx: h (B, H) and c (B, H), or (H) each without a batch; zeros if None.
        w_ih, w_hh: (4H, I) and (4H, H).
        b_ih, b_hh: (4H) each, or both None.

    Returns:
        The next h and c, with the shapes of `hx`.

    Raises:
        ValueError: input or a state of the wrong rank.
        AttributeError: input or a state that is no tensor. TypeError: hx that is no pair.
        RuntimeError: wrong sizes, mixed dtypes or devices.
        NotImplementedError: a device or layout without a kernel.

    Saved for the backward pass: all arguments, the new h; i, f, g, o, c.

    Example:
        >>> cell = fastseq.LSTMCell(4, 5)
        >>> h, c = fastseq.functional.lstm_cell(torch.randn(3, 4), None, cell.weight_ih, cell.weight_hh)
        >>> h.shape, c.shape
        (torch.Size([3, 5]), torch.Size([3, 5]))
    """
    h0 = c0 = None
    if hx is not None:
        try:
            h0, c0 = hx
            ranked = h0.dim() == 2 and c0.dim() == 2
        except (AttributeError, TypeError, ValueError):
            ranked = False
        if not ranked:
            check_cell_states(hx)
    if isinstance(input, Tensor) and input.dim() == 2:
        result = _step(input, h0, c0, w_ih, w_hh, b_ih, b_hh, "LSTM")
        return result[0], result[1]
    check_cell_ranks(("input", input))
    if h0 is not None and c0 is not None:
        h0, c0 = h0.unsqueeze(0), c0.unsqueeze(0)
    result = _step(input.unsqueeze(0), h0, c0, w_ih, w_hh, b_ih, b_hh, "LSTM")
    return result[0].squeeze(0), result[1].squeeze(0)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
) -> Tensor:
    """One step of a GRU; see `fastseq.GRUCell`.

    Args:
        input: (B, I), or (I) without a batch.
        hx: h (B, H), or (H) without a batch; zeros if None.
        w_ih, w_hh: (3H, I) and (3H, H).
        b_ih, b_hh: (3H) each, or both None.
        reset_after: whether the reset gate acts after the recurrent product (torch) or before it.

    Returns:
        The next h, with the shape of `hx`.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as `lstm_cell`.

    Saved for the backward pass: all arguments, the new h; r, z, n, and the recurrent part of n if
    `reset_after`.

    Example:
        >>> cell = fastseq.GRUCell(4, 5)
        >>> fastseq.functional.gru_cell(torch.randn(3, 4), None, cell.weight_ih, cell.weight_hh).shape
        torch.Size([3, 5])
    """
    return _one_state_cell("GRU" if reset_after else "GRU_RESET_BEFORE", input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman network; see `fastseq.RNNCell`.

    Args:
        input: (B, I), or (I) without a batch.
        hx: h (B, H), or (H) without a batch; zeros if None.
        w_ih, w_hh: (H, I) and (H, H).
        b_ih, b_hh: (H) each, or both None.
        nonlinearity: "tanh" or "relu".

    Returns:
        The next h, with the shape of `hx`.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as `lstm_cell`; RuntimeError for another
            nonlinearity.

    Saved for the backward pass: all arguments and the new h.

    Example:
        >>> cell = fastseq.RNNCell(4, 5)
        >>> fastseq.functional.rnn_cell(torch.randn(3, 4), None, cell.weight_ih, cell.weight_hh).shape
        torch.Size([3, 5])
    """
    if nonlinearity not in _RNN_MODES:
        raise RuntimeError(unknown_nonlinearity(nonlinearity))
    return _one_state_cell(_RNN_MODES[nonlinearity], input, hx, w_ih, w_hh, b_ih, b_hh)


_RNN_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}


@autocast.layers
def _stack(
    mode: str,
    input: Tensor,
    weights: Sequence[Sequence[Tensor]],
    states: tuple[Tensor, ...],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers: output, h_n and c_n, the last of no use if the cell has no cell state."""
    if not isinstance(input, Tensor):
        require_tensor("input", input, AttributeError)
    directions = 2 if bidirectional else 1
    try:
        layers, left_over = divmod(len(weights), directions)
        first = weights[0]
        dtype, hidden = first[0].dtype, first[1].shape[0] // CELLS[mode].gates
        width = first[-1].shape[0] if len(first) in (3, 5) else hidden
    except (AttributeError, IndexError, TypeError):
        refuse_weights(weights)
    if left_over:
        raise RuntimeError(
            problem(
                f"weights with {len(weights)} groups of tensors, bidirectional={bidirectional}",
                "one group for each layer and direction",
                "module.all_weights",
            )
        )
    unbatched = batch_sizes is None and input.dim() == 2
    batch_first = batch_first and batch_sizes is None and not unbatched
    check_input(input, dtype, batch_sizes)
    lengths, resets, grad_clip, truncate, memory = options
    rows = lengths is not None or resets is not None
    if rows or grad_clip is not None or truncate is not None or memory != "fast":
        resets = resets_of(options, unbatched, batch_sizes)
        grad_clip = None if grad_clip is None else float(grad_clip)
    check_state_ranks(states, 2 if unbatched else 3)
    if unbatched:
        input, states = input.unsqueeze(1), tuple(state.unsqueeze(1) for state in states)
    elif batch_first:
        input = input.transpose(0, 1)
    if batch_sizes is None and input.shape[0] == 0:
        raise RuntimeError(
            problem("input without any step", "at least one step", "leave empty sequences out")
        )

    if batch_sizes is None:
        batch = input.shape[1]
    elif states and is_compiling():  # the kernels ask later whether batch_sizes agree
        batch = states[0].shape[1]
    else:
        batch = packed_batch(batch_sizes)
    for i, state in enumerate(states):
        shape = (len(weights), batch, hidden if i else width)
        check_like(state_name(states, i), state, shape, "(layers * directions, batch, size)", input)
    if batch_sizes is not None and not states:  # the operator reads the batch size from the state
        states = (input.new_zeros((len(weights), batch, width)),)
    if layers == 1:
        h0, c0 = states[:1] or (None,), states[1:] or (None,)
    else:
        h0 = states[0].split(directions) if states else [None] * layers
        c0 = states[1].split(directions) if len(states) == 2 else [None] * layers

    h_n, c_n = [], []
    output = input
    for layer in range(layers):
        last = layer == layers - 1
        tensors = [
            tensor for group in weights[layer * directions : (layer + 1) * directions] for tensor in group
        ]
        # Time-major in memory between layers, like torch's, so that dropout draws the same mask.
        output, h, c = autograd.recurrent(
            output,
            batch_sizes,
            lengths,
            resets,
            h0[layer],
            c0[layer],
            tensors,
            mode,
            directions,
            len(first) >= 4,
            batch_first and last,
            grad_clip,
            truncate or 0,
            memory,
        )
        h_n.append(h)
        c_n.append(c)
        if dropout and training and not last:
            output = torch.dropout(output, dropout, True)

    h, c = (h_n[0], c_n[0]) if layers == 1 else (torch.cat(h_n), torch.cat(c_n))
    if unbatched:
        return output.squeeze(1), h.squeeze(1), c.squeeze(1) if c.dim() == 3 else c
    return output.transpose(0, 1) if batch_first else output, h, c


def _step(input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights_and_mode: Any) -> Sequence[Tensor]:
    """The new h and, of an LSTM, the new c come first in the result."""
    if autocast.is_on():
        return autocast.cell(autograd.recurrent_cell, input, h0, c0, *weights_and_mode)
    return autograd.recurrent_cell(input, h0, c0, *weights_and_mode)


def _one_state_cell(
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Tensor:
    if hx is not None and (not isinstance(hx, Tensor) or hx.dim() != 2):
        check_cell_ranks(("hx", hx))
    if isinstance(input, Tensor) and input.dim() == 2:
        return _step(input, hx, None, w_ih, w_hh, b_ih, b_hh, mode)[0]
    check_cell_ranks(("input", input))
    h0 = None if hx is None else hx.unsqueeze(0)
    return _step(input.unsqueeze(0), h0, None, w_ih, w_hh, b_ih, b_hh, mode)[0].squeeze(0)
