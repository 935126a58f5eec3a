"""Write the speed table of README.md anew from a run's results.json.

python benchmarks/report.py                  # from the latest full run under benchmarks/results
python benchmarks/report.py --results DIR
python benchmarks/report.py --check          # change nothing; fail if the table is not up to date
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import grid
import summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
CELLS = ("LSTM", "GRU", "RNN")


class ReportError(Exception):
    pass


def full_results():
    """The complete, not quick, runs under benchmarks/results, the newest first."""
    found = {path: json.loads(path.read_text()) for path in RESULTS.glob("*/results.json")}
    full = [path for path, results in found.items() if results["complete"] and not results["quick"]]
    return {path: found[path] for path in sorted(full, key=lambda p: found[p]["environment"]["date"])[::-1]}


def latest_results():
    for path in full_results():
        return path
    raise ReportError(
        f"given no --results, and no complete run under {RESULTS}\n"
        "accepted: a folder that benchmarks/run.py wrote\n"
        "try python benchmarks/run.py first, or --results DIR"
    )


def read_results(folder):
    path = folder / "results.json" if folder else latest_results()
    try:
        return path.parent, json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ReportError(
            f"given --results {folder}: {error}\n"
            "accepted: a folder that benchmarks/run.py wrote\n"
            "try python benchmarks/run.py first"
        ) from None


def table(header, rows):
    """A markdown table; the first column is text, the others numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def ratio(records, **wanted):
    chosen = summary.select(records, **wanted)
    value = summary.geometric_mean(chosen) if chosen else None
    return "" if value is None else f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


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


def measured_on(results):
    environment = results["environment"]
    cpu = f"{environment['cpu']} ({environment['isa']}), {environment['threads']} threads"
    versions = f"torch {environment['torch']}, Python {environment['python']}"
    return f"{cpu}; {versions}; {environment['date'][:10]}, commit {(environment['commit'] or 'none')[:7]}"


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
    folder = Path(os.path.relpath(folder, ROOT)).as_posix()
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


def replace_section(text, new, path):
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(
            f"given {path} without a place for the table\n"
            f"accepted: one line {BEGIN} and, below it, one line {END}\n"
            "try adding the two lines where the table should stand"
        )
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main():
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder that benchmarks/run.py wrote")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", default=ROOT / "README.md", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if the table is out of date"
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
    new = replace_section(old, section(results, folder.resolve()), arguments.readme)
    if new == old:
        print(f"{arguments.readme.name} is up to date with {folder}")
        return 0
    if arguments.check:
        print(f"{arguments.readme.name} is not up to date with {folder}\nrun python benchmarks/report.py")
        return 1
    arguments.readme.write_text(new, encoding="utf-8")
    print(f"{arguments.readme.name} now shows {folder}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ReportError as error:
        sys.exit(f"report.py: {error}")
