"""README's section on GPUs, from the results.json of gpu_run.py; report.py puts it between its markers."""

from __future__ import annotations

import gpu_grid
import gpu_summary
import grid
from readme import ratio, table
from summary import answer, geometric_mean, select

NOT_TIMED = """\
The CUDA kernels have been tested on their host twin only, which runs the same source on the CPU; they have
not been timed on a GPU yet. `scripts/gpu_report.sh` does that, see
[CONTRIBUTING.md](CONTRIBUTING.md#measure-on-a-gpu)."""


def ratio_table(records):
    """One row per cell and hidden size, one column per dtype and mode; means over the batch sizes."""
    columns = [
        (dtype, mode)
        for dtype in gpu_grid.DTYPES
        for mode in grid.MODES
        if select(records, dtype=dtype, mode=mode)
    ]

    def row(label, chosen, form="{}"):
        values = [ratio(chosen, dtype=dtype, mode=mode) for dtype, mode in columns]
        return [form.format(label), *(form.format(value) if value else "" for value in values)]

    cells, records = select(records, group="cells"), gpu_summary.of_grid(records)
    single, stacked = select(records, layers=1), select(records, layers=2)
    rows = [
        row(f"{cell}, H {hidden}", select(single, cell=cell, hidden=hidden))
        for cell in gpu_grid.CELLS
        for hidden in sorted({r["hidden"] for r in select(single, cell=cell)})
    ]
    rows += [
        row(f"{cell}, H {gpu_grid.STACKED_HIDDEN}, two layers, bidirectional", select(stacked, cell=cell))
        for cell in gpu_grid.CELLS
        if select(stacked, cell=cell)
    ]
    if select(records, cell="RNN"):
        rows.append(row("RNN, three shapes", select(records, cell="RNN")))
    rows.append(row("geometric mean", records, "**{}**"))
    if cells:
        rows.append(row("one step of a cell, not in the mean", cells))
    return table(["", *(f"{dtype} {mode}" for dtype, mode in columns)], rows)


def goal_table(goals):
    rows = [[r["goal"], r["asked"], r["measured"], answer(r)] for r in goals]
    return table(["goal", "asked", "measured", "reached"], rows)


def measured_on(results):
    facts = results["environment"]
    measured, planned = len(results["cases"]), results["planned"]
    part = "" if measured == planned else f"; {measured} of {planned} cases"
    return (
        f"{facts['gpu']}, driver {facts['driver']}; torch {facts['torch']}, cuDNN {facts['cudnn']}, "
        f"Python {facts['python']}; {facts['date'][:10]}, commit {(facts['commit'] or 'none')[:7]}{part}"
    )


def section(runs):
    """What stands between the markers; `runs` are (folder as README names it, results), the newest first."""
    if not runs:
        return NOT_TIMED
    (folder, results), *others = runs
    records = results["cases"]
    steps = max(r["steps"] for r in records)
    batches = ", ".join(map(str, gpu_grid.BATCHES))
    lines = [
        f"Times as fast as `torch.nn` on cuDNN, {steps} steps, input as wide as the network, geometric mean",
        f"over batches of {batches}; float32 as torch does it by default, on cuDNN with tf32:",
        "",
        *ratio_table(records),
        "",
        "What was aimed at:",
        "",
        *goal_table(gpu_summary.goals(records)),
        "",
        f"Measured on {measured_on(results)}.",
        "CUDA events, both libraries in turn in one process, median of the ratios of neighbouring samples;",
        "the product with the input is in the time of both; training is forward and backward with the",
        "gradients of input and parameters.",
    ]
    if results["ceilings"]:
        copy, product = results["ceilings"].values()
        lines += [
            f"The same GPU copies {copy:.1f} TB/s within its memory, and multiplies 8192 x 8192 matrices of "
            f"bfloat16 at {product:.0f} TFLOP/s."
        ]
    lines += [
        f"Every number: [{folder}/results.json]({folder}/results.json).",
        "",
        f"![Ratio to cuDNN]({folder}/ratio_inference.png)",
    ]
    for _, other in others:
        mean = geometric_mean(gpu_summary.of_grid(other["cases"]))
        lines += ["", f"On {measured_on(other)}: geometric mean {mean:.2f}x."]
    return "\n".join(lines)
