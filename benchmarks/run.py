"""Time fastseq against torch, both in turn in one process, and write down the ratios.

    python benchmarks/run.py                      # everything, about half an hour
    python benchmarks/run.py --only attention     # under 8 minutes; recurrent takes under 25
    python benchmarks/run.py --quick              # a look, under three minutes
    python benchmarks/run.py --case "LSTM training T100"  --cells LSTM
    python benchmarks/run.py --list

Recurrent networks are written to DIR/results.json, attention to DIR/attention.json, anew after every case, so
that a run can be stopped at any time (Ctrl-C) and keeps what it has measured; the figures are drawn at the
end, next to them. README's tables are made from these files by report.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

import attention_figures
import attention_grid
import attention_summary
import fastseq
import figures
import grid
import paired
import summary
from environment import cpu_model, environment
from records import ATTENTION, RECURRENT, RESULTS, choose, difference, save, slug

PEAK_SECONDS = 0.05  # one reading of the machine's FMA peak


@dataclass(frozen=True)
class Subject:
    file: str
    grid: ModuleType  # its cases,
    summary: ModuleType  # what is printed of them,
    figures: ModuleType  # and drawn
    seconds: float  # for a case,
    pairs: int  # and at least so many


SUBJECTS = {
    "recurrent": Subject(RECURRENT, grid, summary, figures, 3.0, 5),
    "attention": Subject(ATTENTION, attention_grid, attention_summary, attention_figures, 1.0, 3),
}


def parse_arguments():
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases, fewer samples of each")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write (default: benchmarks/results/<CPU, instruction set, threads>)",
    )
    add("--only", choices=SUBJECTS, metavar="SUBJECT", help="recurrent or attention (default: both)")
    add("--cells", nargs="+", choices=grid.CELLS, metavar="CELL", help="of RNN, LSTM, GRU (default: all)")
    add("--case", metavar="PATTERN", help="only cases whose name contains this regular expression")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--threads", type=int, metavar="N", help="for both libraries (default: torch's choice)")
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="time for a case (default: recurrent 3, attention 1, with --quick 0.3)",
    )
    add(
        "--longest",
        type=float,
        metavar="SECONDS",
        default=10.0,
        help="leave out a case of which one call takes torch longer, after that call (default: 10)",
    )
    arguments = parser.parse_args()
    for name in ("threads", "budget", "longest"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"argument --{name}: given {value}, accepted is a number above 0")
    return parser, arguments


def default_folder(quick):
    cpu = f"{cpu_model()} {fastseq._C.cpu_info()['isa']}"  # some machines tell no more than the maker's name
    return RESULTS / f"{slug(cpu)}-{torch.get_num_threads()}-threads{'-quick' if quick else ''}"


def measure_case(case, budget, least_pairs, longest):
    """The record of a case, or None if the call it is compared with takes longer than `longest` seconds."""
    theirs, ours = case.functions()
    started = time.perf_counter()
    expected = theirs()
    if time.perf_counter() - started > longest:
        return None
    results = expected, ours()
    apart = difference(*results) if case.same_results else None
    code, threads = fastseq._C.DTYPES[case.dtype], torch.get_num_threads()

    def peak():
        return fastseq._C.fma_peak(code, threads, PEAK_SECONDS)

    pairs = paired.measure(theirs, ours, peak, budget, least_pairs)
    seconds = {case.against: statistics.median(pairs.a), "fastseq": statistics.median(pairs.b)}
    gflops = {name: case.flops / value / 1e9 for name, value in seconds.items()}
    middle = statistics.median(pairs.peaks)
    return case.facts | {
        "ratio": statistics.median(pairs.ratios),
        "ratio_quartiles": statistics.quantiles(pairs.ratios, n=4),
        "seconds": seconds,
        "gflops": gflops,
        "share": {name: value / middle for name, value in gflops.items()},
        "peaks": pairs.peaks,
        "difference": apart,
        "others": pairs.others,
        "samples": {case.against: pairs.a, "fastseq": pairs.b},
    }


def measure_subject(subject, chosen, folder, arguments):
    """Measure these cases, write, print and draw; whether all of them were measured, or left out."""
    path = folder / subject.file
    results = {"environment": environment(), "quick": arguments.quick, "complete": False, "cases": []}
    results["left_out"] = []  # names of cases that take torch too long
    budget = arguments.budget or (0.3 if arguments.quick else subject.seconds)
    started = time.perf_counter()
    try:
        with tqdm(chosen, unit="case", dynamic_ncols=True) as bar:
            for case in bar:
                bar.set_description(case.name)
                record = measure_case(
                    case, budget, 3 if arguments.quick else subject.pairs, arguments.longest
                )
                if record:
                    results["cases"].append(record)
                else:
                    results["left_out"].append(case.name)
                results["environment"]["load_at_end"] = os.getloadavg()
                results["environment"]["minutes"] = (time.perf_counter() - started) / 60
                results["complete"] = len(results["cases"]) + len(results["left_out"]) == len(chosen)
                save(results, path)
                if results["cases"]:
                    last, mean = results["cases"][-1]["ratio"], summary.geometric_mean(results["cases"])
                    bar.set_postfix_str(f"last {last:.2f}x, mean {mean:.2f}x", refresh=False)
    except KeyboardInterrupt:
        print(f"\nstopped after {len(results['cases'])} of {len(chosen)} cases", file=sys.stderr)
    print("\n" + subject.summary.text(results["cases"]) + "\n")
    for name in results["left_out"]:
        print(f"left out, over {arguments.longest:g} s for one call of torch: {name}")
    if results["cases"]:
        print("\n".join(f"wrote {written}" for written in [path, *subject.figures.draw(results, folder)]))
    return results["complete"]


def main():
    parser, arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    subjects = [SUBJECTS[arguments.only]] if arguments.only else list(SUBJECTS.values())
    cases = {subject.file: subject.grid.cases(arguments.quick) for subject in subjects}
    every = [case for part in cases.values() for case in part]
    chosen = choose(parser, every, arguments.cells, arguments.case)
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0

    folder = arguments.out or default_folder(arguments.quick)
    folder.mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        part = [case for case in cases[subject.file] if case in chosen]
        if part and not measure_subject(subject, part, folder, arguments):
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
