"""Time fastseq against torch.nn, both in turn in one process, and write down the ratios.

    python benchmarks/run.py                      # everything, under 25 minutes
    python benchmarks/run.py --quick              # a look, under two minutes
    python benchmarks/run.py --case "LSTM training T100"  --cells LSTM
    python benchmarks/run.py --list

DIR/results.json is written anew after every case, so that a run can be stopped at any time (Ctrl-C) and
keeps what it has measured; the figures are drawn at the end, next to it. README's table is made from it by
report.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fastseq
import figures
import grid
import paired
import summary
from environment import cpu_model, environment
from records import RESULTS, choose, difference, save, slug

PEAK_SECONDS = 0.05  # one reading of the machine's FMA peak


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
    add("--cells", nargs="+", choices=grid.CELLS, metavar="CELL", help="of RNN, LSTM, GRU (default: all)")
    add("--case", metavar="PATTERN", help="only cases whose name contains this regular expression")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--threads", type=int, metavar="N", help="for both libraries (default: torch's choice)")
    add("--budget", type=float, metavar="SECONDS", help="time for a case (default: 3, with --quick 0.3)")
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
    """The record of a case, or None if one call takes torch longer than `longest` seconds."""
    theirs, ours = case.functions()
    started = time.perf_counter()
    expected = theirs()
    if time.perf_counter() - started > longest:
        return None
    results = expected, ours()
    # The two GRUs of the reset_before group are different networks.
    apart = None if case.group == "reset_before" else difference(*results)
    code, threads = fastseq._C.DTYPES[case.dtype], torch.get_num_threads()

    def peak():
        return fastseq._C.fma_peak(code, threads, PEAK_SECONDS)

    pairs = paired.measure(theirs, ours, peak, budget, least_pairs)
    seconds = {"torch": statistics.median(pairs.a), "fastseq": statistics.median(pairs.b)}
    gflops = {name: case.flops / value / 1e9 for name, value in seconds.items()}
    middle = statistics.median(pairs.peaks)
    return {
        "name": case.name,
        "group": case.group,
        "cell": case.cell,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": case.shape.name,
        "ratio": statistics.median(pairs.ratios),
        "ratio_quartiles": statistics.quantiles(pairs.ratios, n=4),
        "seconds": seconds,
        "gflops": gflops,
        "share": {name: value / middle for name, value in gflops.items()},
        "peaks": pairs.peaks,
        "difference": apart,
        "others": pairs.others,
        "samples": {"torch": pairs.a, "fastseq": pairs.b},
    }


def main():
    parser, arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = choose(parser, grid.cases(arguments.quick), arguments.cells, arguments.case)
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0

    folder = arguments.out or default_folder(arguments.quick)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = {"environment": environment(), "quick": arguments.quick, "complete": False, "cases": []}
    results["left_out"] = []  # names of cases that take torch too long
    budget = arguments.budget or (0.3 if arguments.quick else 3.0)
    started = time.perf_counter()
    try:
        with tqdm(chosen, unit="case", dynamic_ncols=True) as bar:
            for case in bar:
                bar.set_description(case.name)
                record = measure_case(case, budget, 3 if arguments.quick else 5, arguments.longest)
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
    print("\n" + summary.text(results["cases"]) + "\n")
    for name in results["left_out"]:
        print(f"left out, over {arguments.longest:g} s for one call of torch: {name}")
    if results["cases"]:
        print("\n".join(f"wrote {written}" for written in [path, *figures.draw(results, folder)]))
    return 0 if results["complete"] else 130


if __name__ == "__main__":
    sys.exit(main())
