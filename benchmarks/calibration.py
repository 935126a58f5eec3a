"""The plan's arithmetic beside the clock: for a few shapes, what kernels take and what the plan says of it.

The constants at the top of csrc/cuda/plan.cpp are guesses, and one that is wrong shows in those shapes and
kernels that depend on it. The kernel that the plan chooses is timed first, then others, forced by
FASTSEQ_CUDA_PLAN, which is read at each call. Only the loop is in the times: a forward pass has few input
features, and the time of W x is taken off; a backward pass gives the gradient of h0 alone.
"""

from __future__ import annotations

import os
import statistics
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import fastseq
import paired
from summary import select

STEPS = 512
INPUT = 8  # features, as few as tensor cores like
SAMPLES = 3
FORCED = {  # values of FASTSEQ_CUDA_PLAN; the first is the plan's own choice
    "forward": ("", "cluster:8", "cluster:16", "grid", "stream", "steps"),
    "backward": (
        "",
        "cluster:8:sums",
        "cluster:8:operand",
        "cluster:16:sums",
        "cluster:16:operand",
        "grid",
        "stream",
        "steps",
    ),
}
SHAPES = (  # cell, dtype, batch, hidden size: of each kernel some, and the constants that count most there
    ("LSTM", "bfloat16", 1, 64),  # one block: what every step has; eight: the way of a message
    ("LSTM", "bfloat16", 16, 256),  # cluster: messages
    ("LSTM", "bfloat16", 1, 1024),  # grid: flags
    ("GRU", "bfloat16", 256, 1024),  # stream: weights from L2
    ("LSTM", "bfloat16", 256, 2048),  # steps: products
    ("LSTM", "bfloat16", 64, 512),  # cluster: bytes of messages
    ("LSTM", "float16", 16, 768),  # grid forward, cluster backward
    ("GRU", "bfloat16", 256, 512),  # grid: operands from L2
    ("RNN", "bfloat16", 64, 512),  # cluster: the operand gathered in the backward pass
    ("LSTM", "float32", 16, 256),  # tf32
    ("LSTM", "bfloat16", 16, 2048),  # grid forward, stream backward
    ("LSTM", "bfloat16", 64, 1024),  # grid of 32 blocks
    ("GRU", "bfloat16", 16, 256),
)


@dataclass(frozen=True)
class Point:
    cell: str
    dtype: str
    batch: int
    hidden: int
    direction: str  # forward or backward
    forced: str = ""

    @property
    def name(self):
        shape = f"{self.cell} {self.direction} {self.dtype} B{self.batch} H{self.hidden}"
        return f"{shape} {self.forced or 'as planned'}"


def points(shapes=SHAPES):
    return [
        Point(*shape, direction, forced)
        for shape in shapes
        for direction, plans in FORCED.items()
        for forced in plans
    ]


@contextmanager
def plan_forced(forced):
    before = os.environ.get("FASTSEQ_CUDA_PLAN")
    os.environ["FASTSEQ_CUDA_PLAN"] = forced
    try:
        yield
    finally:
        del os.environ["FASTSEQ_CUDA_PLAN"]
        if before is not None:
            os.environ["FASTSEQ_CUDA_PLAN"] = before


def calls(point, device, steps):
    """(the pass to time, what of it is not the loop or None); functions without arguments."""
    dtype = getattr(torch, point.dtype)
    torch.manual_seed(0)
    module = getattr(fastseq, point.cell)(INPUT, point.hidden, device=device, dtype=dtype)
    x = torch.randn(steps, point.batch, INPUT, device=device, dtype=dtype)
    if point.direction == "forward":

        def forward():
            with torch.inference_mode():
                return module(x)

        def around():
            with torch.inference_mode():
                return torch.addmm(module.bias_ih_l0, x.view(-1, INPUT), module.weight_ih_l0.t())

        return forward, around
    states = torch.randn(2, 1, point.batch, point.hidden, device=device, dtype=dtype).tanh()
    h0 = states[0].clone().requires_grad_()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    output, _ = module(x, (h0, states[1]) if point.cell == "LSTM" else h0)
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, h0, grad, retain_graph=True), None


def plan_of(function):
    """The plan of the pass that a call runs, as fastseq.explain has it; calls it."""
    return fastseq.explain(function)[-1].plan


def in_words(plan):
    partition = plan.partition
    if plan.kernel == "steps":
        return "steps"
    exchanges = {product["exchange"] for product in partition["products"]}
    return f"{plan.kernel} {partition['blocks']} x {partition['rows']} {'+'.join(sorted(exchanges))}"


def has_plans(device, explained=plan_of):
    """Whether calls run by plans of the kind that is calibrated here; on a CPU they do not."""
    call, _ = calls(Point("RNN", "float32", 1, 8, "forward"), device, 2)
    return "microseconds" in explained(call).partition


def seconds(function, timer):
    repeats = paired.repeats_for(function, timer)
    return statistics.median(timer.sample(function, repeats) for _ in range(SAMPLES))


def measure(point, known, device, timer, steps=STEPS, explained=plan_of):
    """The record of a point; None if its plan does not fit, or is one of those of its shape in `known`."""
    call, around = calls(point, device, steps)  # the forward pass of a backward one is as planned
    with plan_forced(point.forced):
        try:
            plan = explained(call)
        except RuntimeError as error:
            if "a forced plan" in str(error):
                return None
            raise
        facts = {name: getattr(point, name) for name in ("cell", "dtype", "batch", "hidden", "direction")}
        words = in_words(plan)
        if select(known, **facts, plan=words):
            return None
        timer.wait()
        took = seconds(call, timer) - (seconds(around, timer) if around else 0)
    measured, predicted = took * 1e6 / steps, plan.partition["microseconds"]
    return facts | {
        "name": point.name,
        "steps": steps,
        "forced": point.forced,
        "kernel": plan.kernel,
        "plan": words,
        "predicted_us": predicted,
        "measured_us": measured,
        "ratio": measured / predicted,
        "partition": plan.partition,
    }


# ---------------------------------------------------------------------------------------------- what it says


HEADER = f"{'pass':38} {'plan':32} {'predicted':>12} {'measured':>12} {'ratio':>6}"


def line(record):
    shape = "{cell} {direction} {dtype} B{batch} H{hidden}".format(**record)
    plan = record["plan"] + ("" if record["forced"] else " *")
    times = f"{record['predicted_us']:9.2f} us {record['measured_us']:9.2f} us"
    return f"{shape:38} {plan:32} {times} {record['ratio']:6.2f}"


def lines(results):
    """The summary: measured over predicted of each kernel and pass, and where another plan was faster."""
    records = results["records"]
    if results["note"]:
        yield f"calibration: {results['note']}"
    if not records:
        return
    yield f"calibration: {len(records)} plans, measured / predicted: median (smallest to largest)"
    for kernel in ("cluster", "grid", "stream", "steps"):
        for direction in FORCED:
            ratios = [r["ratio"] for r in select(records, kernel=kernel, direction=direction)]
            if ratios:
                median, least, most = statistics.median(ratios), min(ratios), max(ratios)
                spread = f"{median:6.2f} ({least:.2f} to {most:.2f})"
                yield f"  {kernel:8} {direction:9} {spread}, {len(ratios)} plans"
    for chosen in select(records, forced=""):
        facts = {name: chosen[name] for name in ("cell", "dtype", "batch", "hidden", "direction")}
        best = min(select(records, **facts), key=lambda r: r["measured_us"])
        if best is not chosen:
            yield f"  faster than the plan's own: {line(best)} (that one {chosen['measured_us']:.2f} us)"
