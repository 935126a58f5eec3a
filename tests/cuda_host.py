"""The host twin, the CUDA kernels compiled for the CPU: `make build` and `make asan` leave it in build/."""

import contextlib
import functools
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import torch  # before any compiled module of ours: they share torch's OpenMP library

SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")


def path():
    """Of the compiled module: FASTSEQ_CUDA_HOST, or the one that was built with the package under test."""
    if os.environ.get("FASTSEQ_CUDA_HOST"):
        return Path(os.environ["FASTSEQ_CUDA_HOST"])
    kind = "wheel-asan" if SANITIZED else "editable"
    folder = Path(__file__).parents[1] / "build" / f"{sys.implementation.cache_tag}-{kind}"
    return folder / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"


@functools.cache
def load():
    if not path().exists():
        raise FileNotFoundError(
            f"{path()} is not there\nit is the host twin of the CUDA kernels\ncall: make build"
        )
    spec = importlib.util.spec_from_file_location("_cuda_host", path())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.use_tensors(torch.Tensor, torch.nn.Parameter)
    return module


# The orders in which threads, warps and blocks are resumed: a kernel gives the same bits in each.
SCHEDULES = [("forward", 0), ("reverse", 0)] + [("random", seed) for seed in range(4)]


def set_schedule(order, seed=0):
    load().set_schedule(getattr(load().Order, order), seed)


@contextlib.contextmanager
def leaving_out(what, turn):
    """The turn-th `what` of the kernels, a wait of prim.h or prim_hopper.h, is not done."""
    load().leave_out(what, turn)
    try:
        yield
    finally:
        load().leave_out("", 0)
