"""Gradients of the operators: one recurrent layer, one step of a cell, and attention."""

from .attention import attention
from .function import needs_gradient, recording
from .recurrent import recurrent, recurrent_cell

__all__ = ["attention", "needs_gradient", "recording", "recurrent", "recurrent_cell"]
