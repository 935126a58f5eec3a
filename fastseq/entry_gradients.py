"""Gradients of weights for each entry of a folded batch: per-sample gradients.

The backward operator sums the gradients of weights over its whole batch. It is called for each step of all
entries together instead, which gives what arrives at every h_t and c_t; and then once for each entry, with
all of its steps as the rows of a single one, which gives the gradients of its input and of weights. That is
as much arithmetic as one call for each entry, whose loops over time have small products.

Rows are those of a packed sequence, and of N * B rows a step otherwise; N entries in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .checks import CELLS


def entry_gradients(op: Callable[..., list[Tensor]], size: int, given: dict[str, Any]) -> list[Tensor]:
    """What op(*given.values()) returns, recurrent_backward with the entries folded into the batch, but with
    gradients of weights (N, ...)."""
    input, weights, wanted = given["input"], given["weights"], given["wanted"]
    directions = given["directions"]
    count = len(weights) // directions
    flat = given | {name: _rows(given[name]) for name in ("input", "output", "grad_output")}
    sizes = _step_sizes(given)
    of_input, of_states, of_weights = None, [], []
    for d in range(directions):
        own = slice(d * count, (d + 1) * count)
        one = flat | _direction(flat, d, weights[own])
        of_rows, states, grads = _one_direction(op, size, one, sizes, d == 1, wanted[0], wanted[3:][own])
        of_states.append(states)
        of_weights += grads
        of_input = of_rows if of_input is None else of_input + of_rows
    found = [None if of_input is None else of_input.reshape(input.shape)]
    for states in zip(*of_states, strict=True):  # h, and c if there is one
        found.append(None if states[0] is None else torch.stack(states))
    return [grad for grad, want in zip(found, wanted, strict=False) if want] + of_weights


def _rows(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 2 else tensor.flatten(0, 1)


def _step_sizes(given: dict[str, Any]) -> list[int]:
    """The rows of each step."""
    if given["batch_sizes"] is not None:
        return given["batch_sizes"].tolist()
    steps, batch, _ = given["input"].shape
    return [batch] * steps


def _direction(given: dict[str, Any], d: int, weights: Sequence[Tensor]) -> dict[str, Any]:
    """What is different in each direction: of rows (rows, ...), of states (B, ...)."""
    width = given["output"].shape[1] // given["directions"]
    own = {name: given[name] for name in ("output", "grad_output")}
    own = {name: None if x is None else x[:, d * width : (d + 1) * width] for name, x in own.items()}
    states = {name: given[name] for name in ("h0", "c0", "grad_h_n", "grad_c_n")}
    own |= {name: None if x is None else x[d] for name, x in states.items()}
    saved = given["saved"]
    saved = saved[d] if saved.dim() > 1 else saved
    return own | {"saved": saved, "weights": weights, "directions": 1, "batch_sizes": None}


def _one_direction(
    op: Callable[..., list[Tensor]],
    size: int,
    given: dict[str, Any],
    sizes: list[int],
    reverse: bool,
    of_input: bool,
    of_weights: Sequence[bool],
) -> tuple[Tensor | None, tuple[Tensor, Tensor | None], list[Tensor]]:
    """Gradients of the rows of the input, of both states, and of weights for each entry."""
    output, saved, batch = given["output"], given["saved"], sizes[0]
    steps = [slice(end - n, end) for end, n in zip(accumulate(sizes), sizes, strict=True)]

    def state(name: str, like: Tensor) -> Tensor:
        return like.new_zeros(batch, like.shape[1]) if given[name] is None else given[name]

    rows = {name: given[name] for name in ("grad_output", "input", "output")}
    if saved.dim() > 1:  # of an RNN nothing is saved
        rows["saved"] = saved
    rows["h0"] = _before(output, state("h0", output), steps, reverse)
    dh, dc = state("grad_h_n", output), None
    if CELLS[given["mode"]].cell_state:
        c = saved[:, -1]  # the last of what is saved
        rows["c0"] = _before(c, state("c0", c), steps, reverse)
        dc = state("grad_c_n", c)

    def call(rows: dict[str, Tensor | None], *wanted: bool) -> list[Tensor]:
        as_one_step = {name: None if x is None else x.unsqueeze(0) for name, x in rows.items()}
        return op(*(given | as_one_step | {"wanted": wanted}).values())

    arriving: list[Any] = [None] * len(steps)
    for t in range(len(steps)) if reverse else reversed(range(len(steps))):
        n = sizes[t]
        arriving[t] = dh[:n], None if dc is None else dc[:n]
        step = {name: None if x is None else x[steps[t]] for name, x in rows.items()}
        step |= {"grad_h_n": arriving[t][0], "grad_c_n": arriving[t][1]}
        earlier = call(step, False, True, dc is not None, *[False] * len(of_weights))
        dh, dc = (
            d if d is None else torch.cat([grad.squeeze(0), d[n:]]) if n < batch else grad.squeeze(0)
            for grad, d in zip([*earlier, None], (dh, dc), strict=False)
        )

    of_h, of_c = zip(*arriving, strict=True)
    rows |= {"grad_h_n": torch.cat(of_h), "grad_c_n": None if dc is None else torch.cat(of_c)}
    entries = {name: None if x is None else x.unflatten(0, (-1, size)) for name, x in rows.items()}
    calls = [
        call(
            {name: None if x is None else x[:, i] for name, x in entries.items()},
            of_input,
            False,
            False,
            *of_weights,
        )
        for i in range(size)
    ]
    columns = list(zip(*calls, strict=True))
    of_rows = torch.cat(columns.pop(0)).transpose(0, 1).flatten(0, 1) if of_input else None
    return of_rows, (dh, dc), [torch.stack(column) for column in columns]


def _before(states: Tensor, first: Tensor, steps: Sequence[slice], reverse: bool) -> Tensor:
    """The state before each row's step; `first` before its first one."""
    pieces = []
    for t, rows in enumerate(steps):
        n = rows.stop - rows.start
        neighbour = t + 1 if reverse else t - 1
        if 0 <= neighbour < len(steps):
            piece = states[steps[neighbour]][:n]
            pieces += [piece, first[piece.shape[0] : n]]  # of the reverse direction some rows begin here
        else:
            pieces.append(first[:n])
    return torch.cat(pieces)
