"""The recurrent networks in plain torch operations, written straight from their equations.

This is what fastseq is measured against, in float64; autograd differentiates it. It is slow on purpose:
one loop over time, no tricks, nothing shared with the library.

Notation: x input, h hidden state, c cell state, W input weights, U recurrent weights, b biases,
* elementwise, s the logistic sigmoid. Gates lie one after the other in the rows of W and U, in torch's order.

    RNN               h' = act(W x + b_W + U h + b_U)                      act is tanh or relu
    LSTM              i, f, o = s(W x + b_W + U h + b_U)    g = tanh(...)  rows: i, f, g, o
                      c' = f * c + i * g
                      h' = o * tanh(c')                                    or P (o * tanh(c')), projected
    GRU               r, z = s(W x + b_W + U h + b_U)                      rows: r, z, n
                      n  = tanh(W_n x + b_Wn + r * (U_n h + b_Un))
                      h' = (1 - z) * n + z * h
    GRU_RESET_BEFORE  the same but n = tanh(W_n x + b_Wn + U_n (r * h) + b_Un)
"""

from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU", "GRU_RESET_BEFORE")
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3, "GRU_RESET_BEFORE": 3}


class Weights(NamedTuple):
    """One direction of one layer; R is the width of h: proj_size if there is one, else H."""

    weight_ih: Tensor  # [G*H, I]
    weight_hh: Tensor  # [G*H, R]
    bias_ih: Tensor | None = None  # [G*H]
    bias_hh: Tensor | None = None  # [G*H]
    weight_hr: Tensor | None = None  # [R, H]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight.t()
    return product if bias is None else product + bias


def step(mode: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """One step of a batch: x [B, I], h [B, R], c [B, H] of an LSTM, None otherwise."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    a_x = linear(x, w_ih, b_ih)
    if mode == "GRU_RESET_BEFORE":
        x_r, x_z, x_n = a_x.chunk(3, dim=-1)
        u_r, u_z, u_n = w_hh.chunk(3)
        b_r, b_z, b_n = (None, None, None) if b_hh is None else b_hh.chunk(3)
        r, z = torch.sigmoid(x_r + linear(h, u_r, b_r)), torch.sigmoid(x_z + linear(h, u_z, b_z))
        n = torch.tanh(x_n + linear(r * h, u_n, b_n))
        return (1 - z) * n + z * h, None

    a_h = linear(h, w_hh, b_hh)
    if mode == "RNN_TANH":
        return torch.tanh(a_x + a_h), None
    if mode == "RNN_RELU":
        return torch.relu(a_x + a_h), None
    if mode == "GRU":
        x_r, x_z, x_n = a_x.chunk(3, dim=-1)
        h_r, h_z, h_n = a_h.chunk(3, dim=-1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return (1 - z) * n + z * h, None
    if mode == "LSTM":
        a_i, a_f, a_g, a_o = (a_x + a_h).chunk(4, dim=-1)
        c = torch.sigmoid(a_f) * c + torch.sigmoid(a_i) * torch.tanh(a_g)
        h = torch.sigmoid(a_o) * torch.tanh(c)
        return (h if w_hr is None else h @ w_hr.t()), c
    raise ValueError(mode)


class Crossing(NamedTuple):
    """What happens to states, and to their gradients, between the steps t - 1 and t."""

    resets: Tensor | None = None  # [T, B]: the state, also that before step 0, is a new zero
    truncate: int | None = None  # no gradient crosses where t is a multiple of it
    grad_clip: float | None = None  # bounds the gradient of the state that a step makes

    def before(self, state: Tensor, t: int, alive: Tensor) -> Tensor:
        """The state [B, R] of those rows for which step t is there, others unchanged."""
        if self.truncate and t > 0 and t % self.truncate == 0:
            state = torch.where(alive[:, None], state.detach(), state)
        if self.resets is not None:
            state = torch.where((alive & self.resets[t])[:, None], torch.zeros_like(state), state)
        return state

    def made(self, state: Tensor) -> None:
        if self.grad_clip is not None and state.requires_grad:
            state.register_hook(lambda grad: grad.clamp(-self.grad_clip, self.grad_clip))


PLAIN = Crossing()


def layer(
    mode: str,
    input: Tensor,
    lengths: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    weights: Weights,
    reverse: bool,
    crossing: Crossing = PLAIN,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction of one layer over input [T, B, I].

    A row of length n takes part in its first n steps only: elsewhere its state stands still and its output is
    zero. A reverse direction therefore starts each row at the row's own last step.
    """
    outputs: list[Tensor] = [None] * len(input)
    for t in reversed(range(len(input))) if reverse else range(len(input)):
        later = t + 1 if reverse else t
        if later < len(input):
            alive = torch.ones(len(h), dtype=torch.bool) if lengths is None else later < lengths
            h = crossing.before(h, later, alive)
            c = None if c is None else crossing.before(c, later, alive)
        h_next, c_next = step(mode, input[t], h, c, weights)
        for state in (h_next, c_next):
            if state is not None:
                crossing.made(state)
        if lengths is None:
            outputs[t], h, c = h_next, h_next, c_next
        else:
            alive = (t < lengths)[:, None]
            outputs[t] = torch.where(alive, h_next, torch.zeros_like(h_next))
            h = torch.where(alive, h_next, h)
            c = None if c is None else torch.where(alive, c_next, c)
    return torch.stack(outputs), h, c


def recurrent(
    mode: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    layers: list[list[Weights]],
    lengths: Tensor | None = None,
    crossing: Crossing = PLAIN,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Layers, each a list of one or two directions: input [T, B, I], h0 [L*D, B, R], c0 [L*D, B, H].

    Returns output [T, B, D*R], h_n and c_n like h0 and c0.
    """
    h_n, c_n = [], []
    for directions in layers:
        halves = []
        for reverse, weights in enumerate(directions):
            k = len(h_n)
            half, h, c = layer(
                mode, input, lengths, h0[k], None if c0 is None else c0[k], weights, bool(reverse), crossing
            )
            halves.append(half)
            h_n.append(h)
            c_n.append(c)
        input = torch.cat(halves, dim=-1)
    return input, torch.stack(h_n), None if c0 is None else torch.stack(c_n)


def layers_of(parameters: dict[str, Tensor], num_layers: int, bidirectional: bool) -> list[list[Weights]]:
    """torch's parameters, `weight_ih_l0`, `bias_hh_l1_reverse`, ..., sorted into layers and directions."""
    suffixes = ("", "_reverse") if bidirectional else ("",)
    return [
        [
            Weights(*(parameters.get(f"{name}_l{k}{suffix}") for name in Weights._fields))
            for suffix in suffixes
        ]
        for k in range(num_layers)
    ]
