"""Two functions timed against each other on a machine that may be busy with other things, CPU or GPU.

They are called in turn, A B A B, so that whatever slows the machine down slows both, and the result is the
median of the ratios of neighbouring samples. Absolute times are kept as well, but only the ratio, and the
share of a peak that is measured in between, mean the same thing tomorrow.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from timers import HostTimer

MOST_PAIRS = 41
MOST_PEAKS = 5  # readings of the peak, spread over a case


@dataclass
class Pairs:
    a: list[float] = field(default_factory=list)  # seconds per call, one entry per pair
    b: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)  # what `peak` returned, measured between the pairs
    others: float | None = None  # cores that other programs kept busy meanwhile, if the system tells

    @property
    def ratios(self):
        return [a / b for a, b in zip(self.a, self.b, strict=True)]


def repeats_for(function, timer):
    """How many calls make a sample long enough, judged by the least disturbed of three."""
    repeats = 1
    if timer.sample(function, 1) > timer.long:
        return repeats
    while True:
        seconds = min(timer.sample(function, repeats) for _ in range(3))
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


def measure(a, b, peak, budget, least_pairs, timer=None):
    """Time `a` and `b` in turn for about `budget` seconds, but for at least `least_pairs` pairs.

    Both should have been called before: a first call may load, allocate or pack. `peak` may be None.
    """
    timer = timer or HostTimer()
    repeats_a, repeats_b = repeats_for(a, timer), repeats_for(b, timer)
    result, before, start = Pairs(), busy_seconds(), time.perf_counter()
    elapsed = 0.0
    while len(result.a) < least_pairs or (elapsed < budget and len(result.a) < MOST_PAIRS):
        if peak and len(result.peaks) < MOST_PEAKS and elapsed >= budget * len(result.peaks) / MOST_PEAKS:
            result.peaks.append(peak())
        result.a.append(timer.sample(a, repeats_a))
        result.b.append(timer.sample(b, repeats_b))
        elapsed = time.perf_counter() - start
    if before:
        total, own = (now - then for now, then in zip(busy_seconds(), before, strict=True))
        result.others = max(0.0, (total - own) / elapsed)
    return result
