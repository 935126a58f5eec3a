"""Two functions timed against each other on a machine that may be busy with other things.

They are called in turn, A B A B, so that whatever slows the machine down slows both, and the result is the
median of the ratios of neighbouring samples. Absolute times are kept as well, but only the ratio, and the
share of a peak that is measured in between, mean the same thing tomorrow.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_SECONDS = 0.02  # a sample repeats its function for at least so long
LONG_SECONDS = 0.5  # a call of so long is a sample by itself
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


def sample(function, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def repeats_for(function):
    """How many calls make a sample long enough, judged by the least disturbed of three."""
    repeats = 1
    if sample(function, 1) > LONG_SECONDS:
        return repeats
    while True:
        seconds = min(sample(function, repeats) for _ in range(3))
        if seconds * repeats >= SAMPLE_SECONDS:
            return repeats
        repeats = max(2 * repeats, min(10 * repeats, round(1.2 * SAMPLE_SECONDS / seconds)))


def busy_seconds():
    """CPU seconds used so far by all programs, and by this one; None where the system does not tell."""
    try:
        first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first_line.split()[1:9])
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return total, time.process_time()


def measure(a, b, peak, budget, least_pairs):
    """Time `a` and `b` in turn for about `budget` seconds, but for at least `least_pairs` pairs.

    Both should have been called before: a first call may load, allocate or pack.
    """
    repeats_a, repeats_b = repeats_for(a), repeats_for(b)
    result, before, start = Pairs(), busy_seconds(), time.perf_counter()
    elapsed = 0.0
    while len(result.a) < least_pairs or (elapsed < budget and len(result.a) < MOST_PAIRS):
        if len(result.peaks) < MOST_PEAKS and elapsed >= budget * len(result.peaks) / MOST_PEAKS:
            result.peaks.append(peak())
        result.a.append(sample(a, repeats_a))
        result.b.append(sample(b, repeats_b))
        elapsed = time.perf_counter() - start
    if before:
        total, own = (now - then for now, then in zip(busy_seconds(), before, strict=True))
        result.others = max(0.0, (total - own) / elapsed)
    return result
