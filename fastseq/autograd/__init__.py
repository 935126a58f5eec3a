"""Gradients of the operators: one layer, and one step of a cell."""

from .recurrent import recurrent, recurrent_cell

__all__ = ["recurrent", "recurrent_cell"]
