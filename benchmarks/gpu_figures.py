"""The figures of a GPU run: the ratio to cuDNN over the whole grid, and the time of a step.

Two of each, for inference and for training. Rows are cells, columns are dtypes.
"""

from __future__ import annotations

from math import log

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no display

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

import gpu_grid
import gpu_summary
import grid
from figures import finish
from summary import geometric_mean, select

# Blue is faster than cuDNN, orange slower; the two hues are those of the CPU figures.
RATIOS = LinearSegmentedColormap.from_list(
    "ratio",
    [
        (0, "#b3450c"),
        (0.25, "#ee7733"),
        (0.5, "#f7f7f7"),
        (0.68, "#99ccee"),
        (0.85, "#0077bb"),
        (1, "#004a75"),
    ],
)
LEAST, MOST = 0.5, 4.0  # where the colours end
BATCH_COLORS = dict(zip(gpu_grid.BATCHES, plt.get_cmap("viridis")([0, 0.22, 0.45, 0.68, 0.9]), strict=True))
HANDED_OVER = "*"


def caption(results, steps):
    facts = results["environment"]
    gap = f", {len(results['cases'])} of {results['planned']} cases" if not results["complete"] else ""
    return (
        f"{facts['gpu']}, driver {facts['driver']}; torch {facts['torch']}, cuDNN {facts['cudnn']}, "
        f"fastseq {facts['fastseq']}, commit {(facts['commit'] or 'none')[:7]}; {facts['date'][:10]}{gap}\n"
        f"T = {steps} steps, input as wide as the network, its product included; one layer, one direction"
    )


def dtype_title(results, dtype):
    tf32 = dtype == "float32" and results["environment"]["tf32"]["cudnn"]
    return "float32 (cuDNN: tf32)" if tf32 else dtype


def panels():
    """A figure with a panel per cell and dtype, and {(cell, dtype): axes}."""
    cells, dtypes = gpu_grid.CELLS, gpu_grid.DTYPES
    figure, axes = plt.subplots(
        len(cells), len(dtypes), figsize=(13, 8.6), sharex=True, sharey=True, layout="constrained"
    )
    places = {(cell, dtype): axes[i][j] for i, cell in enumerate(cells) for j, dtype in enumerate(dtypes)}
    return figure, places


def draw_ratios(results, records, mode, path):
    """A field per hidden size and batch size, with the ratio in it."""
    figure, places = panels()
    figure.suptitle(f"Times as fast as torch.nn on cuDNN, {mode}", fontsize=13)
    batches, hidden = gpu_grid.BATCHES, gpu_grid.HIDDEN
    for (cell, dtype), axes in places.items():
        chosen = select(records, cell=cell, dtype=dtype)
        axes.set_facecolor("#e4e4e4")  # what was not measured
        fields = [[float("nan")] * len(batches) for _ in hidden]
        for r in chosen:
            row, column = hidden.index(r["hidden"]), batches.index(r["batch"])
            fields[row][column] = shade = place_in_colours(r["ratio"])
            text = f"{r['ratio']:.2f}" if r["ratio"] < 10 else f"{r['ratio']:.1f}"
            axes.text(
                column,
                row,
                text + (HANDED_OVER if gpu_summary.handed_over(r) else ""),
                ha="center",
                va="center",
                fontsize=9.5,
                color="white" if abs(shade) > 0.6 else "black",
            )
        image = axes.imshow(fields, cmap=RATIOS, vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(batches)), batches)
        axes.set_yticks(range(len(hidden)), hidden)
        axes.tick_params(length=0, labelleft=True, labelbottom=True)
        axes.set_xticks([x + 0.5 for x in range(len(batches) - 1)], minor=True)
        axes.set_yticks([y + 0.5 for y in range(len(hidden) - 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        mean = f": {geometric_mean(chosen):.2f}x (geometric mean)" if chosen else ": not measured"
        axes.set_title(f"{cell}, {dtype_title(results, dtype)}{mean}", fontsize=10)
    label_outer(places, "batch size", "hidden size")
    bar = figure.colorbar(image, ax=list(places.values()), shrink=0.6, aspect=30, pad=0.01)
    ticks = (0.5, 0.7, 0.9, 1, 1.5, 2, 3, 4)
    bar.set_ticks([place_in_colours(t) for t in ticks], labels=[f"{t:g}x" for t in ticks])
    bar.outline.set_visible(False)
    note = "\ngrey: not measured"
    if any(map(gpu_summary.handed_over, records)):
        note += f"; {HANDED_OVER} the plan hands this shape to cuDNN"
    finish(figure, caption(results, records[0]["steps"]) + note, path)


def place_in_colours(ratio):
    """From -1, LEAST and below, over 0, as fast as cuDNN, to 1, MOST and above; logarithmic on both sides."""
    return max(-1.0, -log(ratio) / log(LEAST)) if ratio < 1 else min(1.0, log(ratio) / log(MOST))


def draw_steps(results, records, mode, path):
    """Microseconds a step over the hidden size, a colour per batch size, dashed for cuDNN."""
    figure, places = panels()
    for (cell, dtype), axes in places.items():
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for batch in gpu_grid.BATCHES:
            chosen = sorted(
                select(records, cell=cell, dtype=dtype, batch=batch), key=lambda record: record["hidden"]
            )
            for library, style in (("torch", (0, (3, 2))), ("fastseq", "-")):
                axes.plot(
                    [r["hidden"] for r in chosen],
                    [r["us_per_step"][library] for r in chosen],
                    linestyle=style,
                    marker="o" if library == "fastseq" else None,
                    markersize=3.5,
                    linewidth=1.6 if library == "fastseq" else 1.2,
                    color=BATCH_COLORS[batch],
                )
        axes.set_title(f"{cell}, {dtype_title(results, dtype)}", fontsize=10)
        axes.xaxis.set_major_locator(FixedLocator(gpu_grid.HIDDEN))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(FixedLocator([a * 10**b for b in range(-3, 6) for a in (1, 2, 5)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelleft=True, labelbottom=True, labelsize=8.5)
        axes.set_xlim(gpu_grid.HIDDEN[0] * 0.85, gpu_grid.HIDDEN[-1] * 1.18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    label_outer(places, "hidden size", "us per step")
    keys = [Line2D([], [], color=color, linewidth=2.5) for color in BATCH_COLORS.values()]
    keys += [
        Line2D([], [], color="black", marker="o", markersize=3.5),
        Line2D([], [], color="black", dashes=(3, 2)),
    ]
    names = [f"B {batch}" for batch in BATCH_COLORS] + ["fastseq", "torch.nn on cuDNN"]
    # The title is the legend's, so that the layout keeps them apart.
    figure.legend(
        keys,
        names,
        title=f"Microseconds per time step, {mode}",
        title_fontsize=13,
        loc="outside upper center",
        ncols=len(keys),
        frameon=False,
    )
    finish(figure, caption(results, records[0]["steps"]), path)


def label_outer(places, below, beside):
    for (cell, dtype), axes in places.items():
        if cell == gpu_grid.CELLS[-1]:
            axes.set_xlabel(below)
        if dtype == gpu_grid.DTYPES[0]:
            axes.set_ylabel(beside)


def draw(results, folder):
    """Draw the figures of every mode that has records of the grid; returns their paths."""
    paths = []
    known = [
        r
        for r in results["cases"]
        if r["group"] != "cells"
        and r["cell"] in gpu_grid.CELLS
        and r["layers"] == 1
        and r["hidden"] in gpu_grid.HIDDEN
        and r["batch"] in gpu_grid.BATCHES
    ]
    for mode in grid.MODES:
        records = select(known, mode=mode)
        if records:
            for name, function in (("ratio", draw_ratios), ("step", draw_steps)):
                paths.append(folder / f"{name}_{mode}.png")
                function(results, records, mode, paths[-1])
    return paths
