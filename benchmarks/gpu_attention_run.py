"""Time fastseq's attention against each backend of torch's, all in turn in one process on one GPU.

    python benchmarks/gpu_attention_run.py                     # the whole grid, about five minutes
    python benchmarks/gpu_attention_run.py --case "attention: full .* S4096 D128"
    python benchmarks/gpu_attention_run.py --smoke             # small cases against float64, nothing timed
    python benchmarks/gpu_attention_run.py --from-results DIR  # figures and summary of what a run left

DIR/attention.json is written anew after every case. The cases whose goal is a number of TFLOP/s come first,
then those with a goal of their own, then the others that torch has, then options, each in a shuffled order: a
run that is cut off is a fair sample. Beside forward and backward together, the backward pass is timed alone,
and short steps of decoding also from a CUDA graph, without what the host does for them.

A backend that refuses a case is no failure, and the record says why it did. --seconds ends the run in time to
draw the figures. A case that hangs, or leaves the GPU unusable, ends the process with status 75; the same
command with --resume goes on after that case, and without the kernels for Hopper GPUs if these may have been
to blame. scripts/gpu_report.sh does this.
"""

from __future__ import annotations

import os
import statistics
import sys
import warnings
from dataclasses import replace

import torch

import gpu_attention_grid
import gpu_attention_summary
import paired
from attention_exact import Sample
from attention_grid import TRAINED, grad_of_output
from gpu_runner import (
    LEAST_ROUNDS,
    LeftOut,
    Run,
    in_short,
    plans_of,
    report_of,
    run_as_asked,
    warm_up,
)
from records import ATTENTION, difference

BUDGET = 0.15  # seconds for the rounds of a case
LOOKS = 2  # at how long a call takes, before its rounds
HOST_BOUND = 5e-4  # seconds; longer steps of decoding hide what the host does
FORCED, SIXTEEN_BITS = "FASTSEQ_CUDA_ATTENTION_PLAN", ("bfloat16", "float16")
OURS = ("fastseq", "unmasked")  # must run; torch's backends may refuse
SMOKE_TOLERANCE = {  # of each tensor's largest value
    "float64": 1e-11,
    "float32": 1e-5,
    "float16": 3e-3,
    "bfloat16": 2e-2,
}


def why_refused(error, said):
    """torch tells in warnings what a backend lacks, and in the error only that none is left."""
    notes = [str(warning.message).partition(" (Triggered")[0].partition("\n")[0] for warning in said]
    reasons = [note for note in notes if not note.endswith("because:")]
    return "; ".join(dict.fromkeys([*reasons, in_short(error)]))[:300]


def first_results(calls, timer, longest):
    """({name: what the first call returned}, {name: why it refused}) of all libraries."""
    results, refused = {}, {}
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                results[name] = warm_up(name, call, timer, longest)
            except (LeftOut, RuntimeError) as error:
                if name in OURS:
                    raise
                timer.wait()  # raises if it was the GPU that broke
                refused[name] = str(error) if isinstance(error, LeftOut) else why_refused(error, said)
    return results, refused


def compare(case, inputs, options, results):
    """(difference of all results from those of the most accurate of torch's backends, {library: error of a
    sample against float64}); None for what does not compute the same."""
    if case.kind == gpu_attention_grid.DROPOUT:
        return None, None  # the draws are fastseq's own; tests look at them
    sample = Sample(inputs, options, case.kind == TRAINED)
    expected = sample.exact(grad_of_output(inputs) if case.mode == "training" else None)
    known = {name: found for name, found in results.items() if name != "unmasked"}
    errors = {name: difference(expected, sample.results(found)) for name, found in known.items()}
    torchs = [name for name in known if name != "fastseq" and errors[name] == errors[name]]
    if not torchs:
        return None, errors
    best = min(torchs, key=errors.get)
    return difference(results[best], results["fastseq"]), errors


def speeds(case, seconds):
    """Of a group that moves data the bytes, of others the operations."""
    if case.group == "decoding":
        return {"gigabytes_per_second": {n: case.bytes_of_cache / s / 1e9 for n, s in seconds.items()}}
    return {"tflops": {n: case.flops_of(n) / s / 1e12 for n, s in seconds.items()}}


def timed(case, calls, timer, budget):
    rounds = paired.in_turn(calls, None, budget, LEAST_ROUNDS, timer, LOOKS)
    seconds = {name: statistics.median(values) for name, values in rounds.seconds.items()}
    ratios = {name: rounds.ratios(name, "fastseq") for name in calls if name != "fastseq"}
    return {
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_quartiles": {name: statistics.quantiles(values, n=4) for name, values in ratios.items()},
        "rounds": len(rounds.seconds["fastseq"]),
        "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
        **speeds(case, seconds),
        "others": rounds.others,
    }


def backward_alone(case, inputs, options, names, device, timer, budget):
    alone = replace(case, mode=gpu_attention_grid.BACKWARD)
    calls = alone.libraries(inputs, options, device)
    return timed(alone, {name: calls[name] for name in names}, timer, budget)


def replayed(case, calls, timer, budget):
    replays = timer.replays(calls)
    return timed(case, replays, timer, budget) if "fastseq" in replays else None


def measure_case(case, device, timer, budget, longest):
    inputs, options = case.arguments(device)
    calls = case.libraries(inputs, options, device)
    results, refused = first_results(calls, timer, longest)
    apart, errors = compare(case, inputs, options, results)
    del results  # the memory of many gradients
    calls = {name: call for name, call in calls.items() if name not in refused}
    timer = gpu_attention_grid.BackendTimer(timer)
    shape, times = case.shape, timed(case, calls, timer, budget)
    of_backward = case.group == "attention" and case.mode == "training"
    of_host = case.group == "decoding" and times["milliseconds"]["fastseq"] < HOST_BOUND * 1e3
    return {
        **case.facts,
        "batch": shape.batch,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads or shape.heads,
        "queries": shape.queries,
        "keys": case.keys,
        "head_size": shape.head_size,
        **times,
        "backward": backward_alone(case, inputs, options, calls, device, timer, budget)
        if of_backward
        else None,
        "replayed": replayed(case, calls, timer, budget) if of_host else None,
        "refused": refused,
        "default_is": gpu_attention_grid.default_backend(inputs, options) if "default" in calls else None,
        "difference": apart,
        "errors": errors,
        "plan": plans_of(calls["fastseq"]),
    }


class AttentionRun(Run):
    """After a case that hung or broke the GPU, and may have run the kernels for Hopper GPUs, the others run
    without these."""

    file = ATTENTION
    kept = (*Run.kept, "without_hopper")
    columns = "case, fastseq's milliseconds and speed, its ratio to each of the others, plan"

    def __init__(self, arguments, folder, chosen, device, timer):
        super().__init__(arguments, folder, chosen, device, timer, without_hopper=None)
        self.forced = os.environ.get(FORCED)
        self.case = None

    def before(self, case):
        self.case = case
        if self.forced is None and self.results["without_hopper"]:
            os.environ[FORCED] = "tiles" if self.may_be_hopper(case) else ""

    def abandon(self, note, why):
        if self.forced is None and not self.results["without_hopper"] and self.may_be_hopper(self.case):
            self.results["without_hopper"] = self.case.name
        super().abandon(note, why)

    def may_be_hopper(self, case):
        older = self.device == "cuda" and torch.cuda.get_device_capability() != (9, 0)
        return case.dtype in SIXTEEN_BITS and case.group != "decoding" and not older

    def measure(self, case):
        return measure_case(case, self.device, self.timer, self.arguments.budget, self.arguments.longest)

    def line(self, record):
        return gpu_attention_summary.case_line(record)


def difference_from_float64(case, device):
    """Of outputs and gradients; made on the CPU, so that no kernel but fastseq's need run on the GPU."""
    inputs, options = case.arguments()
    sample = Sample(inputs, options, case.kind == TRAINED, everything=True)
    exact = sample.exact(grad_of_output(inputs) if case.mode == "training" else None)
    there = [x.to(device) for x in inputs]
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}
    results = [x.cpu() for x in case.ours(there, options)()]
    return difference(exact, sample.results(results))


def report(results, folder):
    report_of(results, folder, "gpu_attention_figures", gpu_attention_summary, "attention grid")


def cases(arguments):
    scale = gpu_attention_grid.REHEARSAL if arguments.dry_run_on_cpu else 1
    return gpu_attention_grid.smoke_cases() if arguments.smoke else gpu_attention_grid.cases(scale)


def main():
    torch.set_float32_matmul_precision("highest")  # float32 is no tf32 here, on either side
    return run_as_asked(
        __doc__,
        BUDGET,
        f"{gpu_attention_grid.REHEARSAL} times fewer tokens",
        ATTENTION,
        cases,
        difference_from_float64,
        SMOKE_TOLERANCE,
        AttentionRun,
        report,
    )


if __name__ == "__main__":
    sys.exit(main())
