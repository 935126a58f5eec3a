from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from .base import RecurrentModule


class LSTM(RecurrentModule):
    r"""Long short-term memory over a sequence, in place of `torch.nn.LSTM`.

    For each step t of each layer, with x_t the input of the layer:

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh   (W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)                  or W_hr (o * tanh(c_t)) if proj_size > 0

    S. Hochreiter and J. Schmidhuber, Long short-term memory, Neural Computation 9(8), 1997; the forget gate
    is from F. Gers, J. Schmidhuber and F. Cummins, Learning to forget, 2000; the projection from H. Sak, A.
    Senior and F. Beaufays, Long short-term memory recurrent neural network architectures, 2014.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the cell state, H.
        num_layers: layers; each takes the output of the one before, L.
        bias: whether there are b_ih and b_hh.
        batch_first: whether input and output are (B, T, features). The states are (.., B, ..) either way.
        dropout: probability of zeroing an element of a layer's output, but for the last layer's, in training.
        bidirectional: whether a second half of each layer runs from the last step to the first: D is 2 or 1.
        proj_size: features of the hidden state if it is projected, smaller than hidden_size; 0 for no
            projection. R is proj_size, or hidden_size if that is 0.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.
        grad_clip: bound of the gradients of h_t and c_t at every step of the backward pass; no bound if None.
        truncate: backpropagation through time goes over at most so many steps: no gradient of a state crosses
            between the steps t - 1 and t where t is a multiple of it. All cross if None.
        memory: "fast", "recompute" or "checkpoint:k": what is kept for the backward pass, see below.

    Inputs:
        - `input`: (T, B, I); (B, T, I) if `batch_first`; (T, I) for one sequence without a batch; or a
          `torch.nn.utils.rnn.PackedSequence`, sorted or not. Any strides; it is not copied.
        - `hx`: (h_0, c_0) of shapes `(L*D, B, R)` and `(L*D, B, H)`, without B for an input without a batch.
          Zeros if None.
        - `lengths`: int64 or int32 (B), on any device, in any order, 0 to T: row b has the steps t <
          lengths[b]. Behind them its output is zero and its input reaches nothing; its last state is the one
          after them, and the backward direction begins with the last of them. None: all have all steps.
        - `resets`: bool (T, B), also if `batch_first`: true where an episode begins. No state and no gradient
          of one crosses between the steps t - 1 and t, so that the state before step t is zero (h_0 too, if t
          is 0), and in the backward direction that before step t - 1. None: no episode begins.

    Returns:
        output, (h_n, c_n): the last layer's h_t for all t, `(T, B, D*R)`, laid out and packed like the input,
        both directions side by side; and the states after the last step, with the shapes of hx.

    Raises:
        ValueError: an input of the wrong rank, or of another dtype than the parameters; another `memory`.
        AttributeError: an input or states that are no tensors, as in torch.nn.
        IndexError: one state instead of two.
        TypeError: a grad_clip that is no number, a truncate that is no int.
        RuntimeError: wrong sizes of input or states, states of another dtype, mixed devices, a sequence of no
            steps, batch_sizes that do not fit, lengths or resets of another shape or dtype or without
            a batch, lengths of a packed input or not in 0..T, grad_clip below 0, truncate below 1; a third
            derivative, forward mode over forward mode, or a second derivative with grad_clip.
        NotImplementedError: a device, or a tensor layout, for which there is no kernel.

    Attributes:
        weight_ih_l[k]: (4H, I), for layers k > 0 `(4H, D*R)`; rows in the order i, f, g, o.
        weight_hh_l[k]: (4H, R).
        bias_ih_l[k], bias_hh_l[k]: (4H).
        weight_hr_l[k]: (R, H), if proj_size > 0.
        Each also with the suffix _reverse if bidirectional. All start uniform in +-1/sqrt(H), as in torch.nn
        for the same seed; state_dicts go both ways.

    Saved for the backward pass, when any gradient is needed: the input, the weights, the initial states and
    the output of each layer (no copies), and i, f, g, o, c of every step, 5 * T * B * H elements per
    direction. None of these may be changed in place before the backward pass. In inference nothing is saved.

    Example:
        >>> lstm = fastseq.LSTM(10, 20, num_layers=2)
        >>> input, h_0, c_0 = torch.randn(5, 3, 10), torch.zeros(2, 3, 20), torch.zeros(2, 3, 20)
        >>> output, (h_n, c_n) = lstm(input, (h_0, c_0))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
        >>> output.sum().backward()
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        grad_clip: float | None = None,
        truncate: int | None = None,
        memory: str = "fast",
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._set_options(grad_clip, truncate, memory)

    def _run(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        batch_sizes: Tensor | None,
        **rows: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return functional.lstm(
            input,
            self._weights(),
            hx,
            batch_sizes=batch_sizes,
            **rows,
            **self._shared(),
        )
