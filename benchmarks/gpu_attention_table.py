"""README's section on attention on a GPU, from the attention.json of gpu_attention_run.py; see report.py."""

from __future__ import annotations

import gpu_attention_summary
from attention_grid import WINDOW
from gpu_attention_grid import BACKWARD, EXTRAS, EXTRAS_LENGTH, MASKS
from gpu_attention_summary import (
    beside,
    copy_share,
    decoding_rows,
    fastest_of_torch,
    grid_of,
    in_thousands,
    rows_of,
)
from gpu_table import goal_table, measured_on
from grid import MODES
from readme import table, times
from summary import select

NOT_TIMED = """\
Attention is not yet measured on a GPU. `scripts/gpu_report.sh OUT attention` does that, against each of
torch's backends, see [CONTRIBUTING.md](CONTRIBUTING.md#measure-on-a-gpu)."""


def speed_table(records):
    """One row per dtype, head size, kind and mode, one column per length."""
    records = grid_of(records) + beside(grid_of(records), BACKWARD)
    lengths = sorted({r["queries"] for r in records})
    rows = []
    for dtype, size, mode, kind in rows_of(records):
        known = {r["queries"]: r for r in grid_of(records, dtype=dtype, head_size=size, mode=mode, kind=kind)}
        cells = [speed_cell(known[n]) if n in known else "" for n in lengths]
        rows.append([f"{dtype}, D {size}, {kind}, {mode}", *cells])
    return table(["", *(f"S {in_thousands(n)}" for n in lengths)], rows)


def speed_cell(record):
    best = fastest_of_torch(record)
    return f"{record['tflops']['fastseq']:.0f}" + (f" ({times(best[0])})" if best else "")


def mask_table(records):
    """One row per kind, length and head size; what the efficient backend refuses is left empty."""
    chosen = select(records, group="masks")
    columns = [(mode, library) for mode in MODES for library in ("efficient", "default")]
    rows = []
    for kind in MASKS:
        for size, length in sorted({(r["head_size"], r["queries"]) for r in select(chosen, kind=kind)}):
            known = {r["mode"]: r for r in select(chosen, kind=kind, head_size=size, queries=length)}
            ratios = [known[mode]["ratios"].get(name) if mode in known else None for mode, name in columns]
            label = f"{kind}, D {size}, S {in_thousands(length)}"
            rows.append([label, *("" if ratio is None else times(ratio) for ratio in ratios)])
    header = [f"{mode}, {name}" for mode, name in columns]
    return table(["", *header], rows) if rows else []


def option_table(records):
    """One row per option, one column per head size and mode."""
    chosen = select(records, group="options")
    columns = [(size, mode) for size in sorted({r["head_size"] for r in chosen}) for mode in MODES]
    rows = []
    for kind in EXTRAS:
        known = {(r["head_size"], r["mode"]): r["ratios"]["unmasked"] for r in select(chosen, kind=kind)}
        if known:
            rows.append([kind, *(times(known[column]) if column in known else "" for column in columns)])
    return table(["", *(f"D {size} {mode}" for size, mode in columns)], rows) if rows else []


def decoding_table(results):
    """One row per queries, heads and batch, one column per number of keys."""
    chosen = select(results["cases"], group="decoding")
    keys = sorted({r["keys"] for r in chosen})
    rows = []
    for queries, heads, batch in decoding_rows(chosen):
        known = {r["keys"]: r for r in select(chosen, queries=queries, kv_heads=heads, batch=batch)}
        label = f"{queries} {'query' if queries == 1 else 'queries'}, {heads} key heads, batch {batch}"
        rows.append([label, *(decoding_cell(known[n], results) if n in known else "" for n in keys)])
    return table(["", *(f"{in_thousands(n)} keys" for n in keys)], rows) if rows else []


def decoding_cell(record, results):
    share, ratio = copy_share(record, results), record["ratios"].get("flash")
    text = f"{record['gigabytes_per_second']['fastseq']:.0f}"
    text += "" if share is None else f", {share:.0%}"
    return text + (f" ({times(ratio)})" if ratio else "")


def section(runs):
    """What stands between the markers; `runs` are (folder as README names it, results), the newest first."""
    if not runs:
        return NOT_TIMED
    (folder, results), *others = runs
    records = results["cases"]
    lines = []
    if grid_of(records):
        lines += [
            "TFLOP/s of attention, and in brackets the ratio to the fastest of torch's backends (flash,",
            "efficient, cuDNN); 16k tokens and heads x D = 2048. Causal counts half the operations, and",
            "training, which is forward and backward, three and a half times those of inference; backward is",
            "that pass alone:",
            "",
            *speed_table(records),
            "",
        ]
    if masks := mask_table(records):
        lines += [
            "Masks and bias in bfloat16, times as fast as torch's efficient backend and as its own choice; a",
            "trained mask is an additive one that gets a gradient:",
            "",
            *masks,
            "",
        ]
    if options := option_table(records):
        lines += [
            "What else there is, of which torch has dropout alone in a fused kernel: speed in bfloat16",
            f"at S = {EXTRAS_LENGTH} as a multiple of fastseq's own without (the window sees {WINDOW} keys",
            "back; `key_lengths` and packed sequences have three of four tokens):",
            "",
            *options,
            "",
        ]
    if decoding := decoding_table(results):
        lines += [
            "Decoding in bfloat16, D = 128, 32 query heads: GB/s of keys and values, the share of what a",
            "copy in memory reaches (more where the cache holds them), and the ratio to torch's flash:",
            "",
            *decoding,
            "",
        ]
    lines += ["What was aimed at:", "", *goal_table(gpu_attention_summary.goals(records)), ""]
    lines += [
        f"Measured on {measured_on(results)}.",
        "CUDA events, all libraries in turn in one process, median of the ratios of neighbouring samples;",
        "float32 is not rounded to tf32.",
        f"Every number: [{folder}/attention.json]({folder}/attention.json).",
    ]
    if grid_of(records):
        mode = next(mode for mode in MODES if grid_of(records, mode=mode))
        lines += ["", f"![TFLOP/s over the length]({folder}/attention_{mode}.png)"]
    for name, other in others:
        lines += ["", f"On {measured_on(other)}: [{name}/attention.json]({name}/attention.json)."]
    return "\n".join(lines)
