"""What the records of a run say: means, worst cases, and which of the project's own rules are broken.

A record is one case of results.json, see run.py.
"""

from __future__ import annotations

import statistics

import grid

GROUPS = {
    "table": "float32, the table's shapes",
    "other": "float32, other shapes",
    "reset_before": "float32, GRU that resets before the product (against torch's GRU)",
    "cells": "float32, one step of a cell",
    "bfloat16": "bfloat16, the table's shapes",
}
GOAL = {"table": 3.0, "cells": 2.0, "bfloat16": 2.5}  # geometric mean of the ratios, at least
SLOWEST = {"table": 1.0, "other": 1.0, "reset_before": 1.0, "cells": 1.2}  # any ratio, at least
ROOM = 0.70  # where torch is under this share of the peak ...
SLOWEST_WITH_ROOM = 1.4  # ... the ratio is at least this; for sequences, not for cells
LARGEST_SHARE = 0.87  # of the peak, reached at the two largest shapes
BUSY = 0.1  # cores that other programs may use before a result counts as disturbed
DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}  # of outputs and gradients, relative to each tensor's largest


def geometric_mean(records):
    return statistics.geometric_mean(r["ratio"] for r in records)


def select(records, **wanted):
    return [r for r in records if all(r[key] == value for key, value in wanted.items())]


def is_largest(record):
    return record["shape"] in [shape.name for shape in grid.LARGEST]


def broken_rules_of_case(record):
    group, ratio, share = record["group"], record["ratio"], record["share"]
    if ratio < SLOWEST.get(group, 0):
        yield f"{ratio:.2f}x, at least {SLOWEST[group]}x is wanted"
    elif group in SLOWEST and group != "cells" and ratio < SLOWEST_WITH_ROOM and share["torch"] < ROOM:
        yield f"{ratio:.2f}x, {SLOWEST_WITH_ROOM}x is wanted as torch uses {share['torch']:.0%} of the peak"
    if group == "table" and is_largest(record) and share["fastseq"] < LARGEST_SHARE:
        yield f"{share['fastseq']:.1%} of the peak, {LARGEST_SHARE:.0%} is wanted"
    if record["difference"] is not None and not record["difference"] <= DIFFERENCE[record["dtype"]]:
        yield f"results differ by {record['difference']:.1e} of the largest value"


def broken_rules(records):
    broken = [f"{r['name']}: {rule}" for r in records for rule in broken_rules_of_case(r)]
    for group, goal in GOAL.items():
        chosen = select(records, group=group)
        mean = geometric_mean(chosen) if chosen else goal
        if mean < goal:
            broken.append(f"{group}: geometric mean {mean:.2f}x, at least {goal}x is wanted")
    return broken


def row(label, records):
    worst = min(records, key=lambda r: r["ratio"])
    name = worst["name"].partition(": ")[2]
    return f"{label:34}{geometric_mean(records):7.2f}x {worst['ratio']:7.2f}x   {name}"


def goal(text, asked, values, reached, form):
    """A row: what is wanted and what was measured, or that nothing was (reached is None then)."""
    if not values:
        return {"goal": text, "asked": asked, "measured": "not measured", "reached": None}
    measured = " / ".join(form(value) for value in values)
    return {"goal": text, "asked": asked, "measured": measured, "reached": all(map(reached, values))}


def answer(row):
    return {None: "?", True: "yes", False: "no"}[row["reached"]]


def goal_lines(goals):
    rows = [("goal", "asked", "measured", "reached")]
    rows += [(r["goal"], r["asked"], r["measured"], answer(r)) for r in goals]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        yield " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def reset_before_against_after(records):
    """Speed of the reset-before GRU as a multiple of the other's, both through torch's time beside them."""
    after = {(r["mode"], r["shape"]): r["ratio"] for r in select(records, group="table", cell="GRU")}
    before = select(records, group="reset_before")
    pairs = [r["ratio"] / after[r["mode"], r["shape"]] for r in before if (r["mode"], r["shape"]) in after]
    return statistics.geometric_mean(pairs) if pairs else None


def mean_lines(records):
    yield f"{'':34}{'speed-up':>8} {'worst':>8}"
    yield row("all cases", records)
    for group, title in GROUPS.items():
        chosen = select(records, group=group)
        if not chosen:
            continue
        yield from ("", title, row("  all", chosen))
        for key, values in (("cell", grid.CELLS), ("mode", grid.MODES)):
            for value in values:
                part = select(chosen, **{key: value})
                if part and len(part) < len(chosen):
                    yield row(f"  {value}", part)
    relative = reset_before_against_after(records)
    if relative:
        yield from ("", f"reset-before GRU: {relative:.2f} times as fast as the reset-after GRU")


def peak_lines(records):
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        peaks = [p for r in select(records, dtype=dtype) for p in r["peaks"]]
        median, highest = statistics.median(peaks), max(peaks)
        yield f"peak, {dtype}: median {median:.0f}, highest {highest:.0f} GFLOP/s of {len(peaks)} readings"


def largest_lines(records):
    for r in select(records, group="table"):
        if is_largest(r):
            share = r["share"]
            yield (
                f"  {r['cell']:4} {r['mode']:9} {r['shape']:18} torch {share['torch']:4.0%}, fastseq "
                f"{share['fastseq']:4.0%} of the median peak beside it, "
                f"{r['gflops']['fastseq'] / max(r['peaks']):4.0%} of the highest"
            )


def disturbed_lines(records):
    disturbed = sum((r["others"] or 0) > BUSY for r in records)
    if disturbed:
        yield from (
            "",
            f"DISTURBED: in {disturbed} of {len(records)} cases other programs used more than {BUSY} cores.",
            "Ratios are then wrong, mostly too high: torch's threads wait for each other by spinning.",
            "Run again on an idle machine.",
        )


def text(records):
    """The summary, to print."""
    if not records:
        return "nothing was measured"
    broken = broken_rules(records)
    lines = [*mean_lines(records), "", *peak_lines(records), *largest_lines(records), ""]
    lines += [f"broken rules: {len(broken)}"] + [f"  {rule}" for rule in broken]
    return "\n".join([*lines, *disturbed_lines(records)])
