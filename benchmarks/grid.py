"""What is measured: the cases, each a recurrent network of torch.nn and its fastseq counterpart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fastseq

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
CELLS = tuple(GATES)
MODES = ("inference", "training")


@dataclass(frozen=True)
class Shape:
    steps: int
    batch: int
    input: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False

    @property
    def name(self):
        name = f"T{self.steps} B{self.batch} {self.input}->{self.hidden}"
        name += f" x{self.layers}" if self.layers > 1 else ""
        name += " bidir" if self.bidirectional else ""
        return name + (" batch_first" if self.batch_first else "")


# The shapes that the project is judged by.
TABLE = (
    Shape(100, 1, 128, 256),
    Shape(100, 8, 128, 256),
    Shape(100, 32, 128, 256),
    Shape(100, 64, 512, 512),
    Shape(50, 128, 1024, 1024),
    Shape(200, 16, 64, 128, layers=2),
    Shape(64, 32, 256, 256, layers=2, bidirectional=True),
    Shape(1000, 4, 32, 64),
)
LARGEST = (TABLE[3], TABLE[4])

# Shapes that nobody tuned for: odd sizes, long and short sequences, batch-first input.
OTHER = (
    Shape(60, 24, 200, 320),
    Shape(512, 4, 64, 128),
    Shape(128, 1, 96, 192),
    Shape(37, 13, 70, 129),
    Shape(1, 256, 300, 300),
    Shape(80, 20, 100, 200, batch_first=True),
    Shape(30, 5, 40, 600, bidirectional=True),
    Shape(2000, 2, 16, 24, layers=3),
)

CELL_BATCHES = (1, 6, 48)
CELL_SIZES = ((16, 32), (128, 256), (512, 512))


@dataclass(frozen=True)
class Case:
    group: str  # table, other, reset_before, cells or bfloat16
    cell: str
    mode: str
    shape: Shape
    dtype: str = "float32"

    against = "torch"

    @property
    def facts(self):
        facts = {name: getattr(self, name) for name in ("name", "group", "cell", "mode", "dtype")}
        return facts | {"shape": self.shape.name}

    @property
    def same_results(self):
        """Whether both modules compute the same; the two GRUs of reset_before are different networks."""
        return self.group != "reset_before"

    @property
    def name(self):
        cell = self.cell + ("Cell" if self.group == "cells" else "")
        return f"{self.group}: {cell} {self.mode} {self.shape.name}"

    @property
    def flops(self):
        """Multiplications and additions of the matrix products; training does them three times."""
        shape, directions = self.shape, 1 + self.shape.bidirectional
        inputs = [shape.input] + [directions * shape.hidden] * (shape.layers - 1)
        products = sum(directions * GATES[self.cell] * shape.hidden * (i + shape.hidden) for i in inputs)
        return 2 * shape.steps * shape.batch * products * (3 if self.mode == "training" else 1)

    def modules(self, device="cpu"):
        """(torch.nn's module, fastseq's module), with the same weights."""
        torch.manual_seed(0)
        shape, dtype = self.shape, getattr(torch, self.dtype)
        if self.group == "cells":
            name, sizes, options = self.cell + "Cell", (shape.input, shape.hidden), {}
        else:
            name, sizes = self.cell, (shape.input, shape.hidden, shape.layers)
            options = {"bidirectional": shape.bidirectional, "batch_first": shape.batch_first}
        options["device"] = device  # made there: drawing the weights of a large network takes a CPU long
        # torch.nn has no GRU that resets before the product; its own GRU, of equal work, stands against it.
        extra = {"reset_after": False} if self.group == "reset_before" else {}
        theirs = getattr(torch.nn, name)(*sizes, **options).to(dtype)
        ours = getattr(fastseq, name)(*sizes, **options, **extra).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        return theirs.train(self.mode == "training"), ours.train(self.mode == "training")

    def inputs(self, device="cpu"):
        """The input, and in training the gradient of the output, else None; the same at every call."""
        shape, dtype = self.shape, getattr(torch, self.dtype)
        rows = (shape.batch, shape.steps) if shape.batch_first else (shape.steps, shape.batch)
        rows = (shape.batch,) if self.group == "cells" else rows
        torch.manual_seed(1)
        x = torch.randn(*rows, shape.input, dtype=dtype, device=device)
        if self.mode == "inference":
            return x, None
        return x, torch.randn(*rows, shape.hidden * (1 + shape.bidirectional), dtype=dtype, device=device)

    def functions(self, device="cpu"):
        """(torch's, fastseq's): functions without arguments, one call of each being one measured iteration.

        Each returns what it computed: the output, and in training the gradients of input and parameters.
        """
        x, grad = self.inputs(device)
        hx = self.state(x.dtype, device)
        if self.mode == "training":
            return tuple(trains(module, x, grad, hx) for module in self.modules(device))
        return tuple(infers(module, x, hx) for module in self.modules(device))

    def state(self, dtype, device):
        """A cell is called with the state of the step before, a sequence without any."""
        if self.group != "cells":
            return None
        h, c = torch.randn(2, self.shape.batch, self.shape.hidden, dtype=dtype, device=device).tanh()
        return (h, c) if self.cell == "LSTM" else h


def infers(module, x, hx):
    def call():
        with torch.inference_mode():
            return (output_of(module(x, hx)),)

    return call


def output_of(result):
    """Of a sequence or of a cell, whose state is one tensor or (h, c)."""
    return result[0] if isinstance(result, tuple) else result


def trains(module, x, grad, hx=None):
    x = x.clone().requires_grad_()
    wanted = [x, *module.parameters()]

    def call():
        output = output_of(module(x, hx))
        return output.detach(), *torch.autograd.grad(output, wanted, grad)

    return call


def product(group, shapes, cells=CELLS, modes=MODES, dtype="float32"):
    return [Case(group, cell, mode, shape, dtype) for shape in shapes for cell in cells for mode in modes]


def cases(quick=False):
    """Every case; the quick choice leaves out what takes long or resembles another."""
    if quick:
        heaviest = TABLE[4]
        return (
            product("table", [shape for shape in TABLE if shape != heaviest])
            + product("table", [heaviest], cells=["LSTM"])
            + product("cells", [Shape(1, batch, 128, 256) for batch in CELL_BATCHES], modes=["inference"])
            + product("bfloat16", TABLE[1:3], dtype="bfloat16")
        )
    cells = [Shape(1, batch, *sizes) for sizes in CELL_SIZES for batch in CELL_BATCHES]
    return (
        product("table", TABLE)
        + product("cells", cells, modes=["inference"])
        + product("bfloat16", TABLE, dtype="bfloat16")
        + product("other", OTHER)
        + product("reset_before", TABLE, cells=["GRU"])
    )
