"""Functions timed against each other on a machine that may be busy with other things, CPU or GPU.

They are called in turn, A B A B, or A B C A B C, so that whatever slows the machine down slows all of them,
and the result is the median of the ratios of neighbouring samples. Absolute times are kept as well, but only
the ratio, and the share of a peak that is measured in between, mean the same thing tomorrow.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from timers import HostTimer

MOST_ROUNDS = 41
MOST_PEAKS = 5  # readings of the peak, spread over a case


@dataclass
class Rounds:
    seconds: dict[str, list[float]]  # per call, one entry per round
    peaks: list[float] = field(default_factory=list)  # what `peak` returned, measured between the rounds
    others: float | None = None  # cores that other programs kept busy meanwhile, if the system tells

    def ratios(self, a, b):
        """How many times as long as b, its neighbour in every round, a took."""
        return [x / y for x, y in zip(self.seconds[a], self.seconds[b], strict=True)]


@dataclass
class Pairs:
    a: list[float]  # seconds per call, one entry per pair
    b: list[float]
    ratios: list[float]
    peaks: list[float]
    others: float | None


def repeats_for(function, timer, looks=3):
    """How many calls make a sample long enough, judged by the least disturbed of so many looks."""
    repeats = 1
    if timer.sample(function, 1) > timer.long:
        return repeats
    while True:
        seconds = min(timer.sample(function, repeats) for _ in range(looks))
        if seconds * repeats >= timer.enough:
            return repeats
        repeats = max(2 * repeats, min(10 * repeats, round(1.2 * timer.enough / seconds)))


def busy_seconds():
    """CPU seconds used so far by all programs, and by this one; None where the system does not tell."""
    try:
        first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first_line.split()[1:9])
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return total, time.process_time()


def in_turn(functions, peak, budget, least_rounds, timer, looks=3):
    """Time {name: function} in turn for about `budget` seconds, but for at least `least_rounds` rounds.

    All should have been called before: a first call may load, allocate or pack. `peak` may be None.
    """
    repeats = {name: repeats_for(function, timer, looks) for name, function in functions.items()}
    result, before, start = Rounds({name: [] for name in functions}), busy_seconds(), time.perf_counter()
    elapsed, rounds = 0.0, 0
    while rounds < least_rounds or (elapsed < budget and rounds < MOST_ROUNDS):
        if peak and len(result.peaks) < MOST_PEAKS and elapsed >= budget * len(result.peaks) / MOST_PEAKS:
            result.peaks.append(peak())
        for name, function in functions.items():
            result.seconds[name].append(timer.sample(function, repeats[name]))
        elapsed, rounds = time.perf_counter() - start, rounds + 1
    if before:
        total, own = (now - then for now, then in zip(busy_seconds(), before, strict=True))
        result.others = max(0.0, (total - own) / elapsed)
    return result


def measure(a, b, peak, budget, least_pairs, timer=None):
    """Two functions in turn, as in_turn() does it."""
    rounds = in_turn({"a": a, "b": b}, peak, budget, least_pairs, timer or HostTimer())
    return Pairs(**rounds.seconds, ratios=rounds.ratios("a", "b"), peaks=rounds.peaks, others=rounds.others)
