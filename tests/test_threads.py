"""Threads: torch's setting, the GIL, several Python threads at once, forked children, a busy machine."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastseq
from harness import Case, assert_same_bits, make_data, make_module, run_module, threads
from reference import MODES

CORES = len(os.sched_getaffinity(0))
LARGE = Case(steps=60, batch=64, input_size=256, hidden_size=256)  # worth several threads


def seconds_in_other_threads(call):
    """Processor time that threads other than this one spent during the call, and that this one spent."""
    time.sleep(0.1)  # threads that still spin after earlier work come to rest
    process, own = time.process_time(), time.thread_time()
    call()
    own = time.thread_time() - own
    return time.process_time() - process - own, own


@pytest.mark.parametrize("mode", ["LSTM", "GRU_RESET_BEFORE"])
def test_set_num_threads_is_obeyed(mode):
    case = replace(LARGE, mode=mode)
    module, x = make_module(case), make_data(case)["input"].detach()

    def call():
        with torch.no_grad():
            for _ in range(5):
                module(x)

    call()
    with threads(1):
        others, own = seconds_in_other_threads(call)
        assert others < 0.2 * own, "with one thread, the calling thread does all the work"
    if CORES > 1:
        with threads(2):
            others, own = seconds_in_other_threads(call)
            assert others > 0.2 * own, "with two threads, another one works too"


def test_other_python_threads_run_during_a_call(two_threads):
    """The GIL is released: a ticking thread goes on ticking while a long call is under way."""
    case = Case(steps=2000, batch=32, input_size=64, hidden_size=128)
    module, x, stop, ticks = make_module(case), make_data(case)["input"].detach(), threading.Event(), []

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        with torch.no_grad():
            start = time.perf_counter()
            module(x)
            end = time.perf_counter()
    finally:
        stop.set()
        ticker.join()
    margin = (end - start) / 10
    assert len([t for t in ticks if start + margin < t < end - margin]) >= 3


@pytest.mark.parametrize("mode", MODES)
def test_concurrent_calls_from_several_python_threads_are_right(mode):
    """One module shared by all, forward and backward, each thread with data of its own."""
    case = Case(mode, steps=10, batch=33, input_size=20, hidden_size=65)
    module = make_module(case)
    data = [make_data(case, seed) for seed in range(4)]
    expected = [run_module(case, module, d) for d in data]

    def work(i):
        return [run_module(case, module, data[i]) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(work, range(4))):
            for result in results:
                assert_same_bits(result, expected[i])


def test_calls_from_threads_with_their_own_thread_counts():
    case = Case(steps=10, batch=33, input_size=20, hidden_size=65)
    module, x = make_module(case), make_data(case)["input"].detach()
    expected = module(x)[0]

    def work(count):
        torch.set_num_threads(count)
        with torch.no_grad():
            return all(torch.equal(module(x)[0], expected) for _ in range(10))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, [1, 2, 3]))


def exit_code_of_forked(child, seconds=60):
    """Runs child() in a forked process, which is killed if it hangs; None means that it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork beside threads
        pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if child() else 1)
        except BaseException:
            os._exit(2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def in_child_equal(call, expected):
    """Whether call() gives these bits in a forked child, where torch's own threads are dead."""

    def child():
        results = call()
        torch.set_num_threads(1)
        return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    return exit_code_of_forked(child) == 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_forked_child_can_use_a_module_that_the_parent_has_used(count):
    """Forward and backward, in the child and then again in the parent, whose threads have run before."""
    module, data = make_module(LARGE), make_data(LARGE)
    leaves = [*data.values(), *module.parameters()]
    incoming = torch.randn(LARGE.steps, LARGE.batch, LARGE.hidden_size)

    def training():
        output, _ = module(data["input"], (data["h0"], data["c0"]))
        return torch.autograd.grad(output, leaves, incoming)

    def inference():
        with torch.no_grad():
            return [module(data["input"])[0]]

    with threads(count):
        for call in (inference, training):
            expected = call()
            assert in_child_equal(call, expected)
            assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))


def test_forked_child_may_choose_another_thread_count_and_fork_again():
    module, x = make_module(LARGE), make_data(LARGE)["input"].detach()

    def call():
        with torch.no_grad():
            return [module(x)[0]]

    def call_here_and_in_a_grandchild():
        torch.set_num_threads(3)
        results = call()
        torch.set_num_threads(2)
        return results if in_child_equal(call, results) else []

    with threads(2):
        assert in_child_equal(call_here_and_in_a_grandchild, call())


class Encoded(Dataset):
    """Every item is the state that a module computes, in whatever process asks for it."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = fastseq.GRU(16, 64)
        self.x = torch.randn(8, 30, 16)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(self.x[i])[1]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers_can_use_modules(context):
    data = Encoded()
    expected = torch.stack([data[i] for i in range(len(data))])  # threads have run in the parent
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=context, timeout=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("batch", [1, 32])
def test_busy_processes_beside_it_do_not_make_it_collapse(batch):
    """As many busy loops as cores: half of the speed is fair, a lost time slice at every step is not."""
    case = Case(steps=200, batch=batch, input_size=64, hidden_size=128)
    module, x = make_module(case), make_data(case)["input"].detach()

    def seconds(repeats):
        times = []
        with torch.no_grad(), threads(min(2, CORES)):
            for _ in range(repeats):
                start = time.perf_counter()
                module(x)
                times.append(time.perf_counter() - start)
        return sorted(times)[repeats // 2]

    quiet = seconds(9)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
    try:
        time.sleep(0.3)
        crowded = seconds(9)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert crowded < 20 * quiet + 0.02
