from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..checks import problem
from .base import RecurrentModule


class GRU(RecurrentModule):
    r"""Gated recurrent units over a sequence, in place of `torch.nn.GRU`.

    For each step t of each layer, with x_t the input of the layer:

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))      reset_after=True, as in torch.nn
        n = tanh(W_in x_t + b_in + W_hn (r * h_{t-1}) + b_hn)      reset_after=False, as in the paper
        h_t = (1 - z) * n + z * h_{t-1}

    K. Cho et al., Learning phrase representations using RNN encoder-decoder for statistical machine
    translation, EMNLP 2014.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the hidden state, H.
        num_layers: layers; each takes the output of the one before, L.
        bias: whether there are b_ih and b_hh.
        batch_first: whether input and output are (B, T, features). The state is (.., B, ..) either way.
        dropout: probability of zeroing an element of a layer's output, but for the last layer's, in training.
        bidirectional: whether a second half of each layer runs from the last step to the first: D is 2 or 1.
        proj_size: there for torch.nn's order of arguments; must be 0, only LSTM has projections.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.
        grad_clip: bound of the gradients of h_t at every step of the backward pass; no bound if None.
        truncate: backpropagation through time goes over at most so many steps: no gradient of a state crosses
            between the steps t - 1 and t where t is a multiple of it. All cross if None.
        memory: "fast", "recompute" or "checkpoint:k": what is kept for the backward pass, see below.
        reset_after: whether the reset gate acts after the recurrent product or before it. The parameters are
            the same; a model trained with one is not valid with the other.

    Inputs:
        - `input`: (T, B, I); (B, T, I) if `batch_first`; (T, I) for one sequence without a batch; or a
          `torch.nn.utils.rnn.PackedSequence`, sorted or not. Any strides; it is not copied.
        - `hx`: h_0 of shape `(L*D, B, H)`, without B for an input without a batch. Zeros if None.
        - `lengths`: int64 or int32 (B), on any device, in any order, 0 to T: row b has the steps t <
          lengths[b]. Behind them its output is zero and its input reaches nothing; its last state is the one
          after them, and the backward direction begins with the last of them. None: all have all steps.
        - `resets`: bool (T, B), also if `batch_first`: true where an episode begins. No state and no gradient
          of one crosses between the steps t - 1 and t, so that the state before step t is zero (h_0 too, if t
          is 0), and in the backward direction that before step t - 1. None: no episode begins.

    Returns:
        output, h_n: the last layer's h_t for all t, `(T, B, D*H)`, laid out and packed like the input, both
        directions side by side; and the state after the last step, with the shape of hx.

    Raises:
        ValueError: an input of the wrong rank, or of another dtype than the parameters; another `memory`.
        AttributeError: an input or a state that is no tensor, as in torch.nn.
        TypeError: a grad_clip that is no number, a truncate that is no int.
        RuntimeError: wrong sizes of input or state, a state of another dtype, mixed devices, a sequence of no
            steps, batch_sizes that do not fit, lengths or resets of another shape or dtype or without
            a batch, lengths of a packed input or not in 0..T, grad_clip below 0, truncate below 1; a third
            derivative, forward mode over forward mode, or a second derivative with grad_clip.
        NotImplementedError: a device, or a tensor layout, for which there is no kernel.

    Attributes:
        weight_ih_l[k]: (3H, I), for layers k > 0 `(3H, D*H)`; rows in the order r, z, n.
        weight_hh_l[k]: (3H, H).
        bias_ih_l[k], bias_hh_l[k]: (3H).
        Each also with the suffix _reverse if bidirectional. All start uniform in +-1/sqrt(H), as in torch.nn
        for the same seed; state_dicts go both ways.

    Saved for the backward pass, when any gradient is needed: the input, the weights, the initial state and
    the output of each layer (no copies), and r, z, n of every step, with reset_after also W_hn h + b_hn: 4
    (or 3) * T * B * H elements per direction. None of these may be changed in place before the backward pass.
    In inference nothing is saved.

    Example:
        >>> gru = fastseq.GRU(10, 20, batch_first=True, bidirectional=True)
        >>> output, h_n = gru(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 40]), torch.Size([2, 3, 20]))
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
        reset_after: bool = True,
        grad_clip: float | None = None,
        truncate: int | None = None,
        memory: str = "fast",
    ) -> None:
        if proj_size:
            raise ValueError(
                problem(f"proj_size={proj_size} for GRU", "proj_size with LSTM only", "proj_size=0")
            )
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.reset_after = reset_after
        self._set_options(grad_clip, truncate, memory)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def _run(
        self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, **rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return functional.gru(
            input,
            self._weights(),
            hx,
            reset_after=self.reset_after,
            batch_sizes=batch_sizes,
            **rows,
            **self._shared(),
        )
