"""Gradients of the operators: one recurrent layer, one step of a cell, and attention."""

from .. import batching  # noqa: F401  it gives the operators their batching rules
from . import registration  # noqa: F401  and it their gradients
from .attention import attention
from .function import needs_gradient, recording
from .recurrent import recurrent, recurrent_cell

__all__ = ["attention", "needs_gradient", "recording", "recurrent", "recurrent_cell"]
