"""What is measured on a GPU: one grid of shapes, against torch.nn on cuDNN.

The input is as wide as the network, its product with weight_ih is part of the time on both sides, and
float32 is what torch makes of it by default: tf32 in cuDNN's recurrent networks.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch

import grid

STEPS = 512
BATCHES = (1, 8, 16, 64, 256)
HIDDEN = (64, 128, 256, 512, 768, 1024, 2048)
DTYPES = ("float32", "float16", "bfloat16")
CELLS = ("LSTM", "GRU")  # measured everywhere
RNN_AT = ((16, 256), (64, 512), (256, 1024))  # batch, hidden size: a small, a middling and a large network
STACKED_HIDDEN = 512  # two layers, bidirectional
CELL_BATCHES, CELL_HIDDEN, CELL_DTYPES = (1, 8, 64), (128, 512), ("float32", "bfloat16")  # one step of a cell
REFERENCE_ROWS = 4  # of the batch, computed in float64: rows do not depend on each other


@dataclass(frozen=True)
class Case(grid.Case):
    @property
    def name(self):
        cell = self.cell + ("Cell" if self.group == "cells" else "")
        return f"{cell} {self.mode} {self.dtype} {self.shape.name}"

    def reference(self, device):
        """torch.nn's output in float64, from the same weights and input, for the first rows of the batch."""
        x, _ = self.inputs(device)
        module = copy.deepcopy(self.modules(device)[0]).double()
        with torch.inference_mode():
            return module(x[:, :REFERENCE_ROWS].double())[0]


def goal_cases(steps=STEPS):
    """The cases that a goal of its own is set for, see gpu_summary.py; measured first."""
    best_of_cudnn = grid.Shape(steps, 16, 768, 768)
    small = grid.Shape(steps, 16, 256, 256)
    chosen = [("LSTM", best_of_cudnn, "float16"), ("LSTM", small, "bfloat16"), ("GRU", small, "bfloat16")]
    return [Case("gpu", cell, mode, shape, dtype) for cell, shape, dtype in chosen for mode in grid.MODES]


def cell_cases():
    """One step of a cell with the state of the step before; training is forward and backward."""
    return [
        Case("cells", cell, mode, grid.Shape(1, batch, hidden, hidden), dtype)
        for hidden in CELL_HIDDEN
        for batch in CELL_BATCHES
        for cell in grid.CELLS
        for dtype in CELL_DTYPES
        for mode in grid.MODES
    ]


def cases(steps=STEPS):
    """Every case: those with a goal, then the others in an order that is random, but always the same.

    So a run that is cut off has measured a fair sample, and its geometric mean is near that of the whole.
    """
    single = [grid.Shape(steps, batch, hidden, hidden) for hidden in HIDDEN for batch in BATCHES]
    rnn = [grid.Shape(steps, batch, hidden, hidden) for batch, hidden in RNN_AT]
    stacked = [
        grid.Shape(steps, batch, STACKED_HIDDEN, STACKED_HIDDEN, layers=2, bidirectional=True)
        for batch in BATCHES
    ]
    every = [
        Case("gpu", cell, mode, shape, dtype)
        for cells, shapes in ((CELLS, single), (["RNN"], rnn), (CELLS, stacked))
        for shape in shapes
        for cell in cells
        for dtype in DTYPES
        for mode in grid.MODES
    ]
    every += cell_cases()
    first = goal_cases(steps)
    others = [case for case in every if case not in first]
    random.Random(0).shuffle(others)
    return first + others


def smoke_cases():
    """Small cases that touch every cell, dtype and kind of kernel, for a look before the long stages."""
    shapes = [
        grid.Shape(5, 3, 20, 33),
        grid.Shape(4, 8, 64, 256),
        grid.Shape(3, 20, 64, 1024),
        grid.Shape(4, 5, 24, 64, layers=2, bidirectional=True),
    ]
    return [
        Case("gpu", cell, "training", shape, dtype)
        for shape in shapes
        for cell in grid.CELLS
        for dtype in DTYPES
    ]
