"""How long a call takes: one interface, a clock for the CPU and one for a GPU.

A timer has `sample(function, repeats)`, the seconds of one call out of so many in a row, `wait()`, which
returns when all that was started has ended, and two lengths that calibrate a measurement: a sample repeats
its function for `enough` seconds at least, and a call of `long` seconds is a sample by itself.
`replayed(function)` does the same work without what the host does for it, where a device can.
"""

from __future__ import annotations

import time

import torch


class HostTimer:
    enough, long = 0.02, 0.5

    def sample(self, function, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats

    def wait(self):
        pass

    def replayed(self, function):
        return function


class ProcessTimer(HostTimer):
    """The processor's time of this process alone: of use on one thread, beside other programs."""

    def sample(self, function, repeats):
        start = time.process_time()
        for _ in range(repeats):
            function()
        return (time.process_time() - start) / repeats


class CudaTimer:
    """CUDA events on the current stream, so that what is timed is the GPU's work and its gaps.

    Ten milliseconds are 20,000 times the resolution of an event, and a thousand times the few microseconds
    between the first event and the first kernel. Nothing waits between the calls of a sample: a library that
    launches one kernel after the other pays for it, as it would in a program that keeps the GPU busy.
    """

    enough, long = 0.01, 0.05

    def __init__(self):
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, function, repeats):
        self.start.record()
        for _ in range(repeats):
            function()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / repeats

    def wait(self):
        torch.cuda.synchronize()

    def replayed(self, function):
        """The kernels that a call launches, from a CUDA graph; it should have been called before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay
