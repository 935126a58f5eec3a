"""Lengths, resets, bounded gradients, truncated backpropagation and memory modes in the CUDA kernels, on the
host twin and on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sequence_options
from devices import ARITHMETIC, HOPPER
from fastseq import windows
from harness import (
    Case,
    assert_same_bits,
    make_data,
    make_module,
    move,
    named_outputs,
    same_bits,
    states_of,
    with_gradients,
)
from reference import MODES
from sequence_options import ALL, EACH, Options
from tolerances import SAME_FLOAT64

PLANS = ["cluster:2x1:sums", "cluster:2x1:operand", "grid:3x1", "stream:3x1", "steps"]
NETWORKS = [*MODES, "LSTM projected"]
LENGTHS = torch.tensor([3, 6, 0, 1, 5])


def network(name, arithmetic="float64", **sizes) -> Case:
    mode, _, projected = name.partition(" ")
    sizes = {"steps": 6, "batch": 5, "input_size": 3, "hidden_size": 21} | sizes
    return Case(mode, dtype=ARITHMETIC[arithmetic][0], proj_size=9 if projected else 0, **sizes)


def assert_ran(ran, plan):
    kernel = plan.partition(":")[0]
    assert {p["kernel"] for p in ran} == {kernel}
    assert {p["pass"] for p in ran} == {"forward", "backward"}


@pytest.mark.parametrize("options", [*EACH, ALL], ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kernel_matches_float64_reference(device, name, plan, options):
    case = network(name, bidirectional=True)
    with device.using(plan, HOPPER) as ran:
        sequence_options.check(case, make_module(case), make_data(case), options, device.where)
        assert_ran(ran, plan)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_dtype_matches_float64_reference(device, name, plan, arithmetic):
    case = network(name, arithmetic, bidirectional=True, batch_first=True, batch=19)
    with device.using(plan, HOPPER) as ran:
        sequence_options.check(case, make_module(case), make_data(case), ALL, device.where)
        assert_ran(ran, plan)


@pytest.mark.parametrize("packed", ["resets", "truncate"])
@pytest.mark.parametrize("plan", ["cluster:2x1", "grid:3x1", "steps"])
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_sequences(device, name, plan, packed):
    """As padded ones with lengths."""
    case = network(name, bidirectional=True)
    module, data = move(make_module(case), make_data(case), device.where)
    lengths = torch.tensor([6, 5, 3, 3, 1])
    rows = {"resets": ALL.rows(case)["resets"].to(device.where)} if packed == "resets" else {}
    module.truncate = 2 if packed == "truncate" else None
    leaves = {**data, **dict(module.named_parameters())}
    with device.using(plan, HOPPER):
        outputs = named_outputs(*module(data["input"], states_of(data), lengths=lengths, **rows))
        expected = with_gradients(outputs, leaves, case.dtype)
        input = torch.nn.utils.rnn.pack_padded_sequence(data["input"], lengths)
        output, hidden = module(input, states_of(data), **rows)
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
        results = with_gradients(named_outputs(output, hidden), leaves, case.dtype)
    for key, x in expected.items():
        torch.testing.assert_close(results[key], x, **SAME_FLOAT64)


class NothingIsRead(TorchDispatchMode):
    """Fails where the host waits for values of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["fast", "recompute"])
@pytest.mark.parametrize("plan", ["cluster:2x1", "grid:3x1", "steps"])
def test_lengths_are_read_on_the_device_alone(device, plan, memory, monkeypatch):
    monkeypatch.setattr(windows, "_gathers", lambda device: False)
    case = network("LSTM", bidirectional=True)
    module, data = move(make_module(case), make_data(case), device.where)
    module.memory = memory
    rows = {"lengths": LENGTHS.to(device.where), "resets": ALL.rows(case)["resets"].to(device.where)}
    with device.using(plan, HOPPER), NothingIsRead():
        output, _ = module(data["input"], states_of(data), **rows)
        torch.autograd.grad(output.sum(), list(module.parameters()))


@pytest.mark.parametrize("plan", ["cluster:2x1", "grid:3x1", "steps"])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_behind_the_end_of_a_row_reaches_anything(device, name, plan):
    case = network(name, bidirectional=True)
    module, data = move(make_module(case), make_data(case), device.where)
    lengths = LENGTHS.to(device.where)
    behind = torch.arange(6, device=device.where)[:, None] >= lengths
    results = []
    with device.using(plan, HOPPER):
        for value in (0.0, float("nan")):
            input = data["input"].detach().masked_fill(behind[..., None], value).requires_grad_()
            output, hidden = module(input, states_of(data), lengths=lengths)
            assert not output[behind].any()
            outputs = named_outputs(output, hidden)
            grads = [torch.ones_like(x) for x in outputs.values()]
            grads[0].masked_fill_(behind[..., None], value)
            leaves = [input, *(x for name, x in data.items() if name != "input"), *module.parameters()]
            gradients = torch.autograd.grad(list(outputs.values()), leaves, grads)
            assert not gradients[0][behind].any()
            results.append({str(i): x for i, x in enumerate([*outputs.values(), *gradients])})
    assert_same_bits(*results)


@pytest.mark.parametrize("plan", ["cluster:2x1", "grid:3x1", "steps"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sequence_in_pieces_is_the_same_bits(device, name, plan):
    case = network(name, "float32")
    module, data = move(make_module(case), make_data(case), device.where)
    lengths, resets = LENGTHS.to(device.where), ALL.rows(case)["resets"].to(device.where)
    with device.using(plan, HOPPER), torch.no_grad():
        whole, expected = module(data["input"], states_of(data), lengths=lengths, resets=resets)
        pieces, state = [], states_of(data)
        for begin, end in ((0, 2), (2, 3), (3, 6)):
            part = {"lengths": (lengths - begin).clamp(0, end - begin), "resets": resets[begin:end]}
            output, state = module(data["input"][begin:end], state, **part)
            pieces.append(output)
    if plan != "steps" or not name.startswith("LSTM"):  # between its steps c is wider than between calls
        assert same_bits(torch.cat(pieces), whole)
        assert_same_bits(named_outputs(whole, state), named_outputs(whole, expected))


@pytest.mark.parametrize("memory", ["recompute", "checkpoint:1", "checkpoint:4"])
@pytest.mark.parametrize("plan", ["cluster:2x1", "steps"])
@pytest.mark.parametrize("name", NETWORKS)
def test_memory_modes_have_the_gradients_of_fast(device, name, plan, memory, monkeypatch):
    monkeypatch.setattr(windows, "_gathers", lambda device: False)
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1)
    monkeypatch.setattr(windows, "WINDOW_PART", 3)
    case = network(name, bidirectional=True)
    module, data = make_module(case), make_data(case)
    with device.using(plan, HOPPER):
        for options in (Options(), ALL):
            results = []
            for module.memory in ("fast", memory):
                results.append(sequence_options.run_module(case, module, data, options, device.where))
            for key, x in results[0].items():
                torch.testing.assert_close(results[1][key], x, **SAME_FLOAT64)
