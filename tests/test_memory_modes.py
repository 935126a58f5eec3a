"""memory="recompute" and "checkpoint:k": the gradients of "fast" from less memory."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import windows
from harness import (
    DTYPES,
    Case,
    assert_same_bits,
    make_data,
    make_module,
    named_outputs,
    states_of,
    with_gradients,
)
from reference import MODES
from sequence_options import ALL, EACH, Options, check
from tolerances import SAME_FLOAT64

# Of eleven steps: windows of one, windows of which the last is shorter, and a single one.
KINDS = ["recompute", "checkpoint:1", "checkpoint:4", "checkpoint:50"]
CASE = Case(dtype=torch.float64, steps=11, batch=5, hidden_size=9, num_layers=2)
CASES = [
    replace(CASE, mode=mode, proj_size=proj, bidirectional=bidirectional)
    for mode, proj in [*((mode, 0) for mode in MODES), ("LSTM", 3)]
    for bidirectional in (False, True)
]
LENGTHS = torch.tensor([4, 11, 1, 11, 6])


@pytest.fixture(autouse=True)
def several_windows(monkeypatch):
    """Windows of "recompute" have two steps of eleven."""
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1)
    monkeypatch.setattr(windows, "WINDOW_PART", 4)


def run(case, module, data, options, memory, packed=False):
    """Results and gradients."""
    module.memory = memory
    for name in ("grad_clip", "truncate"):
        setattr(module, name, options.bounds().get(name))
    input = data["input"]
    if packed:
        input = pack_padded_sequence(input, LENGTHS, case.batch_first, enforce_sorted=False)
    output, hidden = module(input, states_of(data), **options.rows(case))
    outputs = named_outputs(output.data if packed else output, hidden)
    return with_gradients(outputs, {**data, **dict(module.named_parameters())}, case.dtype)


def assert_same_gradients(results, expected, what=""):
    """Bits, but of the sums over steps."""
    sums = [name for name in expected if "grad of" in name and "_l" in name]
    for name in sums:
        torch.testing.assert_close(results[name], expected[name], **SAME_FLOAT64)
    rest = [{name: x for name, x in r.items() if name not in sums} for r in (results, expected)]
    assert_same_bits(*rest, what)


@pytest.mark.smoke
@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize("options", [Options(), *EACH, ALL], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_fast(case, options, memory, one_thread):
    for packed in (False, True) if not options.lengths else (False,):
        module, data = make_module(case), make_data(case)
        expected = run(case, module, data, options, "fast", packed)
        results = run(case, module, data, options, memory, packed)
        assert_same_gradients(results, expected, f", packed={packed}")


@pytest.mark.parametrize("memory", KINDS[:3])
@pytest.mark.parametrize("mode", MODES)
def test_a_window_ends_where_gradients_are_cut(mode, memory, one_thread):
    """Whatever truncate is: below, above and no multiple of the steps of a window."""
    case = replace(CASE, mode=mode, bidirectional=True, batch_first=True, num_layers=1)
    module, data = make_module(case), make_data(case)
    for truncate in (1, 2, 3, 4, 5, 7, 10):
        module.truncate = truncate
        results = []
        for module.memory in ("fast", memory):
            outputs = named_outputs(*module(data["input"], states_of(data)))
            results.append(with_gradients(outputs, {**data, **dict(module.named_parameters())}, case.dtype))
        assert_same_gradients(*reversed(results), f" with truncate={truncate}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_dtype_matches_float64_reference(mode, dtype):
    case = replace(CASE, mode=mode, dtype=dtype, num_layers=1, bidirectional=True)
    module, data = make_module(case), make_data(case)
    for module.memory in ("recompute", "checkpoint:4"):
        for options in (Options(), ALL):
            check(case, module, data, options, what=f" with memory={module.memory}, {options}")


def bytes_held(module, input):
    """Of what is saved for the backward pass, beside the input and the parameters."""
    given = {x.untyped_storage().data_ptr() for x in (input, *module.parameters())}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(input)[0]
    assert output.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("mode", MODES)
def test_bytes_that_are_held(mode):
    """Of an LSTM h and c instead of h, i, f, g, o and c; of a GRU h instead of h and its gates."""
    case = replace(CASE, mode=mode, dtype=torch.float32, steps=64, hidden_size=32, num_layers=1)
    module, input = make_module(case), make_data(case)["input"]
    a_state = 64 * 5 * 32 * 4
    kept = {"RNN_TANH": 0, "RNN_RELU": 0, "LSTM": 5, "GRU": 4, "GRU_RESET_BEFORE": 3}[mode]
    states = 2 if mode == "LSTM" else 1
    held = {}
    for module.memory in ("fast", "recompute", "checkpoint:16"):
        held[module.memory] = bytes_held(module, input)
    assert held["fast"] == (1 + kept) * a_state
    assert held["recompute"] == states * a_state
    assert held["checkpoint:16"] == states * 4 * a_state // 64
    if mode in ("LSTM", "GRU"):
        assert held["recompute"] <= 0.4 * held["fast"]


@pytest.mark.parametrize("memory", ["recompute", "checkpoint:4"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_gates_of_one_window_exist_at_a_time(mode, memory, monkeypatch):
    case = replace(CASE, mode=mode, num_layers=1)
    module, data = make_module(case), make_data(case)
    module.memory = memory
    output, _ = module(data["input"], states_of(data))
    rows, recurrent = [], windows.ops.recurrent

    def counted(*arguments):
        results = recurrent(*arguments)
        rows.append(results[3].shape[1])
        return results

    monkeypatch.setattr(windows.ops, "recurrent", counted)
    output.sum().backward()
    steps = [n // case.batch for n in rows]
    assert steps == ([1, 2, 2, 2, 2, 2] if memory == "recompute" else [3, 4, 4])


@pytest.mark.parametrize("memory", ["recompute", "checkpoint:4"])
def test_only_gradients_that_are_wanted_are_made(memory):
    case = replace(CASE, bidirectional=True)
    module, data = make_module(case), make_data(case)
    results = []
    for module.memory in ("fast", memory):
        for wanted in ([data["input"]], [module.weight_hh_l0], [data["c0"], module.bias_ih_l1_reverse]):
            for x in (*data.values(), *module.parameters()):
                x.requires_grad_(any(x is y for y in wanted))
            output, _ = module(data["input"], states_of(data))
            results += torch.autograd.grad(output.sum(), wanted)
    for a, b in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint:4"])
def test_torch_compile_sees_one_graph(memory):
    case = replace(CASE, num_layers=1)
    module, data = make_module(case), make_data(case)
    module.memory = memory

    def call(input, lengths):
        return module(input, lengths=lengths)[0]

    leaves, results = [data["input"], *module.parameters()], []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        output = function(data["input"], LENGTHS)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **SAME_FLOAT64)


def func_case(mode, memory, **options):
    """A module, and its loss as torch.func takes it: of parameters, input, lengths and resets."""
    case = replace(CASE, mode=mode, num_layers=1, steps=6, batch=3, hidden_size=4, bidirectional=True)
    module, entries = make_module(replace(case, **options)), 3
    module.memory = memory
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(entries, 6, 3, case.input_size, dtype=torch.float64, generator=generator)
    lengths = torch.randint(0, 7, (entries, 3), generator=generator)
    resets = torch.rand(entries, 6, 3, generator=generator) < 0.3

    def loss(parameters, input, lengths, resets):
        rows = {"lengths": lengths, "resets": resets}
        return torch.func.functional_call(module, parameters, (input,), rows)[0].sin().sum()

    return loss, {k: x.detach() for k, x in module.named_parameters()}, (input, lengths, resets)


@pytest.mark.parametrize("mapped", [(), (1,), (2,), (1, 2)], ids=["input", "lengths", "resets", "both"])
@pytest.mark.parametrize("memory", ["recompute", "checkpoint:4"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_per_sample_gradients_are_those_of_a_loop(mode, memory, mapped):
    loss, parameters, given = func_case(mode, memory)
    given = [x if i in (0, *mapped) else x[0] for i, x in enumerate(given)]
    dims = [0 if i in (0, *mapped) else None for i in range(3)]
    for argument in (0, 1):  # with the gradient of weights, each entry is a call
        derivative = torch.func.grad(loss, argnums=argument)
        ours = torch.func.vmap(derivative, in_dims=(None, *dims))(parameters, *given)
        for i in range(3):
            entry = [x if dim is None else x[i] for x, dim in zip(given, dims, strict=True)]
            expected = derivative(parameters, *entry)
            pairs = [(ours[i], expected)] if argument else [(ours[k][i], x) for k, x in expected.items()]
            for a, b in pairs:
                torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint:4"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_gradients_of_gradients_in_torch_func_are_those_of_fast(mode, memory):
    results = []
    for kind in ("fast", memory):
        loss, parameters, given = func_case(mode, kind)
        entry = [x[0] for x in given]

        def penalty(parameters, input, loss=loss, rest=entry[1:]):
            of_weights, of_input = torch.func.grad(loss, argnums=(0, 1))(parameters, input, *rest)
            return sum(x.square().sum() for x in (*of_weights.values(), of_input))

        of_weights, of_input = torch.func.grad(penalty, argnums=(0, 1))(parameters, entry[0])
        results.append([of_input, *of_weights.values()])
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_nothing_is_kept_where_no_gradient_is_needed():
    module, data = make_module(CASE), make_data(CASE)
    module.memory = "checkpoint:4"
    with torch.no_grad():
        output, _ = module(data["input"])
    assert not output.requires_grad


@pytest.mark.parametrize(
    "memory", ["slow", "checkpoint", "checkpoint:", "checkpoint:0", "checkpoint:-2", "checkpoint:1.5", "", 3]
)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_malformed_memory_is_an_error_of_the_constructor_and_of_the_call(name, memory):
    module = getattr(fastseq, name)(4, 5)
    for call in (lambda: getattr(fastseq, name)(4, 5, memory=memory), lambda: module(torch.randn(3, 2, 4))):
        module.memory = memory
        with pytest.raises(ValueError, match="memory=") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 3


def test_memory_is_an_attribute_and_shown():
    module = fastseq.LSTM(4, 5, memory="checkpoint:8")
    assert module.memory == "checkpoint:8"
    assert "memory='checkpoint:8'" in repr(module)
    assert "memory" not in repr(fastseq.LSTM(4, 5))
