"""Worlds of processes for tests: started once, each check is a function that all of them call.

A function of a test module is called in every process with its arguments, its result comes back pickled. What
hangs is a failure: the group gives up after GROUP_TIMEOUT seconds, and the caller after TIMEOUT.
"""

import os
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = 50  # seconds for one call of all processes
START_TIMEOUT = 120  # every process imports torch first
GROUP_TIMEOUT = 20


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no name of the machine has to be resolved
    torch.set_num_threads(1)
    timeout = timedelta(seconds=GROUP_TIMEOUT)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    pipe.send((True, None))
    while (call := pipe.recv()) is not None:
        function, arguments, keywords = call
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*arguments, **keywords)))
        except Exception:
            pipe.send((False, f"in process {rank}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class World:
    """`size` processes of one gloo group on this machine; use it as a context manager."""

    def __init__(self, size: int, folder: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.size, self.pipes, self.processes = size, [], []
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes import torch
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (rank, size, f"file://{folder}/store", theirs)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                self.pipes.append(ours)
                self.processes.append(process)
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        self._results(START_TIMEOUT)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: Any) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()

    def run(self, function: Any, *arguments: Any, **keywords: Any) -> list[Any]:
        """function(*arguments, **keywords) in every process; the results in the order of ranks."""
        for pipe in self.pipes:
            pipe.send((function, arguments, keywords))
        return self._results(TIMEOUT)

    def _results(self, seconds: float) -> list[Any]:
        answers, end = [], time.monotonic() + seconds
        for rank, pipe in enumerate(self.pipes):
            try:
                arrived = pipe.poll(max(0.0, end - time.monotonic()))
                answers.append(pipe.recv() if arrived else (False, f"process {rank} hangs"))
            except EOFError:
                answers.append((False, f"process {rank} died"))
        broken = [text for good, text in answers if not good]
        if any(text.endswith(("hangs", "died")) for text in broken):
            for process in self.processes:  # the others would wait for it in every later call
                process.kill()
        assert not broken, "\n".join(broken)
        return [result for _, result in answers]
