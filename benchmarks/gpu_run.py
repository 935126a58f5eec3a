"""Time fastseq against torch.nn on cuDNN, both in turn in one process on one GPU, and write down the ratios.

    python benchmarks/gpu_run.py                     # the whole grid, about five minutes
    python benchmarks/gpu_run.py --case "LSTM .* bfloat16 .* 256->256"
    python benchmarks/gpu_run.py --smoke             # small cases against float64, nothing timed
    python benchmarks/gpu_run.py --from-results DIR  # figures and summary of what a run left

DIR/results.json is written anew after every case. The cases with a goal come first, then (not with --case)
the calibration of the plan's arithmetic, see calibration.py, then the other cases in a shuffled order: a run
that is cut off is a fair sample. --seconds ends it in time to draw the figures. A case that hangs, or leaves
the GPU unusable, ends the process with status 75; the same command with --resume goes on after that case.
scripts/gpu_report.sh does this, and the build and the tests before it.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import calibration
import gpu_grid
import gpu_summary
import grid
import paired
from gpu_runner import (
    LEAST_ROUNDS,
    Run,
    plans_of,
    report_of,
    run_as_asked,
    warm_up,
)
from records import RECURRENT, difference

BUDGET = 0.1  # seconds for the pairs of a case
REFERENCE_HIDDEN = (64, 256, 768)
CALIBRATION_SECONDS = 30  # at most
SMOKE_TOLERANCE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of each tensor's largest value


def compare(case, theirs, ours, device):
    """(difference of all results, errors of both outputs against float64; None in training, and for most
    cases, since float64 takes longer than the case: the tests are there for it)."""
    apart = difference(theirs, ours)
    if case.group == "cells" or case.mode == "training" or case.shape.hidden not in REFERENCE_HIDDEN:
        return apart, None
    expected = case.reference(device)
    rows = gpu_grid.REFERENCE_ROWS
    errors = {
        name: difference([expected], [results[0][:, :rows]])
        for name, results in (("torch", theirs), ("fastseq", ours))
    }
    return apart, errors


def measure_case(case, device, timer, budget, longest):
    theirs, ours = case.functions(device)
    results = warm_up("torch", theirs, timer, longest), warm_up("fastseq", ours, timer, longest)
    apart, errors = compare(case, *results, device)
    del results  # the memory of two networks' gradients
    pairs = paired.measure(theirs, ours, None, budget, LEAST_ROUNDS, timer)
    seconds = {"torch": statistics.median(pairs.a), "fastseq": statistics.median(pairs.b)}
    shape = case.shape
    return {
        "name": case.name,
        "group": case.group,
        "cell": case.cell,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": shape.name,
        "steps": shape.steps,
        "batch": shape.batch,
        "input": shape.input,
        "hidden": shape.hidden,
        "layers": shape.layers,
        "bidirectional": shape.bidirectional,
        "ratio": statistics.median(pairs.ratios),
        "ratio_quartiles": statistics.quantiles(pairs.ratios, n=4),
        "pairs": len(pairs.ratios),
        "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
        "us_per_step": {name: value * 1e6 / shape.steps for name, value in seconds.items()},
        "tflops": {name: case.flops / value / 1e12 for name, value in seconds.items()},
        "difference": apart,
        "errors": errors,
        "others": pairs.others,
        "plan": plans_of(ours),
    }


class RecurrentRun(Run):
    """The plan's arithmetic is calibrated at `points`, between the cases with a goal and the others."""

    file = RECURRENT
    kept = (*Run.kept, "calibration")
    columns = "case, ratio, milliseconds a call and microseconds a step of torch and of fastseq, plan"

    def __init__(self, arguments, folder, chosen, device, timer, steps, points=()):
        nothing = {"note": "", "left_out": {}, "records": []}
        super().__init__(arguments, folder, chosen, device, timer, calibration=nothing)
        self.points, self.goals = points, {case.name for case in gpu_grid.goal_cases(steps)}

    def measure(self, case):
        return measure_case(case, self.device, self.timer, self.arguments.budget, self.arguments.longest)

    def line(self, record):
        return gpu_summary.case_line(record)

    def before(self, case):
        if self.points and case.name not in self.goals:
            points, self.points = self.points, ()
            self.calibrate(points)

    def failures(self):
        return super().failures() + list(self.results["calibration"]["left_out"].values())

    def calibrate(self, points, has_plans=calibration.has_plans, measure=calibration.measure):
        """Those of `points` that are not done yet, while there is time."""
        results = self.results["calibration"]
        records, left_out = results["records"], results["left_out"]
        if not has_plans(self.device):
            results["note"] = f"skipped, no CUDA plan exists on {self.device}"
            print(f"calibration: {results['note']}")
            return
        print(calibration.HEADER)
        end = time.perf_counter() + min(CALIBRATION_SECONDS, self.time_left())
        done = {r["name"] for r in records} | set(left_out)
        waiting = [point for point in points if point.name not in done]
        while waiting and time.perf_counter() < end:
            point = waiting.pop(0)

            def note(why, name=point.name):
                left_out[name] = why
                print(f"{name:52} left out: {why}", flush=True)

            with self.watched(note):
                record = measure(point, records, self.device, self.timer)
                if record:
                    records.append(record)
                    print(calibration.line(record), flush=True)
            self.save()
        results["note"] = f"out of time with {len(waiting)} of {len(points)} plans to try" if waiting else ""
        self.save()


def difference_from_float64(case, device):
    """Of outputs and gradients, from torch's in float64 on the CPU.

    No kernel but fastseq's and those of matrix products runs on the GPU, so that a sanitizer can watch it.
    """
    x, grad = (tensor.double() for tensor in case.inputs())
    theirs, mine = case.modules()
    expected = grid.trains(copy.deepcopy(theirs).double(), x, grad)()
    x, grad = case.inputs()
    results = grid.trains(mine.to(device), x.to(device), grad.to(device))()
    return difference(expected, [tensor.cpu() for tensor in results])


def report(results, folder):
    report_of(results, folder, "gpu_figures", gpu_summary, "grid")


def steps_of(arguments):
    return 2 if arguments.dry_run_on_cpu else gpu_grid.STEPS


def cases(arguments):
    return gpu_grid.smoke_cases() if arguments.smoke else gpu_grid.cases(steps_of(arguments))


def start(arguments, *rest):
    points = () if arguments.case else calibration.points()
    return RecurrentRun(arguments, *rest, steps_of(arguments), points)


def main():
    return run_as_asked(
        __doc__,
        BUDGET,
        "two time steps",
        RECURRENT,
        cases,
        difference_from_float64,
        SMOKE_TOLERANCE,
        start,
        report,
    )


if __name__ == "__main__":
    sys.exit(main())
