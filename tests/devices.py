"""Where the tests run the CUDA kernels: on their host twin, which takes CPU tensors, and on a GPU.

A test that takes the fixture `device` runs on both, `twin` is the first alone, `gpu` the second. While a
device is in use, fastseq runs on its kernels; see Device.using. The tests of attention and of dual numbers
know nothing of this: conftest.py runs them on every rung, with CPU tensors.
"""

import os
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch

import cuda_host
from fastseq import _C, attention_dual_ops, attention_ops, dual_ops, loops, ops, precision
from harness import (
    Case,
    assert_all_as_accurate_as_torch,
    make_data,
    make_module,
    run_module,
    run_reference,
    run_torch,
    run_torch_in_tf32,
)
from tolerances import largest

# What the kernels tell apart: the dtype of tensors, and whether float32 may be rounded to tf32 in products.
ARITHMETIC = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
ON_TENSOR_CORES = ("tf32", "bfloat16", "float16")

# Facts of GPUs: compute capability, multiprocessors, bytes of shared memory that a block may have, of L2.
GPUS = {
    "H200": (9, 0, 132, 232448, 62914560),
    "H100": (9, 0, 132, 232448, 52428800),
    "A100": (8, 0, 108, 166912, 41943040),
    "RTX": (8, 9, 46, 101376, 33554432),
}
# Small ones, on which small layers take every way through the kernels.
HOPPER = (9, 0, 12, 232448, 62914560)
TIGHT_HOPPER = (9, 0, 12, 49152, 62914560)
AMPERE = (8, 0, 4, 40000, 1048576)
TIGHT_AMPERE = (8, 0, 4, 28000, 1048576)
TINY_AMPERE = (8, 0, 3, 20000, 1048576)

FORCED = ("FASTSEQ_CUDA_PLAN", "FASTSEQ_CUDA_ATTENTION_PLAN")


def two_products(case: Case) -> bool:
    """Whether a step of this network has two matrix products, one after the other."""
    return case.mode == "GRU_RESET_BEFORE" or case.proj_size > 0


def plans_of(case: Case, arithmetic: str, blocks: dict[str, tuple[int, ...]]) -> list[str]:
    """All values of FASTSEQ_CUDA_PLAN for a network, with these numbers of blocks for each kernel; the plan
    "steps", with which torch makes the products, has none."""
    several = (1, 2) if two_products(case) else (1, 2, 4)
    columns = several if arithmetic in ON_TENSOR_CORES else (1,)
    plans = [
        f"{kernel}:{n}x{c}{exchange}"
        for kernel in blocks
        for n in blocks[kernel]
        for c in columns
        for exchange in ((":sums", ":operand") if kernel == "cluster" else ("",))
    ]
    return plans + ["steps"] * ("steps" in blocks)


class Recorded:
    """A compiled module whose loops leave the plans that they run with, in words, in `ran`. What cells and
    loops in steps run is of kernel "steps" there."""

    def __init__(self, module):
        self.module, self.ran = module, []

    def __getattr__(self, name):
        return getattr(self.module, name)

    def loop_forward(self, plan, *arguments):
        self.ran.append({**plan.describe(), "pass": "forward"})
        self.module.loop_forward(plan, *arguments)

    def loop_backward(self, plan, *arguments):
        self.ran.append({**plan.describe(), "pass": "backward"})
        self.module.loop_backward(plan, *arguments)

    def cuda_attention_forward(self, plan, *numbers):
        self.ran.append({**plan.describe(), "pass": "forward"})
        self.module.cuda_attention_forward(plan, *numbers)

    def cuda_attention_backward(self, plan, *numbers):
        self.ran.append({**plan.describe(), "pass": "backward"})
        self.module.cuda_attention_backward(plan, *numbers)

    def cuda_attention_dual_forward(self, plan, *numbers):
        self.ran.append({**plan.describe(), "pass": "dual forward"})
        self.module.cuda_attention_dual_forward(plan, *numbers)

    def cuda_attention_dual_backward(self, plan, *numbers):
        self.ran.append({**plan.describe(), "pass": "dual backward"})
        self.module.cuda_attention_dual_backward(plan, *numbers)

    def cell_forward(self, *arguments):
        self.ran.append({"kernel": "steps", "pass": "forward"})
        self.module.cell_forward(*arguments)

    def cell_backward(self, *arguments):
        self.ran.append({"kernel": "steps", "pass": "backward"})
        self.module.cell_backward(*arguments)

    def cell_dual_forward(self, *arguments):
        self.ran.append({"kernel": "steps over dual numbers", "pass": "forward"})
        self.module.cell_dual_forward(*arguments)

    def cell_dual_backward(self, *arguments):
        self.ran.append({"kernel": "steps over dual numbers", "pass": "backward"})
        self.module.cell_dual_backward(*arguments)


class Device:
    """`where`: torch's device of the tensors; `facts`: the default ones."""

    def __init__(self, where, module, facts, stream):
        self.where, self.facts, self.stream = where, facts, stream
        self.module = Recorded(module)
        self.is_gpu = where == "cuda"

    def __repr__(self):
        return "a GPU" if self.is_gpu else "the host twin"

    def facts_like(self, facts):
        """On a GPU, those that it can keep: no more than its own, as far as both say."""
        if not self.is_gpu:
            return facts
        capability = min(facts[:2], self.facts[:2])
        return (*capability, *(min(a, b) for a, b in zip(facts[2:], self.facts[2:], strict=False)))

    @contextmanager
    def using(self, forced="", facts=None, tf32=False, attention=""):
        """fastseq runs on the kernels, with a forced plan of loops, or of attention, or none, as on a GPU of
        such facts. Gives the list in which the plans that run are found."""
        facts = self.facts if facts is None else self.facts_like(facts)
        if forced.startswith("cluster") and facts[0] < 9:
            pytest.skip("clusters need compute capability 9.0")
        engine = loops.Engine(self.module, lambda index: facts, self.stream)
        kernels, reads_tensors = ops.KERNELS.get(self.where), ops.READS_TENSORS
        dual_kernels = dual_ops.KERNELS.get(self.where)
        of_attention = attention_ops.KERNELS.get(self.where)
        of_dual = attention_dual_ops.KERNELS.get(self.where)
        attention_ops.KERNELS[self.where] = attention_ops.cuda_kernels(engine)
        attention_dual_ops.KERNELS[self.where] = attention_dual_ops.cuda_kernels(engine)
        attention_ops.READS_TENSORS = False
        before = {name: os.environ.get(name) for name in FORCED}
        allow_tf32 = torch.backends.cudnn.allow_tf32
        ops.KERNELS[self.where], ops.READS_TENSORS = ops.loop_kernels(engine), False
        dual_ops.KERNELS[self.where] = dual_ops.loop_kernels(engine)
        os.environ.update(zip(FORCED, (forced, attention), strict=True))
        torch.backends.cudnn.allow_tf32 = tf32
        self.module.ran.clear()
        try:
            yield self.module.ran
        finally:
            ops.KERNELS[self.where], ops.READS_TENSORS = kernels, reads_tensors
            dual_ops.KERNELS[self.where] = dual_kernels
            attention_ops.KERNELS[self.where], attention_ops.READS_TENSORS = of_attention, reads_tensors
            attention_dual_ops.KERNELS[self.where] = of_dual
            torch.backends.cudnn.allow_tf32 = allow_tf32
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def run(self, case, module=None, data=None) -> dict[str, torch.Tensor]:
        """Results and gradients, on the CPU; inside `using`."""
        return run_module(case, module or make_module(case), data or make_data(case), self.where)

    def check(self, case, arithmetic, forced="", facts=None) -> list[dict]:
        """Results and gradients against the float64 reference, with the forced plan; returns what ran."""
        tf32 = ARITHMETIC[arithmetic][1]
        assert case.dtype == ARITHMETIC[arithmetic][0]
        with self.using(forced, facts, tf32) as ran:
            ours = self.run(case)
            torchs, exact = expected(case, tf32, self.where)
            what = f" with FASTSEQ_CUDA_PLAN={forced!r} on {self}"
            assert_all_as_accurate_as_torch(ours, torchs, exact, case.dtype, what)
            if case.batch:
                assert {plan["pass"] for plan in ran} == {"forward", "backward"}
            kernel, numbers, exchange = [*forced.split(":"), "", ""][:3]
            blocks, _, columns = numbers.partition("x")
            for plan in ran:
                assert kernel in ("", plan["kernel"])
                assert blocks in ("", str(plan.get("blocks")))
                assert columns in ("", str(plan.get("columns")))
                if exchange and plan["pass"] == "backward":
                    assert {product["exchange"] for product in plan["products"]} == {exchange}
            return list(ran)


@cache
def expected(case: Case, tf32: bool, where: str):
    """What torch makes of a case, and what is exact."""
    module, data = make_module(case), make_data(case)
    parameters = dict(module.named_parameters())
    exact = run_reference(case, parameters, data)
    if not tf32:
        return run_torch(case, parameters, data, where), exact
    torchs = run_torch_in_tf32(case, parameters, data, where)
    if where == "cuda":  # cuBLAS need not round like that: of the two, tensor by tensor, the less accurate
        with precision.products("tf32"):
            cublas = run_reference(case, parameters, data, torch.float32, where)
        for name, x in exact.items():
            errors = [largest(y[name].double() - x.double()) for y in (torchs, cublas)]
            torchs[name] = torchs[name] if errors[0] > errors[1] else cublas[name]
    return torchs, exact


def why_no_gpu() -> str:
    """Empty if the kernels can run on a GPU here."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not _C.cuda_info()["built"]:
        return f"fastseq was built without CUDA: {_C.cuda_info()['reason']}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return ""


@cache
def twin_device() -> Device:
    return Device("cpu", cuda_host.load(), HOPPER, lambda index: 0)


@cache
def gpu_device() -> Device:
    index = torch.cuda.current_device()
    return Device("cuda", _C, loops.CUDA.facts(index), loops.CUDA.stream)


def carried(tensor, where: str):
    """What is no tensor as it is; of a tensor all memory, also between its elements, so that strides stay."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).to(where).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=where)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _carried(name, kernel):
    """An operator of recurrent networks that is given CPU tensors, and runs on the GPU."""

    def run(*arguments):
        schema = getattr(torch.ops.fastseq, name).default._schema
        given = list(arguments)
        for i, argument in enumerate(schema.arguments):
            if isinstance(given[i], list | tuple):
                given[i] = [carried(x, "cuda") for x in given[i]]
            elif argument.name != "batch_sizes":  # which stay on the CPU
                given[i] = carried(given[i], "cuda")
        results = kernel(*given)
        return type(results)(carried(x, "cpu") for x in results)

    return run


@contextmanager
def carried_to_the_gpu():
    """Attention and recurrent networks of CPU tensors run on the GPU, and their results come back."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    tables = {ops: ops.OPERATORS, dual_ops: dual_ops.OPERATORS}
    before = {table: (table.KERNELS["cpu"], ops.READS_TENSORS) for table in tables}
    for table, names in tables.items():
        gpu = table.KERNELS["cuda"]
        table.KERNELS["cpu"] = gpu._replace(**{name: _carried(name, getattr(gpu, name)) for name in names})
    ops.READS_TENSORS = False
    try:
        with _attention_carried_to_the_gpu():
            yield
    finally:
        for table, (kernels, ops.READS_TENSORS) in before.items():
            table.KERNELS["cpu"] = kernels


@contextmanager
def _attention_carried_to_the_gpu():
    of_gpu, of_cpu = attention_ops.KERNELS["cuda"], attention_ops.KERNELS["cpu"]

    def run(kernel, *arguments):
        results = kernel(*(carried(x, "cuda") for x in arguments))
        return type(results)(carried(x, "cpu") for x in results)

    kernels = (partial(run, of_gpu.attention), partial(run, of_gpu.attention_backward))
    of_dual = attention_dual_ops.KERNELS["cpu"]
    attention_ops.KERNELS["cpu"] = attention_ops.Kernels(*kernels, of_gpu.plan)
    attention_dual_ops.KERNELS["cpu"] = attention_dual_ops.Kernels(
        *(partial(run, kernel) for kernel in attention_dual_ops.KERNELS["cuda"])
    )
    attention_ops.READS_TENSORS, before = False, attention_ops.READS_TENSORS
    try:
        yield
    finally:
        attention_ops.KERNELS["cpu"], attention_ops.READS_TENSORS = of_cpu, before
        attention_dual_ops.KERNELS["cpu"] = of_dual


@contextmanager
def in_use(device: Device):
    torch.set_num_threads(1)  # torch's threads fight over small work when the machine is busy
    with device.using():
        yield device


@pytest.fixture
def twin():
    with in_use(twin_device()) as device:
        yield device
    cuda_host.set_schedule("forward")


@pytest.fixture
def gpu():
    if reason := why_no_gpu():
        pytest.skip(reason)
    with in_use(gpu_device()) as device:
        yield device


@pytest.fixture(
    params=[pytest.param("twin", marks=pytest.mark.cuda_host), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def device(request):
    """Each rung in turn."""
    return request.getfixturevalue(request.param)
