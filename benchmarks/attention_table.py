"""README's section on attention, from the attention.json of run.py; report.py puts it between its markers."""

from __future__ import annotations

from attention_grid import DTYPES, KINDS, WINDOW
from attention_summary import GROUPS, kinds_of
from grid import MODES
from readme import measured_on, ratio, table
from summary import select

NOT_MEASURED = "Not measured yet; `python benchmarks/run.py --only attention` does that."
COLUMNS = tuple((dtype, mode) for dtype in DTYPES for mode in MODES)


def of_table(records):
    return select(records, group="attention")


def header(first, columns):
    return [first, *(f"{dtype} {mode}" for dtype, mode in columns)]


def row(label, records, columns, form="{}"):
    values = [ratio(records, dtype=dtype, mode=mode) for dtype, mode in columns]
    return [form.format(label), *(form.format(value) if value else "" for value in values)]


def columns_of(records):
    return [(dtype, mode) for dtype, mode in COLUMNS if select(records, dtype=dtype, mode=mode)]


def shape_table(records):
    """One row per shape and kind, one column per dtype and mode."""
    columns, rows = columns_of(records), []
    for kind in KINDS:
        chosen = select(records, kind=kind)
        for shape in dict.fromkeys(r["shape"] for r in chosen):
            rows.append(row(f"{kind}, {shape}", select(chosen, shape=shape), columns))
        if chosen:
            rows.append(row(f"{kind}, geometric mean", chosen, columns, "**{}**"))
    return table(header("", columns), rows)


def other_table(records):
    """One row for all else that was measured against torch; means over the shapes."""
    others = [r for r in records if r["group"] not in ("attention", "options")]
    columns, rows = columns_of(others), []
    for group, title in GROUPS.items():
        chosen = select(others, group=group)
        for kind in dict.fromkeys(r["kind"] for r in chosen):
            label = kind if group == "masks" else title if group == "decoding" else f"{title}, {kind}"
            rows.append(row(label, select(chosen, kind=kind), columns))
    return table(header("", columns), rows) if rows else []


def option_table(records):
    """One row per mask or option: its speed as a part of the speed without it."""
    options = select(records, group="options")
    columns = columns_of(options)
    rows = [row(kind, select(options, kind=kind), columns) for kind in kinds_of(options)]
    return table(header("", columns), rows) if rows else []


def mean_table(records):
    """One row per kind of attention, of another machine."""
    columns = columns_of(records)
    rows = [row(f"{kind}, geometric mean", select(records, kind=kind), columns) for kind in KINDS]
    return table(header("", columns), rows)


def section(runs):
    """What stands between the markers; `runs` are (folder as README names it, results), the newest first."""
    if not runs:
        return NOT_MEASURED
    (folder, results), *others = runs
    records = results["cases"]
    lines = ["Times as fast as `torch.nn.functional.scaled_dot_product_attention`:", ""]
    lines += shape_table(of_table(records))
    if other := other_table(records):
        lines += ["", "All else that torch has too, geometric means over the shapes:", "", *other]
    if options := option_table(records):
        lines += [
            "",
            "What a mask costs, and what torch does not have: speed as a multiple of fastseq's own without",
            f"(the window sees {WINDOW} keys back; padding and `key_lengths` leave three of four keys):",
            "",
            *options,
        ]
    lines += [
        "",
        f"Measured on {measured_on(results)}.",
        "B sequences, H heads (of queries / of keys), S queries and keys, D features of a head; training is",
        "forward and backward. A trained mask is an additive one that gets a gradient.",
        f"Every number: [{folder}/attention.json]({folder}/attention.json).",
        "",
        f"![Speed-up per shape]({folder}/speedup_attention_float32.png)",
    ]
    for _, other in others:
        lines += ["", f"On {measured_on(other)}:", "", *mean_table(of_table(other["cases"]))]
    return "\n".join(lines)
