"""What the records of a GPU run say: means, the goals, and the cases that are slow or wrong."""

from __future__ import annotations

import calibration
import gpu_grid
import grid
from summary import geometric_mean, goal, goal_lines, select

SLOW = 0.9  # no case is slower than this against cuDNN, unless the plan hands its shape to cuDNN
# A result counts as wrong if it is further from torch's than this, of each tensor's largest value. float32 is
# tf32 here, on torch's side at least.
DIFFERENCE = {"float32": 2e-2, "float16": 2e-2, "bfloat16": 0.1}
# ... or if its error against float64 is above twice torch's own and this many units in the last place.
UNITS = 4
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TAIL = 15  # lines of a list that is printed


def handed_over(record):
    """Whether the plan gave this case to cuDNN, so that it says nothing of our kernels."""
    return "cudnn" in str(record["plan"] or "").lower()


def is_wrong(record):
    """Whether results are further from torch's, or from float64, than rounding explains; NaN is."""
    dtype, errors = record["dtype"], record["errors"]
    if not record["difference"] <= DIFFERENCE[dtype]:
        return True
    return bool(errors) and not errors["fastseq"] <= 2 * errors["torch"] + UNITS * EPSILON[dtype]


def slow_cases(records):
    slow = [r for r in records if r["ratio"] < SLOW and not handed_over(r)]
    return sorted(slow, key=lambda r: r["ratio"])


def of_grid(records):
    """Sequences; one step of a cell is a group of its own, and in no mean but its own."""
    return [r for r in records if r["group"] != "cells"]


def at(records, cell, dtype, batch, hidden):
    """The one-layer records of a point of the grid, one per mode."""
    return select(records, cell=cell, dtype=dtype, batch=batch, hidden=hidden, layers=1)


def goals(records):
    """The project's goals on an H200, each with what was measured."""

    def mean(chosen):
        return [geometric_mean(chosen)] if chosen else []

    def faster(number):
        return lambda ratio: ratio >= number

    sequences = of_grid(records)
    times, micro = "{:.2f}x".format, "{:.2f} us".format
    gru = [r for r in select(sequences, cell="GRU") if r["hidden"] >= 256]
    best = at(sequences, "LSTM", "float16", 16, 768)
    small = [
        r["us_per_step"]["fastseq"]
        for cell in gpu_grid.CELLS
        for r in select(at(sequences, cell, "bfloat16", 16, 256), mode="inference")
    ]
    slow, wrong = slow_cases(records), [r for r in records if is_wrong(r)]
    modes = " / ".join(r["mode"] for r in best)
    return [
        goal("all sequences, geometric mean", ">= 1.5x", mean(sequences), faster(1.5), times),
        goal("GRU, H >= 256, geometric mean", ">= 2x", mean(gru), faster(2), times),
        goal(
            f"LSTM float16 H768 B16{f', {modes}' if modes else ''}",
            ">= 1x",
            [r["ratio"] for r in best],
            faster(1),
            times,
        ),
        goal(
            "LSTM / GRU bfloat16 H256 B16, a step of inference",
            "<= 1.2 us",
            small,
            lambda us: us <= 1.2,
            micro,
        ),
        goal(
            f"cases under {SLOW}x that the plan does not hand to cuDNN",
            "0",
            [len(slow)] if records else [],
            lambda n: n == 0,
            str,
        ),
        goal(
            "cases whose results are wrong",
            "0",
            [len(wrong)] if records else [],
            lambda n: n == 0,
            str,
        ),
    ]


def mean_lines(records):
    """Geometric mean and smallest ratio per cell and mode, one column per dtype."""
    yield f"{'ratio: mean (smallest)':24}" + "".join(f"{dtype:>18}" for dtype in gpu_grid.DTYPES)
    cells, sequences = select(records, group="cells"), of_grid(records)
    single, stacked = (select(sequences, layers=layers) for layers in (1, 2))
    for part_of_grid, kind in ((single, ""), (stacked, " x2 bidir"), (cells, " one step")):
        if part_of_grid is cells and cells:
            yield "one step of a cell, against torch.nn's; not in the goal's mean"
        for cell in (*gpu_grid.CELLS, "RNN"):
            for mode in grid.MODES:
                line = f"{cell + kind:14}{mode:10}"
                chosen = select(part_of_grid, cell=cell, mode=mode)
                for dtype in gpu_grid.DTYPES:
                    part = select(chosen, dtype=dtype)
                    smallest = min((r["ratio"] for r in part), default=0)
                    line += f"{geometric_mean(part):9.2f} ({smallest:6.2f})" if part else f"{'-':>18}"
                if chosen:
                    yield line


def case_line(record):
    ms, us = record["milliseconds"], record["us_per_step"]
    return (
        f"{record['name']:52} {record['ratio']:6.2f}x {ms['torch']:9.3f} ms {ms['fastseq']:9.3f} ms "
        f"{us['torch']:8.2f} us {us['fastseq']:8.2f} us  {(record['plan'] or '')[:60]}".rstrip()
    )


def list_lines(title, chosen, line=case_line, most=TAIL):
    if chosen:
        yield from ("", f"{title}: {len(chosen)}")
        yield from (f"  {line(item)}" for item in chosen[:most])
        if len(chosen) > most:
            yield f"  ... and {len(chosen) - most} more, see results.json"


def text(results):
    """The summary, to print; the goals come last, where they are read first."""
    records = results["cases"]
    facts = results["environment"]
    yield f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, cuDNN {facts['cudnn']}"
    yield f"{len(records)} of {results['planned']} cases measured, {len(results['left_out'])} left out"
    for name, value in (results["ceilings"] or {}).items():
        yield f"{name}: {value:.4g}"
    if not records:
        yield from list_lines("left out", list(results["left_out"].items()), ": ".join)
        return
    yield ""
    yield from mean_lines(records)
    slow = slow_cases(records)
    yield from list_lines(f"under {SLOW}x (time and us a step: torch, fastseq)", slow, most=len(slow))
    wrong = [r for r in records if is_wrong(r)]
    yield from list_lines(
        "wrong results",
        wrong,
        lambda r: f"{r['name']}: {r['difference']:.1e} from torch's, errors {r['errors']}",
    )
    yield from list_lines("left out", list(results["left_out"].items()), ": ".join)
    yield ""
    yield from calibration.lines(results["calibration"])
    yield ""
    yield from goal_lines(goals(records))
