"""One step at a time: the cells of RNN, LSTM and GRU, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from .. import functional


class Cell(RNNCellBase):
    """What the cells share: parameters read by name at every call."""

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        # Module.__getattr__ is slow beside a small cell; it serves the parametrized and the replaced ones.
        p = self._parameters
        try:
            return p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]  # type: ignore[return-value]
        except KeyError:
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh


class LSTMCell(Cell):
    r"""One step of an LSTM, in place of `torch.nn.LSTMCell`.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh   (W_ig x + b_ig + W_hg h + b_hg)        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f * c + i * g                                h' = o * tanh(c')

    S. Hochreiter and J. Schmidhuber, Long short-term memory, Neural Computation 9(8), 1997.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the states, H.
        bias: whether there are bias_ih and bias_hh.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.

    Inputs:
        - `input`: (B, I), or (I) without a batch.
        - `hx`: (h, c), each (B, H), or (H) without a batch. Zeros if None.

    Returns:
        (h', c'), with the shapes of hx.

    Raises:
        ValueError: input or a state that has neither 1 nor 2 dimensions.
        AttributeError: input or a state that is no tensor, as in torch.nn.
        RuntimeError: wrong sizes, mixed dtypes or devices; a third derivative, or forward mode over forward
            mode.
        NotImplementedError: a device, or a tensor layout, for which there is no kernel.

    Attributes:
        weight_ih (4H, I), weight_hh (4H, H), bias_ih and bias_hh (4H): rows in the order i, f, g, o.

    Saved for the backward pass, when any gradient is needed: all of the above, h' and i, f, g, o, c'.

    Example:
        >>> cell = fastseq.LSTMCell(10, 20)
        >>> h, c = torch.zeros(3, 20), torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h, c = cell(x, (h, c))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return functional.lstm_cell(input, hx, *self._weights())


class GRUCell(Cell):
    r"""One step of a GRU, in place of `torch.nn.GRUCell`.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     reset_after=True, as in torch.nn
        n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)     reset_after=False, as in the paper
        h' = (1 - z) * n + z * h

    K. Cho et al., Learning phrase representations using RNN encoder-decoder for statistical machine
    translation, EMNLP 2014.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: whether there are bias_ih and bias_hh.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.
        reset_after: whether the reset gate acts after the recurrent product or before it.

    Inputs:
        - `input`: (B, I), or (I) without a batch.
        - `hx`: h (B, H), or (H) without a batch. Zeros if None.

    Returns:
        h', with the shape of hx.

    Raises:
        ValueError: input or state that has neither 1 nor 2 dimensions.
        AttributeError: input or a state that is no tensor, as in torch.nn.
        RuntimeError: wrong sizes, mixed dtypes or devices; a third derivative, or forward mode over forward
            mode.
        NotImplementedError: a device, or a tensor layout, for which there is no kernel.

    Attributes:
        weight_ih (3H, I), weight_hh (3H, H), bias_ih and bias_hh (3H): rows in the order r, z, n.

    Saved for the backward pass, when any gradient is needed: all of the above, h', r, z, n and, with
    reset_after, W_hn h + b_hn.

    Example:
        >>> cell = fastseq.GRUCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self.reset_after = reset_after

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return functional.gru_cell(input, hx, *self._weights(), reset_after=self.reset_after)


class RNNCell(Cell):
    r"""One step of an Elman network, in place of `torch.nn.RNNCell`.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)          or relu(...)

    J. L. Elman, Finding structure in time, Cognitive Science 14(2), 1990.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: whether there are bias_ih and bias_hh.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.

    Inputs:
        - `input`: (B, I), or (I) without a batch.
        - `hx`: h (B, H), or (H) without a batch. Zeros if None.

    Returns:
        h', with the shape of hx.

    Raises:
        ValueError: input or state that has neither 1 nor 2 dimensions.
        AttributeError: input or a state that is no tensor, as in torch.nn.
        RuntimeError: wrong sizes, mixed dtypes or devices, another nonlinearity; a third derivative, or
            forward mode over forward mode.
        NotImplementedError: a device, or a tensor layout, for which there is no kernel.

    Attributes:
        weight_ih (H, I), weight_hh (H, H), bias_ih and bias_hh (H).

    Saved for the backward pass, when any gradient is needed: all of the above and h'.

    Example:
        >>> cell = fastseq.RNNCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return functional.rnn_cell(input, hx, *self._weights(), nonlinearity=self.nonlinearity)
