"""Gradients of the operators: one recurrent layer, one step of a cell, and attention."""

from .attention import attention
from .recurrent import recurrent, recurrent_cell

__all__ = ["attention", "recurrent", "recurrent_cell"]
