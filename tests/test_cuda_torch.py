"""The CUDA engine among torch's modes and settings: autocast, and the precision of float32 products."""

import threading
from dataclasses import replace

import pytest
import torch

import fastseq
from devices import HOPPER
from fastseq import loops
from fastseq import precision as of_products
from harness import Case, assert_same_bits, cell_class, make_data, make_module, run_module
from reference import MODES

pytestmark = pytest.mark.cuda_host

KERNELS = ("cluster:2", "grid:2", "stream:2", "steps")
CASE = Case(hidden_size=20, batch=5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_within_a_layer(twin, kernel, dtype):
    """Torch's products stay in the dtype of the tensors, whose memory the kernels read."""
    case = replace(CASE, dtype=dtype)
    module, data = make_module(case), make_data(case)
    with twin.using(kernel, HOPPER, tf32=False):
        expected = run_module(case, module, data)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(run_module(case, module, data), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_changes_no_product_of_the_operators(twin, kernel):
    """Their tensors are float32, and the casts are the business of those who call them."""
    module, data = make_module(CASE), make_data(CASE)
    leaves = [*data.values(), *module.parameters()]

    def run():
        weights, options = list(module.parameters()), ("LSTM", 1, True, False, "nothing")
        tensors = (data["input"], None, None, None, data["h0"], data["c0"])
        results = torch.ops.fastseq.recurrent(*tensors, weights, *options)
        grads = torch.autograd.grad(results[0].sin().sum(), leaves)
        return {str(i): x.detach() for i, x in enumerate((*results[:3], *grads))}

    with twin.using(kernel, HOPPER, tf32=False):
        expected = run()
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(run(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing_within_a_cell(twin, mode, dtype):
    cls, arguments = cell_class(fastseq, mode)
    cell, x = cls(6, 7, dtype=dtype, **arguments), torch.randn(12, 6, dtype=dtype)
    tensors = (x, None, None, *cell.parameters())

    def step():
        return {"h": torch.ops.fastseq.recurrent_cell(*tensors, mode, False)[0].detach()}

    with twin.using("", HOPPER, tf32=False):
        expected = step()
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(step(), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_reaches_a_layer_and_a_cell(twin, kernel):
    """float32 modules compute as bfloat16 ones do."""
    module, cell = make_module(CASE), fastseq.GRUCell(4, 7)
    data = {name: x.detach() for name, x in make_data(CASE).items()}
    with twin.using(kernel, HOPPER, tf32=False):
        with torch.autocast("cpu", torch.bfloat16):
            ours = module(data["input"], (data["h0"], data["c0"]))[0], cell(data["input"][0])
        x, h0, c0 = (x.bfloat16() for x in data.values())
        cast = module.bfloat16()(x, (h0, c0))[0], cell.bfloat16()(x[0])
    for a, b in zip(ours, cast, strict=True):
        assert torch.equal(a.bfloat16(), b)


@pytest.fixture
def precision():
    """torch's setting for float32 products, put back afterwards."""
    if of_products._get is None:
        pytest.skip("this torch has no fp32_precision")
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision = before


@pytest.mark.parametrize("before", ["ieee", "tf32", "none"])
def test_precision_of_products_is_what_it_was_after_calls_that_overlap(precision, before):
    precision.fp32_precision = before
    entered, leave = threading.Event(), threading.Event()

    def other():
        with of_products.products("tf32"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with of_products.products("tf32"):
        thread.start()
        assert entered.wait(10)
    assert precision.fp32_precision == "tf32", "the other call goes on"
    leave.set()
    thread.join()
    assert precision.fp32_precision == before


def test_inherited_precision_goes_on_being_inherited(precision):
    precision.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
    with of_products.products("tf32"):
        pass
    torch.backends.fp32_precision = "ieee"
    assert precision.fp32_precision == "ieee"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_precision_is_left_alone_for_other_dtypes(precision, dtype):
    precision.fp32_precision = "ieee"
    with of_products.products(of_products.of_recurrent_networks(dtype)):
        assert precision.fp32_precision == "ieee"


def test_products_are_exact_where_recurrent_networks_are(precision, monkeypatch):
    """Whatever is allowed for other products."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    precision.fp32_precision = "tf32"
    with of_products.products(of_products.of_recurrent_networks(torch.float32)):
        assert precision.fp32_precision == "ieee"
    assert precision.fp32_precision == "tf32"


def test_sequences_of_like_lengths_share_a_plan(twin):
    module = make_module(CASE)
    loops._plan.cache_clear()
    with twin.using("", HOPPER, tf32=False), torch.no_grad():
        for steps in (33, 40, 50, 64):
            module(torch.randn(steps, 5, 4))
    assert loops._plan.cache_info().misses == 1
