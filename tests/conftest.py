import faulthandler
import os

import pytest
import torch  # before fastseq: the compiled module shares torch's OpenMP library
from hypothesis import HealthCheck, settings

import fastseq
from devices import device, gpu, twin  # noqa: F401 - fixtures

TIMEOUT = 300  # seconds for one test; a test that hangs ends the run with the stacks of all threads

settings.register_profile(
    "fastseq",
    deadline=None,
    derandomize=True,  # the same examples in every run
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastseq")


def pytest_configure(config):
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


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
