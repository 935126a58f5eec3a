import faulthandler
import os
from pathlib import Path

import pytest
import torch  # before fastseq: the compiled module shares torch's OpenMP library
from hypothesis import HealthCheck, settings

import fastseq
from devices import carried_to_the_gpu, device, gpu, in_use, twin, twin_device  # noqa: F401 - fixtures

TIMEOUT = 300  # seconds for one test; a test that hangs ends the run with the stacks of all threads

settings.register_profile(
    "fastseq",
    deadline=None,
    derandomize=True,  # the same examples in every run
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastseq")


def pytest_addoption(parser):
    parser.addoption("--tally", type=Path, help="a file that always tells how many tests of how many ran")


class Tally:
    """Written anew after every test, so that a run that is ended from outside has left it."""

    def __init__(self, path):
        self.path, self.total = path, 0
        self.outcomes = {}  # of each test; a failure of any of its phases is one of the test

    def write(self):
        seen = list(self.outcomes.values())
        failed, skipped = seen.count("failed"), seen.count("skipped")
        ran = len(seen) - skipped
        text = f"{ran} of {self.total} tests ran, {failed} failed, {skipped} skipped\n"
        self.path.write_text(text)

    def pytest_collection_finish(self, session):
        self.total = len(session.items)
        self.write()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):  # the same ones in every process
        self.total = len(ids)
        self.write()

    def pytest_runtest_logreport(self, report):
        counts = report.outcome != "passed" or report.when == "call"
        if counts and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome
        if report.when == "teardown":
            self.write()


def pytest_configure(config):
    tally = config.getoption("--tally")
    if tally and not hasattr(config, "workerinput"):  # not in a process of pytest-xdist's
        config.pluginmanager.register(Tally(tally))
    config.addinivalue_line("markers", "slow: takes long, or starts what does; the sanitizers leave it out")
    config.addinivalue_line("markers", "smoke: small, and run again on every instruction set by test_isas.py")
    config.addinivalue_line("markers", "cuda_host: runs CUDA kernels on the CPU, as their host twin")
    config.addinivalue_line("markers", "gpu: needs a GPU, and fastseq built for it")
    config.stderr_for_stacks = os.dup(2)  # capture is off here; later file 2 is pytest's


def pytest_report_header(config):
    info = fastseq._C.cpu_info()
    return f"fastseq {fastseq.__version__}: {info['isa']} of {', '.join(info['isas'])}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    seconds = TIMEOUT * (3 if item.get_closest_marker("slow") else 1)
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stderr_for_stacks)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts with the same seed and leaves torch's settings as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


# Test files of what runs on the CPU and by CUDA kernels alike: each of their tests runs on every rung.
LADDER = {
    f"test_attention{name}"
    for name in (
        *("", "_accuracy", "_dropout", "_gradcheck", "_gradgradcheck", "_masked", "_options", "_properties"),
        *("_tangents", "_weights"),
    )
} | {"test_dual_operators", "test_second_derivatives"}
RUNGS = [
    "cpu",
    pytest.param("twin", marks=pytest.mark.cuda_host),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in LADDER:
        metafunc.parametrize("rung", RUNGS, indirect=True)


@pytest.fixture(autouse=True)
def rung(request):
    """Where CPU tensors are computed with: "cpu", "twin" or "gpu"."""
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
        return
    with in_use(twin_device()) if name == "twin" else carried_to_the_gpu():
        yield name


@pytest.fixture
def one_thread():
    """For small calls in large numbers, which take less time so; other tests look at threads."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def uninitialized_memory_is_nan():
    """What torch.empty returns holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
