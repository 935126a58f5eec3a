"""What the runs on a GPU share: their arguments, the file of results, and what is done when a case hangs.

DIR/<file> is written anew after every case. A case that raises is left out and named. One that hangs, or
leaves the GPU unusable, ends the process with status AGAIN; the same command with --resume goes on after it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

import fastseq
from environment import CLOCKS, gpu_environment, nvidia_smi
from records import RESULTS, choose, read, save, slug
from timers import CudaTimer, HostTimer

AGAIN = 75  # exit status: start again with --resume
LEAST_ROUNDS = 3
DRAW_SECONDS = 15  # of --seconds, kept for the figures


class LeftOut(Exception):
    """Why a case is not timed."""


class Heard:
    """A timer that knows when the device last answered."""

    def __init__(self, timer):
        self.timer, self.heard = timer, time.perf_counter()
        self.enough, self.long = timer.enough, timer.long

    def sample(self, function, repeats):
        seconds = self.timer.sample(function, repeats)
        self.heard = time.perf_counter()
        return seconds

    def wait(self):
        self.timer.wait()
        self.heard = time.perf_counter()

    def replayed(self, function):
        return self.timer.replayed(function)


def parse_arguments(text, budget, rehearsal):
    """The parser and its arguments. `text` is the docstring of a runner, `rehearsal` how small one is."""
    first, _, details = text.partition("\n\n")
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
    add("--smoke", action="store_true", help="compare small cases with float64 on the CPU and stop")
    add("--from-results", type=Path, metavar="DIR", help="measure nothing: draw and print what is there")
    add("--resume", action="store_true", help="keep what DIR has, go on with what it lacks")
    add("--seconds", type=float, metavar="S", default=600.0, help="for everything (default: 600)")
    add(
        "--budget",
        type=float,
        metavar="S",
        default=budget,
        help=f"time for the samples of a case (default: {budget:g})",
    )
    add(
        "--longest",
        type=float,
        metavar="S",
        default=2.0,
        help="leave out what takes longer for one warm call (default: 2)",
    )
    add(
        "--hang", type=float, metavar="S", default=30.0, help="a sample that takes longer hangs (default: 30)"
    )
    add(
        "--dry-run-on-cpu",
        action="store_true",
        help=f"rehearse on the CPU with {rehearsal}: no result, but every step of the way",
    )
    arguments = parser.parse_args()
    for name in ("seconds", "budget", "longest", "hang"):
        value = getattr(arguments, name)
        if value <= 0:
            parser.error(f"argument --{name}: given {value}, accepted is a number above 0")
    return parser, arguments


def choose_device(parser, arguments):
    if arguments.dry_run_on_cpu:
        return "cpu", HostTimer()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU\none is needed\ntry --dry-run-on-cpu for a rehearsal")
    return "cuda", CudaTimer()


def folder_of(arguments, device):
    name = torch.cuda.get_device_name() if device == "cuda" else "rehearsal"
    return arguments.out or RESULTS / slug(name)


# ------------------------------------------------------------------------------------------------ one case


def plans_of(function):
    """Which plans fastseq has for the calls of a function, as text: those of each call once."""
    try:
        calls = [call for call in fastseq.explain(function) if not call.operator.endswith("_backward")]
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


def in_short(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


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
    """The results so far and the file that they are kept in.

    A run on something measures one case in `measure`, and says in `line` how it is printed; `before` is
    called before each case.
    """

    file = ""
    kept = ("environment", "ceilings", "left_out", "cases")  # of results, by --resume
    columns = ""  # what `line` prints

    def __init__(self, arguments, folder, chosen, device, timer, **more):
        self.arguments, self.device, self.timer = arguments, device, Heard(timer)
        self.started = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / self.file
        self.results = {
            "environment": gpu_environment(device),
            "dry_run": arguments.dry_run_on_cpu,
            "complete": False,
            "planned": len(chosen),
            "ceilings": None,
            "left_out": {},  # name of a case: why it was not timed
            **more,
            "cases": [],
        }
        if arguments.resume and self.path.exists():
            before = read(self.path)
            self.results |= {key: before[key] for key in self.kept if key in before}
        done = {r["name"] for r in self.results["cases"]} | set(self.results["left_out"])
        self.waiting = [case for case in chosen if case.name not in done]

    def measure(self, case):
        raise NotImplementedError

    def line(self, record):
        raise NotImplementedError

    def before(self, case):
        pass

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
        hang, ended = self.arguments.hang, threading.Event()
        self.timer.heard = time.perf_counter()

        def watch():
            while not ended.wait(max(0.0, self.timer.heard + hang - time.perf_counter())):
                if time.perf_counter() >= self.timer.heard + hang:
                    return self.abandon(note, f"it hung for {hang:g} seconds")

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        except LeftOut as reason:
            note(str(reason))
        except Exception as error:
            traceback.print_exc()
            why = in_short(error)
            try:
                self.timer.wait()
            except Exception:  # an illegal access: every later call would fail with the same words
                self.abandon(note, why)
            note(why)
        finally:
            ended.set()
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the next case has other sizes

    def time_left(self):
        return self.arguments.seconds - DRAW_SECONDS - (time.perf_counter() - self.started)

    def one(self, case):
        def note(why):
            self.leave_out(case, why)
            self.waiting.remove(case)

        with self.watched(note):
            record = self.measure(case)
            self.results["cases"].append(record)
            self.waiting.remove(case)
            print(f"[{len(self.waiting):3} left] {self.line(record)}", flush=True)

    def all(self):
        print(self.columns)
        self.save()
        if self.results["ceilings"] is None:
            self.results["ceilings"] = ceilings(self.device, self.timer, self.results["dry_run"])
            self.save()
        while self.waiting and self.time_left() > 0:
            self.before(self.waiting[0])
            self.one(self.waiting[0])
            self.save()
        self.results["environment"]["clocks_after"] = nvidia_smi(*CLOCKS)
        self.results["environment"]["load_at_end"] = os.getloadavg()
        self.save()

    def failures(self):
        """Why cases were left out, but for those that take torch too long."""
        return [why for why in self.results["left_out"].values() if not why.startswith("one call of torch")]


def finished(run, report):
    """Do what there is time for and report it; the exit status."""
    try:
        run.all()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    report(run.results, run.path.parent)
    print(f"wrote {run.path}")
    return 1 if run.failures() or not run.results["cases"] else 0


def report_of(results, folder, figures, summary, mark):
    """Draw and print; figures are no reason to fail, since they can be drawn from the file later."""
    if results["cases"]:
        try:
            module = importlib.import_module(figures)  # here: a machine without matplotlib can measure
            print("\n".join(f"wrote {path}" for path in module.draw(results, folder)))
        except Exception:
            traceback.print_exc()
    # scripts/gpu_report.sh finds the summary in its log by the first line and the last.
    print("\n".join([f"-- {mark}", *summary.text(results), f"-- end of {mark}"]), flush=True)


def smoke(chosen, difference_of, tolerances):
    """Whether the results of all cases are within their dtype's tolerance of what is exact, relative to each
    tensor's largest value; returns the exit status."""
    failures = 0
    for case in chosen:
        try:
            apart = difference_of(case)
            right = apart <= tolerances[case.dtype]
            print(f"{'ok   ' if right else 'WRONG'} {apart:8.1e}  {case.name}", flush=True)
        except Exception as error:
            right = False
            print(f"ERROR {case.name}: {type(error).__name__}: {error}", flush=True)
        failures += not right
    print(f"{len(chosen) - failures} of {len(chosen)} small cases are right against float64")
    return 1 if failures else 0


def run_as_asked(text, budget, rehearsal, file, cases, difference_of, tolerances, start, report):
    """What a runner does, by its arguments; the exit status.

    cases(arguments) are those to choose from, difference_of(case, device) is how far one is from float64, and
    start(arguments, folder, cases, device, timer) makes the Run.
    """
    parser, arguments = parse_arguments(text, budget, rehearsal)
    if arguments.from_results:
        report(read(arguments.from_results / file), arguments.from_results)
        return 0
    chosen = choose(parser, cases(arguments), pattern=arguments.case)
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    device, timer = choose_device(parser, arguments)
    if arguments.smoke:
        return smoke(chosen, lambda case: difference_of(case, device), tolerances)
    return finished(start(arguments, folder_of(arguments, device), chosen, device, timer), report)
