"""The plans of the CUDA engine for the shapes of the GPU grid, as a table; no GPU is needed.

python benchmarks/plans.py                # print the table
python benchmarks/plans.py --write        # and put it into docs/kernels/recurrent_cuda.md
python benchmarks/plans.py --check        # exit 1 if that file has another one
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch

import gpu_grid
import readme
from fastseq import _C
from fastseq.checks import CELLS, DTYPES

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels" / "recurrent_cuda.md"
H200 = (9, 0, 132, 232448, 62914560)
BATCHES = (1, 16, 64, 256)
# Two products a step, of 16-bit numbers: name, cell, and hidden units for each of the projection.
TWO_PRODUCTS = (("GRU reset before", "GRU_RESET_BEFORE", 0), ("LSTM projected to H / 2", "LSTM", 2))


def plan(cell, dtype, batch, hidden, backward, projected=0):
    tf32 = dtype == "float32"
    code = DTYPES[getattr(torch, dtype)]
    shape = (gpu_grid.STEPS, batch, hidden, projected, 1, False, backward)
    return _C.loop_plan(CELLS[cell].code, code, tf32, *shape, H200, "").describe()


def word(plan):
    time = f"{plan['microseconds']:.1f}"
    if plan["kernel"] == "steps":
        return f"steps, {time}"
    return f"{plan['kernel']} {plan['blocks']} x {plan['rows']}, {time}"


def table():
    lines = [
        "| layer | " + " | ".join(f"B = {batch}" for batch in BATCHES) + " |",
        "| --- |" + " --- |" * len(BATCHES),
    ]
    layers = [(cell, cell, 0, dtype) for cell in gpu_grid.CELLS for dtype in ("bfloat16", "float32")]
    layers += [(*layer, "bfloat16") for layer in TWO_PRODUCTS]
    for (layer, cell, part, dtype), backward in product(layers, (False, True)):
        for hidden in gpu_grid.HIDDEN:
            projected = hidden // part if part else 0
            name = f"{layer} {dtype} {'backward' if backward else 'forward'} H = {hidden}"
            cells = [word(plan(cell, dtype, batch, hidden, backward, projected)) for batch in BATCHES]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    parser.add_argument("--check", action="store_true", help=f"whether {DOCUMENT.name} has this table")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print(table())
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    changed = readme.replace_section(text, "plans", table(), DOCUMENT)
    if arguments.write:
        DOCUMENT.write_text(changed, encoding="utf-8")
        return 0
    if text != changed:
        print(f"{DOCUMENT.name} is not up to date; run python benchmarks/plans.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
