"""Recurrent networks and attention for PyTorch as fused kernels, with the interface of torch.nn.

>>> import fastseq, torch
>>> lstm = fastseq.LSTM(input_size=8, hidden_size=16)
>>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 8))
>>> output.shape
torch.Size([5, 3, 16])
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  before the compiled module, so that both share one pool of OpenMP threads

try:
    import fastseq._C  # noqa: F401
except ModuleNotFoundError as _error:
    raise ImportError(
        f"given: the package fastseq in {__path__[0]} without its compiled module fastseq._C\n"
        "accepted: an installed fastseq\n"
        "try: pip install . in the source directory, then import it from another directory"
    ) from _error

from . import functional, integrations
from .attention import scaled_dot_product_attention
from .config import show_config
from .convert import convert, revert
from .explain import explain
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, MultiheadAttention, RNNCell
from .patch import patched

__version__ = _version("fastseq")
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "MultiheadAttention",
    "RNNCell",
    "__version__",
    "convert",
    "distributed",
    "explain",
    "functional",
    "integrations",
    "patched",
    "revert",
    "scaled_dot_product_attention",
    "show_config",
]


def __getattr__(name: str) -> object:
    if name == "distributed":  # imported when it is first used, for few need it
        return _import_module("fastseq.distributed")
    raise AttributeError(f"module 'fastseq' has no attribute {name!r}")
