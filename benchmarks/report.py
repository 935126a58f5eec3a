"""Write the speed tables of README.md anew: recurrent networks and attention, on a CPU and on a GPU.

python benchmarks/report.py                  # from the latest runs under benchmarks/results
python benchmarks/report.py --results DIR --attention-results DIR
python benchmarks/report.py --gpu-results DIR --gpu-attention-results DIR
python benchmarks/report.py --check          # change nothing; fail if a table is not up to date
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import attention_table
import gpu_attention_table
import gpu_table
import grid
import summary
from readme import ReportError, measured_on, ratio, replace_section, table
from records import ATTENTION, RECURRENT, RESULTS, read

ROOT = Path(__file__).resolve().parent.parent
CELLS = ("LSTM", "GRU", "RNN")


def kept_results(name=RECURRENT):
    """The files of this name under benchmarks/results, the newest first."""
    found = {path: read(path) for path in RESULTS.glob(f"*/{name}")}
    newest_first = sorted(found, key=lambda path: found[path]["environment"]["date"], reverse=True)
    return {path: found[path] for path in newest_first}


def is_gpu(results):
    return "gpu" in results["environment"]


def full_results(name=RECURRENT):
    """The complete, not quick, runs on a CPU, the newest first."""
    return {
        path: results
        for path, results in kept_results(name).items()
        if not is_gpu(results) and results["complete"] and not results["quick"]
    }


def gpu_runs(folder, name=RECURRENT):
    """(folder from README's view, results) of the given run, or of all that are kept, the newest first.

    A run on a GPU need not be complete: its cases are in a shuffled order, so that a part is a fair sample.
    """
    if folder:
        found = {folder / name: read_results(folder, name)[1]}
    else:
        found = {p: r for p, r in kept_results(name).items() if is_gpu(r) and r["cases"] and not r["dry_run"]}
    return [(relative(path.parent.resolve()), results) for path, results in found.items()]


def attention_runs(folder):
    """(folder from README's view, results) of the given run, or of all that are kept, the newest first."""
    path = folder and folder / ATTENTION
    found = {path: read_results(folder, ATTENTION)[1]} if folder else full_results(ATTENTION)
    runs = [(relative(path.parent.resolve()), results) for path, results in found.items()]
    return [(name, results) for name, results in runs if attention_table.of_table(results["cases"])]


def relative(folder):
    return Path(os.path.relpath(folder, ROOT)).as_posix()


def latest_results():
    for path in full_results():
        return path
    raise ReportError(
        f"given no --results, and no complete run under {RESULTS}\n"
        "accepted: a folder that benchmarks/run.py wrote\n"
        "try python benchmarks/run.py first, or --results DIR"
    )


def read_results(folder, name=RECURRENT):
    path = folder / name if folder else latest_results()
    try:
        return path.parent, read(path)
    except (OSError, json.JSONDecodeError) as error:
        raise ReportError(
            f"given {path}: {error.strerror if isinstance(error, OSError) else error}\n"
            "accepted: a folder that benchmarks/run.py wrote\n"
            "try python benchmarks/run.py first"
        ) from None


def shape_table(records):
    """One row per shape, one column per cell and mode."""
    columns = [
        (cell, mode) for cell in CELLS for mode in grid.MODES if summary.select(records, cell=cell, mode=mode)
    ]
    header = ["T steps, B batch, input -> hidden"] + [f"{cell} {mode}" for cell, mode in columns]
    rows = [
        [shape] + [ratio(records, shape=shape, cell=cell, mode=mode) for cell, mode in columns]
        for shape in dict.fromkeys(r["shape"] for r in records)
    ]
    means = ["**geometric mean**"] + [f"**{ratio(records, cell=cell, mode=mode)}**" for cell, mode in columns]
    return table(header, rows + [means])


def group_table(records):
    """One row per group of cases: what it is, how many, mean and worst."""
    rows = []
    for group, title in summary.GROUPS.items():
        chosen = summary.select(records, group=group)
        if chosen:
            worst = min(r["ratio"] for r in chosen)
            rows.append([title, str(len(chosen)), ratio(chosen), f"{worst:.2f}x"])
    return table(["", "cases", "geometric mean", "smallest"], rows)


def other_machines(shown):
    """The means of every other full run that is kept."""
    lines = []
    for path, results in full_results().items():
        if path.parent.resolve() != shown:
            lines += ["", f"On {measured_on(results)}:", "", *group_table(results["cases"])]
    return lines


def section(results, folder):
    """What stands between the markers, without them."""
    records, others = results["cases"], other_machines(folder)
    folder = relative(folder)
    lines = ["Times as fast as `torch.nn`, float32:", ""]
    lines += shape_table(summary.select(records, group="table"))
    lines += ["", "All that was measured:", ""]
    lines += group_table(records)
    lines += [
        "",
        f"Measured on {measured_on(results)}.",
        "Both libraries in turn in one process, median of the ratios of neighbouring samples; training is",
        "forward and backward with the gradients of input and parameters.",
    ]
    lines += [f"Every number: [{folder}/results.json]({folder}/results.json)."]
    lines += ["", f"![Speed-up per shape]({folder}/speedup_table.png)"]
    lines += others
    return "\n".join(lines)


def main():
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder that benchmarks/run.py wrote")
    parser.add_argument(
        "--attention-results", type=Path, metavar="DIR", help="a folder that benchmarks/run.py wrote"
    )
    parser.add_argument(
        "--gpu-results", type=Path, metavar="DIR", help="a folder that benchmarks/gpu_run.py wrote"
    )
    parser.add_argument(
        "--gpu-attention-results",
        type=Path,
        metavar="DIR",
        help="a folder that benchmarks/gpu_attention_run.py wrote",
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", default=ROOT / "README.md", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a table is out of date"
    )
    arguments = parser.parse_args()

    folder, results = read_results(arguments.results)
    if not summary.select(results["cases"], group="table"):
        raise ReportError(
            f"given {folder}, which has no case of the table\n"
            "accepted: a run that was not filtered by --case\ntry python benchmarks/run.py"
        )
    try:
        old = arguments.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(
            f"given {arguments.readme}: {error.strerror}\ntry writing a README.md first"
        ) from None
    attention, runs = attention_runs(arguments.attention_results), gpu_runs(arguments.gpu_results)
    gpu_attention = gpu_runs(arguments.gpu_attention_results, ATTENTION)
    new = replace_section(old, "benchmark", section(results, folder.resolve()), arguments.readme)
    new = replace_section(new, "attention", attention_table.section(attention), arguments.readme)
    new = replace_section(new, "gpu", gpu_table.section(runs), arguments.readme)
    new = replace_section(new, "gpu-attention", gpu_attention_table.section(gpu_attention), arguments.readme)
    latest = attention[:1] + runs[:1] + gpu_attention[:1]
    shown = " and ".join(dict.fromkeys([relative(folder.resolve()), *(name for name, _ in latest)]))
    if new == old:
        print(f"{arguments.readme.name} is up to date with {shown}")
        return 0
    if arguments.check:
        print(f"{arguments.readme.name} is not up to date with {shown}\nrun python benchmarks/report.py")
        return 1
    arguments.readme.write_text(new, encoding="utf-8")
    print(f"{arguments.readme.name} now shows {shown}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ReportError as error:
        sys.exit(f"report.py: {error}")
