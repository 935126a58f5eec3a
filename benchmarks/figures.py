"""The figures of a run: speed-up per shape, and share of the machine's peak."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no display

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

import grid
import summary

COLORS = {"RNN": "#33bbee", "LSTM": "#0077bb", "GRU": "#009988", "torch": "#ee7733", "fastseq": "#0077bb"}
COLORS |= {"full": "#0077bb", "causal": "#009988"}
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)


@dataclass(frozen=True)
class Series:
    """What the bars of a figure tell apart, and the words for it."""

    key: str  # of a record
    names: tuple[str, ...]
    against: str
    shapes: str  # how the names of shapes are read

    def of(self, records):
        return [name for name in self.names if summary.select(records, **{self.key: name})]


RECURRENT = Series(
    "cell", grid.CELLS, "torch.nn", "T steps, B sequences, input size -> hidden size, x layers"
)


def caption(environment, series):
    return (
        f"{environment['cpu']}, {environment['isa']}, {environment['threads']} threads; "
        f"torch {environment['torch']}, fastseq {environment['fastseq']}; {environment['date'][:10]}\n"
        f"{series.shapes}"
    )


def finish(figure, text, path):
    """Write the caption below the figure, and the figure into its file."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def add_title(figure, axes, title):
    """The title and below it the legend; one object, so that the layout keeps them apart."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=title,
        title_fontsize=13,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
    )


def grouped_bars(axes, rows, series, value, start, label):
    """Horizontal bars: for each row one of every series, `value(row, name)` long (None: no bar)."""
    height = 0.8 / len(series)
    for i, name in enumerate(series):
        for position, row in enumerate(rows):
            length = value(row, name)
            if length is None:
                continue
            y = position + (i - (len(series) - 1) / 2) * height
            axes.barh(y, length - start, height * 0.92, left=start, color=COLORS[name])
            end = (max(length, start), y)
            axes.annotate(
                label(length), end, (3, 0), textcoords="offset points", va="center", fontsize=7.5, bbox=LABEL
            )
        axes.barh([0], [0], color=COLORS[name], label=name)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def draw_speedup(records, title, environment, path, series=RECURRENT):
    """One panel per mode, one row per shape, a bar of each series, on a logarithmic axis from 1."""
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    names = series.of(records)
    modes = [mode for mode in grid.MODES if summary.select(records, mode=mode)]
    ratio = {(r["mode"], r["shape"], r[series.key]): r["ratio"] for r in records}
    figure, panels = plt.subplots(
        1,
        len(modes),
        figsize=(2.2 + 4.6 * len(modes), 1.6 + len(shapes) * (0.2 + 0.19 * len(names))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    low, high = min(0.8, *ratio.values()) * 0.9, max(2, *ratio.values()) * 1.35
    for axes, mode in zip(panels[0], modes, strict=True):
        axes.set_xscale("log")
        axes.set_xlim(low, high)

        def value(shape, name, mode=mode):
            return ratio.get((mode, shape, name))

        grouped_bars(axes, shapes, names, value, 1, "{:.2f}".format)
        axes.axvline(1, color="black", linewidth=1, zorder=1.5)
        axes.xaxis.set_major_locator(FixedLocator([t for t in TICKS if low < t < high]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}x")
        mean = summary.geometric_mean(summary.select(records, mode=mode))
        axes.set_title(f"{mode}: {mean:.2f}x (geometric mean)", fontsize=10)
        axes.set_xlabel(f"times as fast as {series.against}")
    add_title(figure, panels[0][0], f"Speed-up over {series.against}, {title}")
    finish(figure, caption(environment, series), path)


def draw_share(records, title, environment, path, series=RECURRENT):
    """One panel for each of the series and mode, one row per shape, one bar for torch and one for fastseq."""
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    names = series.of(records)
    modes = [mode for mode in grid.MODES if summary.select(records, mode=mode)]
    share = {(r[series.key], r["mode"], r["shape"]): r["share"] for r in records}
    figure, panels = plt.subplots(
        len(modes),
        len(names),
        figsize=(2.6 + 3.2 * len(names), 1.2 + len(modes) * (0.7 + 0.36 * len(shapes))),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for mode, line in zip(modes, panels, strict=True):
        for name, axes in zip(names, line, strict=True):

            def value(shape, library, name=name, mode=mode):
                return share.get((name, mode, shape), {}).get(library)

            grouped_bars(axes, shapes, ("torch", "fastseq"), value, 0, "{:.0%}".format)
            axes.set_xlim(0, max(1.12, *(1.1 * value for pair in share.values() for value in pair.values())))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.axvline(1, color="black", linewidth=1, zorder=1.5)
            axes.set_title(f"{name}, {mode}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("share of the FMA peak beside it")
    add_title(figure, panels[0][0], f"Share of the machine's peak, {title}")
    finish(figure, caption(environment, series), path)


def draw(results, folder):
    """Draw every figure that the records allow; returns their paths."""
    paths = []
    for group, title in summary.GROUPS.items():
        records = summary.select(results["cases"], group=group)
        if not records:
            continue
        paths.append(folder / f"speedup_{group}.png")
        draw_speedup(records, title, results["environment"], paths[-1])
        if group in ("table", "bfloat16"):
            paths.append(folder / f"share_of_peak_{group}.png")
            draw_share(records, title, results["environment"], paths[-1])
    return paths
