"""What the records of attention say: means, worst cases, and the project's goals with what was measured.

A record is one case of attention.json, see run.py. The goals are those for a CPU with AVX-512.
"""

from __future__ import annotations

from attention_grid import DTYPES, KINDS, LONG, MASKS, OPTIONS, TABLE, TRAINED
from grid import MODES
from summary import DIFFERENCE, disturbed_lines, geometric_mean, goal, goal_lines, peak_lines, row, select

GROUPS = {
    "attention": "full and causal",
    "decoding": "one query",
    "grouped": "grouped queries",
    "masks": "masks",
    "modules": "MultiheadAttention",
    "options": "masks and options, against fastseq without them",
}
MEAN = {  # of the ratios, at least: full and causal
    "float32": {"full": 1.2, "causal": 1.7},
    "bfloat16": {"full": 2.0, "causal": 2.5},
}
SHARE = {64: 0.75, 128: 0.80}  # of the peak by head size; float32, full, from LONG on
TRAINING = 0.9  # of these figures, for forward and backward
DECODING = 3.0  # bfloat16
SLOWEST = 1.0  # any ratio to torch, at least
MASKED = 0.85  # of the unmasked speed, at least


def against_torch(records):
    return [r for r in records if r["group"] != "options"]


def wrong_cases(records):
    """Those whose results are further from torch's than rounding explains; NaN is."""
    known = [r for r in records if r["difference"] is not None]
    return [r for r in known if not r["difference"] <= DIFFERENCE[r["dtype"]]]


def at_least(text, least, ratios):
    return goal(text, f">= {least:.3g}x", ratios, lambda ratio: ratio >= least, "{:.2f}x".format)


def speed_goals(records, mode, part):
    """The goals of one mode, each `part` of the figure for the forward pass."""
    table = select(records, group="attention", mode=mode)
    for dtype in DTYPES:
        for kind in KINDS:
            chosen = select(table, dtype=dtype, kind=kind)
            mean = [geometric_mean(chosen)] if chosen else []
            yield at_least(f"{dtype} {kind} {mode}, geometric mean", MEAN[dtype][kind] * part, mean)
    for size, share in SHARE.items():
        names = [s.name for s in TABLE if s.queries >= LONG and s.head_size == size]
        full = select(table, dtype="float32", kind="full")
        shares = [r["share"]["fastseq"] for r in full if r["shape"] in names]
        text = f"float32 full {mode}, S >= {LONG}, D = {size}, share of the peak"
        least = share * part
        yield goal(text, f">= {least:.3g}", shares, lambda x, y=least: x >= y, "{:.1%}".format)


def goals(records):
    """The project's goals, each with what was measured."""
    decoding = [r["ratio"] for r in select(records, group="decoding", dtype="bfloat16")]

    def slowest(chosen):
        return sorted(r["ratio"] for r in chosen)[:1]

    modules = select(records, group="modules")
    calls = [r for r in against_torch(records) if r not in modules]
    masked = [r for r in select(records, group="options") if r["kind"] in MASKS]
    trained = select(masked, kind=TRAINED)
    untrained = [r for r in masked if r not in trained]
    wrong = [len(wrong_cases(records))] if records else []
    return [
        *speed_goals(records, "inference", 1.0),
        *speed_goals(records, "training", TRAINING),
        at_least("bfloat16 decoding", DECODING, decoding),
        at_least("slowest call against torch", SLOWEST, slowest(calls)),
        at_least("slowest MultiheadAttention against torch", SLOWEST, slowest(modules)),
        at_least("slowest mask, of the unmasked speed", MASKED, slowest(untrained)),
        at_least("slowest mask with a gradient, of the unmasked speed", MASKED, slowest(trained)),
        goal("cases whose results are wrong", "0", wrong, lambda n: n == 0, str),
    ]


def mean_lines(records):
    yield f"{'':34}{'speed-up':>8} {'worst':>8}"
    if against_torch(records):
        yield row("all cases against torch", against_torch(records))
    for group, title in GROUPS.items():
        chosen = select(records, group=group)
        if not chosen:
            continue
        yield from ("", title)
        for dtype in DTYPES:
            for kind in dict.fromkeys(r["kind"] for r in chosen):
                for mode in MODES:
                    part = select(chosen, dtype=dtype, kind=kind, mode=mode)
                    if part:
                        yield row(f"  {kind} {mode} {dtype}", part)


def missed_lines(records):
    """The cases behind a goal that every case has to reach."""
    for r in records:
        if r["group"] != "options" and r["ratio"] < SLOWEST:
            yield f"  {r['ratio']:.2f}x  {r['name']}"
        elif r["group"] == "options" and r["kind"] in MASKS and r["ratio"] < MASKED:
            yield f"  {r['ratio']:.2f} of the unmasked speed  {r['name']}"
    for r in wrong_cases(records):
        yield f"  results differ by {r['difference']:.1e} of the largest value  {r['name']}"


def text(records):
    """The summary, to print; the goals come last, where they are read first."""
    if not records:
        return "nothing was measured"
    missed = list(missed_lines(records))
    lines = [*mean_lines(records), "", *peak_lines(records), ""]
    lines += [f"cases that are slow or wrong: {len(missed)}", *missed, ""]
    return "\n".join([*lines, *goal_lines(goals(records)), *disturbed_lines(records)])


def kinds_of(records):
    """The kinds that were measured, masks first, in the grid's order."""
    return [kind for kind in MASKS + OPTIONS if select(records, kind=kind)]
