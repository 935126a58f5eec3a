"""The figures of attention on a GPU: TFLOP/s over the length, for inference and for training.

A row is full or causal, a column a dtype and head size; a line is fastseq or one of torch's backends.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no display

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from attention_grid import KINDS
from figures import finish
from gpu_attention_grid import FEATURES, FLOAT32_HEAD_SIZE, HEAD_SIZES
from gpu_attention_summary import grid_of, in_thousands
from grid import MODES

COLUMNS = (*(("bfloat16", size) for size in HEAD_SIZES), ("float32", FLOAT32_HEAD_SIZE))
LINES = {  # label, colour, dashes, width
    "cudnn": ("cuDNN", "#ee7733", (4, 1.5), 1.4),
    "flash": ("flash", "#009988", (1.5, 1.2), 1.4),
    "efficient": ("efficient", "#aa4499", (5, 1.2, 1.2, 1.2), 1.4),
    "fastseq": ("fastseq", "#0077bb", (), 2.2),
}


def caption(results, tokens):
    facts = results["environment"]
    gap = f", {len(results['cases'])} of {results['planned']} cases" if not results["complete"] else ""
    return (
        f"{facts['gpu']}, driver {facts['driver']}; torch {facts['torch']}, cuDNN {facts['cudnn']}, "
        f"fastseq {facts['fastseq']}, commit {(facts['commit'] or 'none')[:7]}; {facts['date'][:10]}{gap}\n"
        f"{in_thousands(tokens)} tokens, heads x D = {FEATURES}; causal counts half the operations, training "
        "three and a half times those of inference; tf32 is not allowed"
    )


def draw_mode(results, records, mode, path):
    figure, places = plt.subplots(
        len(KINDS), len(COLUMNS), figsize=(14, 7.4), sharex=True, squeeze=False, layout="constrained"
    )
    lengths = sorted({r["queries"] for r in records})
    for kind, row in zip(KINDS, places, strict=True):
        for (dtype, size), axes in zip(COLUMNS, row, strict=True):
            draw_panel(axes, grid_of(records, kind=kind, mode=mode, dtype=dtype, head_size=size), lengths)
            axes.set_title(f"{kind}, {dtype}, D = {size}", fontsize=10)
        row[0].set_ylabel("TFLOP/s")
    for column in places.T:
        column[-1].set_xlabel("length S")
    share_limits(places)
    keys = [
        Line2D([], [], color=color, dashes=dashes or (None, None), linewidth=width, marker="o", markersize=4)
        for _, color, dashes, width in LINES.values()
    ]
    # The title is the legend's, so that the layout keeps them apart.
    figure.legend(
        keys[::-1],
        [label for label, *_ in LINES.values()][::-1],
        title=f"Attention, {mode}: TFLOP/s over the length",
        title_fontsize=13,
        loc="outside upper center",
        ncols=len(keys),
        frameon=False,
    )
    finish(figure, caption(results, records[0]["batch"] * records[0]["queries"]), path)


def draw_panel(axes, records, lengths):
    for name, (_, color, dashes, width) in LINES.items():
        ran = [r for r in records if name in r["tflops"]]
        if ran:
            axes.plot(
                [r["queries"] for r in ran],
                [r["tflops"][name] for r in ran],
                color=color,
                dashes=dashes or (None, None),
                linewidth=width,
                marker="o",
                markersize=4,
            )
    if not records:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: in_thousands(round(x)))
    axes.tick_params(labelbottom=True, labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def share_limits(places):
    """The panels of a dtype have one scale, from 0 on, in both rows."""
    for dtype in dict.fromkeys(dtype for dtype, _ in COLUMNS):
        columns = [i for i, (other, _) in enumerate(COLUMNS) if other == dtype]
        panels = [axes for row in places for axes in row[columns]]
        top = max(axes.dataLim.ymax if axes.lines else 0 for axes in panels)
        for axes in panels:
            axes.set_ylim(0, 1.06 * top if top > 0 else 1)


def draw(results, folder):
    """Draw the figure of every mode that has records of the grid; returns their paths."""
    paths = []
    for mode in MODES:
        records = grid_of(results["cases"], mode=mode)
        if records:
            paths.append(folder / f"attention_{mode}.png")
            draw_mode(results, records, mode, paths[-1])
    return paths
