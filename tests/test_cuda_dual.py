"""Steps over dual numbers on the host twin and on a GPU: what test_dual_operators.py, which runs there too,
does not ask. How much is launched, in which precision, and that nothing is read where nothing is."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

import cuda_host
import fastseq
from devices import two_products
from fastseq import dual_ops, precision
from harness import (
    Case,
    assert_same_bits,
    make_data,
    make_module,
    states_of,
)
from sequence_options import ALL, Options
from test_dual_operators import LAYERS, SMALL, Layer
from tolerances import SAME_FLOAT64

CASES = [replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True) for mode, proj_size in LAYERS]


class Products:
    """Counts torch's products while they are called, and notes in which precision."""

    def __init__(self, monkeypatch):
        self.in_loop, self.precisions = 0, set()
        for name in ("bmm", "mm", "addmm"):
            monkeypatch.setattr(torch, name, self.counted(name, getattr(torch, name)))

    def counted(self, name, product):
        def call(*arguments, **options):
            self.in_loop += name == "bmm"
            self.precisions.add(precision._of_products())
            return product(*arguments, **options)

        return call


@pytest.mark.parametrize("given", [None, ["input"]], ids=["all tangents", "of the input"])
@pytest.mark.parametrize("options", [Options(), Options(lengths=True), ALL], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_one_product_and_one_kernel(twin, case, options, given, monkeypatch):
    """Two of both for a second product, whatever has tangents, is reset or cut, in both directions."""
    layer, products = Layer(case, options, given), Products(monkeypatch)
    with twin.using() as ran:
        layer.run()
        launches = (2 if two_products(case) else 1) * case.steps
        kernel = "steps over dual numbers"
        assert list(ran) == [
            {"kernel": kernel, "pass": name} for name in ("forward", "backward") for _ in range(launches)
        ]
    assert products.in_loop == 2 * launches


@pytest.mark.parametrize("allowed", [False, True])
def test_products_follow_the_precision_of_recurrent_networks(twin, allowed, monkeypatch):
    products = Products(monkeypatch)
    with twin.using(tf32=allowed):
        Layer(SMALL).run()
    assert products.precisions == {"tf32" if allowed else "ieee"}
    assert precision._of_products() == "ieee"


def test_autocast_changes_nothing(twin):
    layer = Layer(replace(SMALL, bidirectional=True))
    expected = layer.run()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(layer.run(), expected)


class WithEnds(Layer):
    """With a value behind the ends of rows in the input, in what comes back to the output, and in both
    tangents."""

    def __init__(self, case: Case, value: float):
        super().__init__(case, Options(lengths=True))
        self.value, self.behind = value, torch.arange(case.steps)[:, None] >= self.rows["lengths"]
        for plane in (self.values, self.tangents):
            plane["input"][self.behind] = value

    def cotangents(self, results):
        planes = super().cotangents(results)
        for of_output, *_ in planes:
            of_output[self.behind] = self.value
        return planes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_lies_behind_the_ends_reaches_nothing(twin, case):
    layers = [WithEnds(case, value) for value in (0.0, float("nan"))]
    results = [layer.run() for layer in layers]
    assert_same_bits(*results)
    for name in ("output", "tangent of output", "grad of input", "tangent of grad of input"):
        assert not results[0][name][layers[0].behind].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plane", ["", "tangent of "], ids=["numbers", "tangents"])
def test_what_adds_up_over_many_steps_stays_wide(twin, plane, dtype):
    """c and its gradient are 1 and 512 times 2^-12, each of which 16 bits would lose beside 1. Gates are
    open, and nothing goes through h."""
    case = Case("LSTM", dtype, steps=512, batch=2, input_size=1, hidden_size=1)
    layer = Layer(case)
    for tensors in (layer.values, layer.tangents):
        for x in tensors.values():
            x.zero_()
    layer.values["bias_ih_l0"].copy_(torch.tensor([20.0, 20, 0, 20]))
    layer.values["weight_ih_l0"][2] = 1
    moving = layer.tangents if plane else layer.values
    moving["input"].fill_(2.0**-12)
    moving["c0"].fill_(1)
    of_output = torch.full((512, 2, 1), 2.0**-12, dtype=dtype)
    nothing, of_h, of_c = torch.zeros_like(of_output), torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    zeros = [nothing, of_h.to(dtype), of_h.to(dtype)]
    along = [of_output, of_h.to(dtype), of_c.to(dtype)]
    layer.cotangents = lambda results: [zeros, along] if plane else [along, zeros]
    results = layer.run()
    assert torch.equal(results[f"{plane}c_n"], torch.full((1, 2, 1), 1.125, dtype=dtype))
    if plane:  # that of numbers passes tanh, which bends
        assert torch.equal(results["tangent of grad of c0"], torch.full((1, 2, 1), 1.125, dtype=dtype))


@pytest.mark.parametrize("order", cuda_host.SCHEDULES[1:3], ids=str)
def test_no_order_of_threads_changes_a_bit(twin, order):
    layers = [Layer(replace(case, packed="sorted"), Options(truncate=True)) for case in CASES]
    expected = [layer.run() for layer in layers]
    cuda_host.set_schedule(*order)
    for layer, results in zip(layers, expected, strict=True):
        assert_same_bits(layer.run(), results)


def test_second_derivatives_of_no_rows_are_zero(twin):
    lstm = fastseq.LSTM(4, 7)
    x = torch.randn(3, 0, 4, requires_grad=True)
    leaves = list(lstm.parameters())
    grads = torch.autograd.grad(lstm(x)[0].sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in grads), leaves, allow_unused=True)
    assert all(not g.any() for g in (*grads, *(g for g in second if g is not None)))


def test_modules_of_a_gpu_have_tangents_and_second_derivatives(gpu):
    """As those of the CPU; the tests of the operators carry tensors there and back."""
    for mode, proj_size in LAYERS:
        case = Case(mode, torch.float64, proj_size=proj_size, bidirectional=True, num_layers=2)
        results = []
        for where in ("cpu", "cuda"):
            module = make_module(case).to(where)
            data = {name: x.detach().to(where).requires_grad_() for name, x in make_data(case).items()}
            leaves = [*data.values(), *module.parameters()]
            output, _ = module(data["input"], states_of(data))
            first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(data["input"], torch.ones_like(data["input"]))
                tangent = forward_ad.unpack_dual(module(dual, states_of(data))[0]).tangent
            results.append([x.detach().cpu() for x in (*second, tangent)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_a_device_without_kernels_is_a_clear_error():
    arguments, tangents, layer = Layer(SMALL).call()
    sparse = [arguments[0][0].to_sparse().unsqueeze(0), *arguments[1:]]
    with pytest.raises((RuntimeError, NotImplementedError), match="given: "):
        dual_ops.recurrent_dual(*sparse, *tangents, *layer, False, 0, True)
