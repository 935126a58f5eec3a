"""What the records of attention on a GPU say: speeds, ratios, and the project's goals with what was measured.

A record is one case of attention.json, see gpu_attention_run.py. The goals are those for an H100 or H200.
"""

from __future__ import annotations

from attention_grid import KINDS
from gpu_attention_grid import BACKWARD, HEAD_SIZES, MASKS
from gpu_summary import list_lines
from grid import MODES
from summary import DIFFERENCE, goal, goal_lines, select

# TFLOP/s of the best kernels known at D = 128, and the part of them that is asked for.
BEST_FULL, BEST_CAUSAL, PART = 640, 560, 0.9
BACKWARD_FIGURE = 450  # TFLOP/s of the backward pass alone
FIGURE_HEAD_SIZE, FIGURE_LENGTH, CAUSAL_LENGTH = 128, 4096, 16384
SHORT = 1024  # up to this length cuDNN is what others lose to
MASKED, FLOAT32 = 2.0, 1.5  # times as fast as the efficient backend
SLOWEST = 1.0  # against torch's own choice
LIBRARIES = ("flash", "efficient", "cudnn", "default")
# A result is wrong if its error against float64 is above twice torch's own and this many units in the last
# place, of each tensor's largest value; where torch has no such kernel, if it is above what follows.
UNITS = 4
EPSILON = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
ERROR = {"float32": 1e-4, "bfloat16": 3e-2}


def is_wrong(record):
    """Whether results are further from torch's, or from float64, than rounding explains; NaN is."""
    dtype, errors, apart = record["dtype"], record["errors"], record["difference"]
    if apart is not None and not apart <= DIFFERENCE[dtype]:
        return True
    if not errors:
        return False
    torchs = [errors[name] for name in LIBRARIES if errors.get(name, float("nan")) < float("inf")]
    default = errors.get("default", float("nan"))
    torchs = [default] if default < float("inf") else torchs  # cuDNN is known to return NaN at times
    limit = 2 * max(torchs) + UNITS * EPSILON[dtype] if torchs else ERROR[dtype]
    return not errors["fastseq"] <= limit


def against_torch(records):
    return [r for r in records if r["group"] != "options"]


def fastest_of_torch(record):
    """(ratio to it, its name), "default" only if it is alone: it is one of the others, or slower."""
    ratios = {name: record["ratios"][name] for name in LIBRARIES if name in record["ratios"]}
    named = {name: ratio for name, ratio in ratios.items() if name != "default"} or ratios
    return min((ratio, name) for name, ratio in named.items()) if named else None


def grid_of(records, **wanted):
    """Of the attention group, in order of length."""
    return sorted(select(records, group="attention", **wanted), key=lambda r: r["queries"])


def beside(records, name):
    """Records of what was timed beside the cases: "backward", that pass alone, or "replayed", decoding
    without what the host does for it."""
    found = [r | r[name] for r in records if r.get(name)]
    return [r | {"mode": BACKWARD} for r in found] if name == BACKWARD else found


def ratios_to(library, records):
    """(ratio, record) of those in which it ran, the slowest first."""
    found = [(r["ratios"][library], r) for r in records if library in r["ratios"]]
    return sorted(found, key=lambda pair: pair[0])


# ------------------------------------------------------------------------------------------------ the goals


def figure_goal(text, least, values):
    return goal(text, f">= {least:.0f} TFLOP/s", values, lambda x: x >= least, "{:.0f}".format)


def ratio_goal(text, least, library, records, more=False):
    """What every case has to reach; the slowest of them is shown."""
    values = [ratio for ratio, _ in ratios_to(library, records)][:1]
    reached = (lambda x: x > least) if more else (lambda x: x >= least)
    return goal(text, f"{'>' if more else '>='} {least:g}x", values, reached, "{:.2f}x".format)


def rules(records):
    """(text, ratio that every case has to reach, or more than it, the library it is one to, the cases)"""
    grid = grid_of(records)
    bfloat16 = select(grid, dtype="bfloat16")
    short = [r for r in bfloat16 if r["queries"] <= SHORT]
    small = select(bfloat16, head_size=HEAD_SIZES[0], mode="inference")
    float32 = select(grid, dtype="float32")
    return [
        ("slowest against torch's default", SLOWEST, False, "default", against_torch(records)),
        (f"slowest forward pass at D {HEAD_SIZES[0]}, against cuDNN", 1.0, False, "cudnn", small),
        (f"slowest up to S {SHORT}, against cuDNN", 1.0, True, "cudnn", short),
        (
            "slowest with a mask or bias, against efficient",
            MASKED,
            False,
            "efficient",
            select(records, group="masks"),
        ),
        ("slowest in float32, against efficient", FLOAT32, False, "efficient", float32),
    ]


def goals(records):
    """The project's goals, each with what was measured."""
    wide = select(grid_of(records), dtype="bfloat16", head_size=FIGURE_HEAD_SIZE)
    forward = select(wide, mode="inference")
    full = [r for r in select(forward, kind="full") if r["queries"] >= FIGURE_LENGTH]
    causal = select(forward, kind="causal", queries=CAUSAL_LENGTH)
    backward = beside(select(wide, kind="full", mode="training"), BACKWARD)
    where = f"D {FIGURE_HEAD_SIZE}, full, S >= {FIGURE_LENGTH}"
    wrong = [len([r for r in records if is_wrong(r)])] if records else []
    return [
        figure_goal(f"forward, {where}", PART * BEST_FULL, [r["tflops"]["fastseq"] for r in full]),
        figure_goal(
            f"forward, D {FIGURE_HEAD_SIZE}, causal, S {CAUSAL_LENGTH}",
            PART * BEST_CAUSAL,
            [r["tflops"]["fastseq"] for r in causal],
        ),
        figure_goal(
            f"backward alone, {where}",
            BACKWARD_FIGURE,
            [r["tflops"]["fastseq"] for r in backward if r["queries"] >= FIGURE_LENGTH],
        ),
        *(
            ratio_goal(text, least, library, chosen, more)
            for text, least, more, library, chosen in rules(records)
        ),
        goal("cases whose results are wrong", "0", wrong, lambda n: n == 0, str),
    ]


def missed_lines(records):
    """The cases behind a goal that every case has to reach, for each of these goals."""
    for text, least, more, library, chosen in rules(records):
        missed = [(x, r) for x, r in ratios_to(library, chosen) if x < least or (more and x == least)]
        title = f"under {least:g}x: {text.removeprefix('slowest ')}"
        yield from list_lines(title, missed, lambda pair: f"{pair[0]:.3f}x  {pair[1]['name']}", most=8)


# ---------------------------------------------------------------------------------------------- what it says


def in_thousands(number):
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


def copy_share(record, results):
    """Of the measured bandwidth of a copy, the part that a step of decoding reads key and value with."""
    ceilings = results["ceilings"]
    if not ceilings:
        return None
    return record["gigabytes_per_second"]["fastseq"] / ceilings["copy_terabytes_per_second"] / 1e3


def speed(record):
    if "tflops" in record:
        return f"{record['tflops']['fastseq']:7.1f} TFLOP/s"
    return f"{record['gigabytes_per_second']['fastseq']:7.0f} GB/s   "


def case_line(record):
    ratios = " ".join(f"{name} {ratio:.2f}x" for name, ratio in record["ratios"].items())
    time = record["milliseconds"]["fastseq"]
    return f"{record['name']:58} {time:9.3f} ms {speed(record)} {ratios}  {record['plan'][:50]}".rstrip()


def grid_lines(records):
    """Fastseq's TFLOP/s and its ratio to the fastest of torch's, a row per kind and a column per length."""
    records = grid_of(records) + beside(grid_of(records), BACKWARD)
    lengths = sorted({r["queries"] for r in records})
    if not lengths:
        return
    yield f"{'TFLOP/s (fastest of torch)':34}" + "".join(f"{'S ' + in_thousands(n):>13}" for n in lengths)
    for dtype, size, mode, kind in rows_of(records):
        row = {r["queries"]: r for r in grid_of(records, dtype=dtype, head_size=size, mode=mode, kind=kind)}
        line = f"{dtype} D{size} {kind} {mode}".ljust(34)
        for n in lengths:
            best = n in row and fastest_of_torch(row[n])
            ratio = f"({best[0]:5.2f})" if best else "(    -)"
            line += f"{row[n]['tflops']['fastseq']:6.0f}{ratio}" if n in row else f"{'-':>13}"
        yield line


def rows_of(records):
    """(dtype, head size, mode, kind) of what the grid has."""
    keys = ("dtype", "head_size", "mode", "kind")
    found = {tuple(r[key] for key in keys) for r in grid_of(records)}
    return sorted(found, key=lambda row: (row[:2], (*MODES, BACKWARD).index(row[2]), KINDS.index(row[3])))


def mask_lines(records):
    chosen = select(records, group="masks")
    if chosen:
        yield from ("", "masks and bias: times as fast as efficient, default")
    for kind in MASKS:
        for mode in MODES:
            cells = [
                f"{in_thousands(r['queries'])} D{r['head_size']} "
                + " ".join(f"{r['ratios'][n]:.2f}x" for n in ("efficient", "default") if n in r["ratios"])
                for r in sorted(
                    select(chosen, kind=kind, mode=mode), key=lambda r: (r["head_size"], r["queries"])
                )
            ]
            if cells:
                yield f"  {kind + ' ' + mode:24} " + "; ".join(cells)


def option_lines(records):
    chosen = select(records, group="options")
    if chosen:
        yield from ("", "options: speed as a multiple of fastseq's own without")
    for kind in dict.fromkeys(r["kind"] for r in sorted(chosen, key=lambda r: r["kind"])):
        cells = [
            f"D{r['head_size']} {r['mode']} {r['ratios']['unmasked']:.2f}x"
            for r in sorted(select(chosen, kind=kind), key=lambda r: (r["head_size"], r["mode"]))
        ]
        yield f"  {kind:14} " + "; ".join(cells)


def decoding_lines(results):
    chosen = select(results["cases"], group="decoding")
    yield from decoding_rows_of("decoding: share of the copy bandwidth (ratio to flash)", chosen, results)
    yield from decoding_rows_of("the short ones from a CUDA graph", beside(chosen, "replayed"), results)


def decoding_rows_of(title, chosen, results):
    """Share of the copy bandwidth and ratio to flash, a row per batch and heads, a column per length."""
    keys = sorted({r["keys"] for r in chosen})
    if not chosen:
        return
    yield from ("", title)
    yield f"{'':24}" + "".join(f"{in_thousands(n) + ' keys':>14}" for n in keys)
    for queries, heads, batch in decoding_rows(chosen):
        row = {r["keys"]: r for r in select(chosen, queries=queries, kv_heads=heads, batch=batch)}
        line = f"  {queries} x {row[min(row)]['heads']}/{heads} heads B{batch}".ljust(24)
        for n in keys:
            share = copy_share(row[n], results) if n in row else None
            ratio = row[n]["ratios"].get("flash") if n in row else None
            cell = ("-" if share is None else f"{share:.0%}") + (f" ({ratio:.2f})" if ratio else "")
            line += f"{cell:>14}"
        yield line


def decoding_rows(records):
    """(queries, key heads, batch)"""
    return sorted({(r["queries"], r["kv_heads"], r["batch"]) for r in records})


def refused_lines(records):
    """How many cases each backend refused, and the reason that it gave most often."""
    for library in LIBRARIES:
        reasons = [r["refused"][library] for r in records if library in r["refused"]]
        if reasons:
            most = max(dict.fromkeys(reasons), key=reasons.count)
            yield f"{library} refused {len(reasons)} cases, mostly: {most[:100]}"


def choice_lines(records):
    """How often torch's own choice was which backend."""
    chosen = [r["default_is"] for r in records if r["default_is"]]
    if chosen:
        counts = {name: chosen.count(name) for name in dict.fromkeys(chosen)}
        yield "torch's own choice: " + ", ".join(f"{name} in {n} cases" for name, n in counts.items())


def text(results):
    """The summary, to print; the goals come last, where they are read first."""
    records, facts = results["cases"], results["environment"]
    versions = f"torch {facts['torch']}, cuDNN {facts['cudnn']}"
    yield f"attention on {facts['gpu']}, driver {facts['driver']}, {versions}"
    yield f"{len(records)} of {results['planned']} cases measured, {len(results['left_out'])} left out"
    if lost := results.get("without_hopper"):
        yield f"FASTSEQ_CUDA_ATTENTION_PLAN=tiles from then on: {lost} hung or broke the GPU"
    for name, value in (results["ceilings"] or {}).items():
        yield f"{name}: {value:.4g}"
    if records:
        yield ""
        yield from grid_lines(records)
        yield from mask_lines(records)
        yield from option_lines(records)
        yield from decoding_lines(results)
        yield ""
        yield from choice_lines(records)
        yield from refused_lines(records)
        yield from missed_lines(records)
        wrong = [r for r in records if is_wrong(r)]
        yield from list_lines("wrong results", wrong, wrong_line)
    yield from list_lines("left out", list(results["left_out"].items()), ": ".join)
    if records:
        yield ""
        yield from goal_lines(goals(records))


def wrong_line(record):
    apart = "not compared" if record["difference"] is None else f"{record['difference']:.1e}"
    return f"{record['name']}: {apart} from torch's, errors {record['errors']}"
