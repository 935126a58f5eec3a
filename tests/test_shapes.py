"""Any shape, any strides: property tests over small odd sizes, and the extremes one by one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastseq
from harness import (
    DTYPES,
    Case,
    assert_all_as_accurate_as_torch,
    assert_same_bits,
    cell_class,
    check,
    make_data,
    make_module,
    run_module,
    states_of,
    threads,
)
from reference import MODES
from tolerances import SAME_FLOAT64

ODD = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 127, 129])


@st.composite
def cases(draw):
    mode, hidden = draw(st.sampled_from(MODES)), draw(ODD)
    batched = draw(st.booleans())
    return Case(
        mode=mode,
        dtype=draw(st.sampled_from(DTYPES)),
        steps=draw(st.integers(1, 6)),
        batch=draw(ODD) if batched else 1,
        input_size=draw(ODD),
        hidden_size=hidden,
        num_layers=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.integers(0, hidden - 1)) if mode == "LSTM" else 0,
        packed=draw(st.sampled_from(["", "", "sorted", "unsorted"])) if batched else "",
        states=draw(st.booleans()),
        batched=batched,
    )


@settings(max_examples=100)
@given(case=cases())
def test_any_shape_matches_float64_reference(case):
    check(case)


EXTREMES = [
    Case("LSTM", steps=2, batch=2, input_size=1024, hidden_size=1024),
    Case("GRU", steps=2, batch=1, input_size=3, hidden_size=1024),
    Case("GRU_RESET_BEFORE", steps=2, batch=3, input_size=3, hidden_size=1024, dtype=torch.bfloat16),
    Case("RNN_TANH", steps=2, batch=129, input_size=1, hidden_size=1024),
    Case("LSTM", steps=2, batch=3, input_size=1, hidden_size=130, proj_size=129),
    Case("LSTM", steps=2, batch=1000, input_size=1, hidden_size=1),
    Case("GRU", steps=1, batch=70_000, input_size=1, hidden_size=1),
]


@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_extreme_sizes_match_float64_reference(case):
    check(case)


LAYOUTS = {
    "dense": lambda x: x.clone(),
    "batch and steps transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "steps last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "part of wider rows": lambda x: nn.functional.pad(x, (3, 2))[..., 3:-2],
    "every other step and row": lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
    "off by one element": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_strides_do_not_change_a_bit(mode, dtype, layout):
    """Of the input, the states, the weights and the incoming gradients."""
    case = Case(mode, dtype, batch=6, input_size=9, hidden_size=19, bidirectional=True)
    expected = run_module(case, make_module(case), make_data(case))

    def lay_out(x):
        """The same values in another layout; 1-d and 2-d tensors are seen as 3-d ones."""
        as_3d = x.detach().reshape(*[1] * (3 - x.dim()), *x.shape)
        y = LAYOUTS[layout](as_3d)
        for _ in range(3 - x.dim()):
            y = y[0]
        assert torch.equal(y, x)
        return y.requires_grad_()

    module = make_module(case)
    for name, weight in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(lay_out(weight)))
    data = {name: lay_out(x) for name, x in make_data(case).items()}
    tensors = [*data.values(), *module.parameters()]
    before = [(x._version, x.detach().clone()) for x in tensors]
    assert_same_bits(run_module(case, module, data), expected)
    for x, (version, values) in zip(tensors, before, strict=True):
        assert x._version == version, "an input or a weight was modified"
        assert torch.equal(x, values)


@pytest.mark.parametrize("mode", MODES)
def test_expanded_tensors(mode):
    """Strides of 0: one row for the whole batch, one step for the whole sequence, one gradient for all."""
    case = Case(mode, torch.float64, batch=4)
    module = make_module(case)
    for shape in [(1, 4, 4), (5, 1, 4), (5, 4, 1), (1, 1, 1)]:
        x = torch.randn(shape, dtype=case.dtype)
        expanded = x.expand(5, 4, 4).detach().requires_grad_()
        dense = expanded.detach().contiguous().requires_grad_()
        h0 = torch.randn(1, 1, 7, dtype=case.dtype).expand(1, 4, 7)
        results = []
        for input, hx in [(expanded, h0), (dense, h0.contiguous())]:
            output, _ = module(input, (hx, hx) if mode == "LSTM" else hx)
            (gradient,) = torch.autograd.grad(output.sum(), input)  # the gradient of a sum is expanded too
            results.append({"output": output.detach(), "gradient": gradient})
        assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
def test_one_strided_tensor_as_input_and_state(mode):
    """Their gradients have different layouts, though the tensor is the same."""
    case = Case(mode, torch.float64, steps=2, batch=3, input_size=7, bidirectional=True)
    module = make_module(case)
    x = torch.randn(3, 2, 7, dtype=case.dtype).transpose(0, 1).requires_grad_()
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    (gradient,) = torch.autograd.grad(module(x, (x, x) if mode == "LSTM" else x)[0].square().sum(), x)
    output, _ = module(copies[0], tuple(copies[1:]) if mode == "LSTM" else copies[1])
    separate = torch.autograd.grad(output.square().sum(), copies, allow_unused=True)
    torch.testing.assert_close(gradient, sum(g for g in separate if g is not None), **SAME_FLOAT64)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_that_comes_in_with_strides(mode):
    case = Case(mode, torch.float64, batch=4, bidirectional=True)
    module, data = make_module(case), make_data(case)
    leaves = [data["input"], *module.parameters()]
    output, _ = module(data["input"], states_of(data))
    incoming = torch.randn(14, 4, 5, dtype=case.dtype).permute(2, 1, 0)
    strided = torch.autograd.grad(output, leaves, incoming, retain_graph=True)
    dense = torch.autograd.grad(output, leaves, incoming.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


COPIES = {"aten::copy_", "aten::clone", "aten::_to_copy"}


def copies(call):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return [event.name for event in profiler.events() if event.name in COPIES]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_strided_input_is_not_copied(mode, batch_first):
    case = Case(mode, batch=6, input_size=8, batch_first=batch_first)
    module, data = make_module(case), make_data(case)
    x = data["input"].detach()
    views = [
        x,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    views += [x[::2], x[:, 1:], x[:1].expand_as(x)]
    for view in views:
        assert not copies(lambda view=view: module(view)), "the input was copied in training"
        with torch.no_grad():
            assert not copies(lambda view=view: module(view)), "the input was copied in inference"


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_batch_of_none_and_of_one(mode, batch_first, batch):
    """No rows: empty results of torch's shapes, and gradients of the weights that are zero."""
    case = Case(mode, batch=batch, num_layers=2, bidirectional=True, batch_first=batch_first)
    if batch:
        return check(case)
    module, data = make_module(case), make_data(case)
    results = run_module(case, module, data)
    assert results["output"].shape == ((0, 5, 14) if batch_first else (5, 0, 14))
    assert results["h_n"].shape == (4, 0, 7)
    for name, weight in module.named_parameters():
        gradient = results[f"grad of {name}"]
        assert gradient.shape == weight.shape
        assert not gradient.any()


NO_FEATURES = [  # none is packed: torch packs no empty tensors
    Case(input_size=0),
    Case(input_size=0, states=False, bias=False),
    Case(input_size=0, batched=False),
    Case(input_size=0, num_layers=2, bidirectional=True, batch_first=True, batch=33),
    Case(input_size=0, steps=1, batch=1, hidden_size=65),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", NO_FEATURES, ids=str)
def test_layer_without_input_features_goes_by_its_states_and_biases(variant, mode, dtype):
    check(replace(variant, mode=mode, dtype=dtype))


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"GRU_RESET_BEFORE"}))
def test_seventy_thousand_steps(mode):
    case = Case(mode, steps=70_000, batch=1, input_size=2, hidden_size=3, states=False)
    module, data = make_module(case), make_data(case)
    ours = run_module(case, module, data)

    def torchs(dtype):
        theirs = make_module(replace(case, dtype=dtype), nn)
        theirs.load_state_dict(module.state_dict())
        with threads(1):
            return run_module(case, theirs, {"input": data["input"].detach().to(dtype).requires_grad_()})

    assert_all_as_accurate_as_torch(ours, torchs(torch.float32), torchs(torch.float64), case.dtype)


def test_strides_beyond_32_bits(tmp_path):
    """An input whose steps lie 3 * 2^30 elements apart, in a file with holes that takes no room."""
    path = tmp_path / "sparse"
    step = 3 * 2**30
    with open(path, "wb") as file:
        file.truncate((2 * step + 100) * 4)
    mapped = torch.from_file(str(path), shared=True, size=2 * step + 100)
    x = mapped.as_strided((3, 2, 4), (step, 5, 1))
    values = torch.randn(3, 2, 4)
    x.copy_(values)
    for mode in MODES:
        module = make_module(Case(mode))
        with torch.no_grad():
            assert torch.equal(module(x)[0], module(values)[0])


@pytest.mark.parametrize("mode", MODES)
def test_cells_take_any_strides(mode):
    cls, arguments = cell_class(fastseq, mode)
    cell = cls(6, 7, **arguments)
    h = torch.randn(7, 4).t()
    for x in (
        torch.randn(6, 4).t(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(1, 6).expand(4, 6),
        torch.randn(8, 6)[::2],
    ):
        results = []
        for input, state in [(x, h), (x.contiguous(), h.contiguous())]:
            input, state = input.detach().requires_grad_(), state.detach().requires_grad_()
            output = cell(input, (state, state) if mode == "LSTM" else state)
            output = output[0] if mode == "LSTM" else output
            gradients = torch.autograd.grad(output.square().sum(), [input, state, *cell.parameters()])
            results.append({str(i): g.detach() for i, g in enumerate([output, *gradients])})
        assert_same_bits(*results)
