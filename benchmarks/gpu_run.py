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

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

import calibration
import fastseq
import gpu_grid
import gpu_summary
import grid
import paired
from environment import CLOCKS, gpu_environment, nvidia_smi
from records import RESULTS, choose, difference, read, save, slug
from timers import CudaTimer, HostTimer

AGAIN = 75  # exit status: start again with --resume
LEAST_PAIRS = 3
KEPT = ("environment", "ceilings", "left_out", "calibration", "cases")  # of results, by --resume
REFERENCE_HIDDEN = (64, 256, 768)
CALIBRATION_SECONDS = 30  # at most
DRAW_SECONDS = 15  # of --seconds, kept for the figures
SMOKE_TOLERANCE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of each tensor's largest value


class LeftOut(Exception):
    """Why a case is not timed."""


def parse_arguments():
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write (default: benchmarks/results/<the GPU's name>)",
    )
    add("--case", metavar="PATTERN", help="only cases whose name contains this regular expression")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--smoke", action="store_true", help="compare small cases with torch in float64 on the CPU and stop")
    add("--from-results", type=Path, metavar="DIR", help="measure nothing: draw and print what is there")
    add("--resume", action="store_true", help="keep what DIR/results.json has, go on with what it lacks")
    add("--seconds", type=float, metavar="S", default=600.0, help="for everything (default: 600)")
    add("--budget", type=float, metavar="S", default=0.1, help="time for the pairs of a case (default: 0.1)")
    add(
        "--longest",
        type=float,
        metavar="S",
        default=2.0,
        help="leave out a case of which one warm call takes either library longer (default: 2)",
    )
    add("--hang", type=float, metavar="S", default=30.0, help="a case that takes longer hangs (default: 30)")
    add(
        "--dry-run-on-cpu",
        action="store_true",
        help="rehearse on the CPU with two time steps: no result, but every step of the way",
    )
    arguments = parser.parse_args()
    for name in ("seconds", "budget", "longest", "hang"):
        value = getattr(arguments, name)
        if value <= 0:
            parser.error(f"argument --{name}: given {value}, accepted is a number above 0")
    return parser, arguments


# ------------------------------------------------------------------------------------------------ one case


def plans_of(function):
    """Which plans fastseq has for the layers of a call, as text: those of each layer once."""
    try:
        calls = [call for call in fastseq.explain(function) if call.operator != "recurrent_backward"]
        plans = [("forward", call.plan) for call in calls] + [("backward", call.backward) for call in calls]
        texts = [f"{name} {plan.kernel} {json.dumps(plan.partition)}" for name, plan in plans if plan]
        return "; ".join(dict.fromkeys(texts))
    except Exception as error:  # what cannot be explained can still be timed
        return f"explain failed: {error}"


def warm_up(name, function, timer, longest):
    """The first call, which may load, compile and allocate, and a second that must be fast enough."""
    results = function()
    timer.wait()
    seconds = timer.sample(function, 1)
    if seconds > longest:
        raise LeftOut(f"one call of {name} takes {seconds:.2f} s")
    return results


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
    pairs = paired.measure(theirs, ours, None, budget, LEAST_PAIRS, timer)
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


def ceilings(device, timer, tiny):
    """What the device can do at best: copying within its memory, and a large matrix product of bfloat16."""
    size, count = (64, 2**12) if tiny else (8192, 2**30)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    # Random values: on zeros a GPU draws less power and keeps higher clocks.
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))

    def best(function):
        for _ in range(3):
            function()
        return min(timer.sample(function, 5) for _ in range(5))

    return {
        "copy_terabytes_per_second": 2 * count / best(lambda: target.copy_(source)) / 1e12,
        "bfloat16_product_tflops": 2 * size**3 / best(lambda: torch.mm(a, b)) / 1e12,
    }


# ------------------------------------------------------------------------------------------------ the run


class Run:
    """The results so far and the file that they are kept in."""

    def __init__(self, arguments, folder, chosen, device, timer, steps):
        self.arguments, self.device, self.timer = arguments, device, timer
        self.started, self.steps = time.perf_counter(), steps
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.json"
        self.results = {
            "environment": gpu_environment(device),
            "dry_run": arguments.dry_run_on_cpu,
            "complete": False,
            "planned": len(chosen),
            "ceilings": None,
            "left_out": {},  # name of a case: why it was not timed
            "calibration": {"note": "", "left_out": {}, "records": []},
            "cases": [],
        }
        if arguments.resume and self.path.exists():
            before = read(self.path)
            self.results |= {key: before[key] for key in KEPT if key in before}
        done = {r["name"] for r in self.results["cases"]} | set(self.results["left_out"])
        self.waiting = [case for case in chosen if case.name not in done]

    def save(self):
        self.results["complete"] = not self.waiting
        save(self.results, self.path)

    def leave_out(self, case, why):
        self.results["left_out"][case.name] = why
        print(f"{case.name:52} left out: {why}", flush=True)

    def abandon(self, note, why):
        """The GPU, or this thread's use of it, is lost: keep what there is, and let another process go on.

        Without the interpreter's farewells, which would wait for the GPU.
        """
        note(why)
        self.save()
        os._exit(AGAIN)

    @contextlib.contextmanager
    def watched(self, note):
        """What is done in here is abandoned if it hangs or breaks the GPU, and left if it raises; `note(why)`
        writes down why."""
        hang = self.arguments.hang
        watch = threading.Timer(hang, self.abandon, (note, f"it hung for {hang:g} seconds"))
        watch.daemon = True
        watch.start()
        try:
            yield
        except LeftOut as reason:
            note(str(reason))
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            try:
                self.timer.wait()
            except Exception:  # an illegal access: every later call would fail with the same words
                self.abandon(note, why)
            note(why)
        finally:
            watch.cancel()
        if self.timer.__class__ is CudaTimer:
            torch.cuda.empty_cache()  # the next case has other sizes

    def time_left(self):
        return self.arguments.seconds - DRAW_SECONDS - (time.perf_counter() - self.started)

    def one(self, case):
        arguments = self.arguments

        def note(why):
            self.leave_out(case, why)
            self.waiting.remove(case)

        with self.watched(note):
            record = measure_case(case, self.device, self.timer, arguments.budget, arguments.longest)
            self.results["cases"].append(record)
            self.waiting.remove(case)
            print(f"[{len(self.waiting):3} left] {gpu_summary.case_line(record)}", flush=True)

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

    def all(self, points):
        print("case, ratio, milliseconds a call and microseconds a step of torch and of fastseq, plan")
        self.save()
        if self.results["ceilings"] is None:
            self.results["ceilings"] = ceilings(self.device, self.timer, self.results["dry_run"])
            self.save()
        goals = {case.name for case in gpu_grid.goal_cases(self.steps)}
        calibrated = not points
        while self.waiting and self.time_left() > 0:
            if not calibrated and self.waiting[0].name not in goals:
                self.calibrate(points)
                calibrated = True
            self.one(self.waiting[0])
            self.save()
        self.results["environment"]["clocks_after"] = nvidia_smi(*CLOCKS)
        self.results["environment"]["load_at_end"] = os.getloadavg()
        self.save()


def smoke(chosen, device):
    """Compare outputs and gradients with torch's in float64 on the CPU; returns the exit status.

    No kernel but fastseq's and those of matrix products runs on the GPU, so that a sanitizer can watch it.
    """
    failures = 0
    for case in chosen:
        x, grad = (tensor.double() for tensor in case.inputs())
        theirs, mine = case.modules()
        expected = grid.trains(copy.deepcopy(theirs).double(), x, grad)()
        x, grad = case.inputs()
        try:
            results = grid.trains(mine.to(device), x.to(device), grad.to(device))()
            apart = difference(expected, [tensor.cpu() for tensor in results])
            right = apart <= SMOKE_TOLERANCE[case.dtype]
            print(f"{'ok   ' if right else 'WRONG'} {apart:8.1e}  {case.name}", flush=True)
        except Exception as error:
            right = False
            print(f"ERROR {case.name}: {type(error).__name__}: {error}", flush=True)
        failures += not right
    print(f"{len(chosen) - failures} of {len(chosen)} small cases compute what torch.nn does in float64")
    return 1 if failures else 0


def report(results, folder):
    """Draw and print; figures are no reason to fail, since they can be drawn from the file later."""
    if results["cases"]:
        try:
            import gpu_figures  # here, so that a machine without matplotlib can measure

            print("\n".join(f"wrote {path}" for path in gpu_figures.draw(results, folder)))
        except Exception:
            traceback.print_exc()
    # scripts/gpu_report.sh finds the summary in its log by the first line and the last.
    print("\n".join(["-- grid", *gpu_summary.text(results), "-- end of grid"]), flush=True)


def choose_device(parser, arguments):
    if arguments.dry_run_on_cpu:
        return "cpu", HostTimer()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU\none is needed\ntry --dry-run-on-cpu for a rehearsal")
    return "cuda", CudaTimer()


def main():
    parser, arguments = parse_arguments()
    if arguments.from_results:
        report(read(arguments.from_results / "results.json"), arguments.from_results)
        return 0
    steps = 2 if arguments.dry_run_on_cpu else gpu_grid.STEPS
    every = gpu_grid.smoke_cases() if arguments.smoke else gpu_grid.cases(steps)
    chosen = choose(parser, every, pattern=arguments.case)
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    device, timer = choose_device(parser, arguments)
    if arguments.smoke:
        return smoke(chosen, device)

    folder = arguments.out
    if folder is None:
        folder = RESULTS / slug(torch.cuda.get_device_name() if device == "cuda" else "rehearsal")
    run = Run(arguments, folder, chosen, device, timer, steps)
    try:
        run.all([] if arguments.case else calibration.points())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    report(run.results, folder)
    print(f"wrote {run.path}")
    failed = [why for why in run.results["left_out"].values() if not why.startswith("one call of torch")]
    failed += run.results["calibration"]["left_out"].values()
    return 1 if failed or not run.results["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())
