"""A training step holds no more for its backward pass than torch.nn does; inference holds nothing."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from harness import Case, call_module, cell_class, make_data, make_module
from reference import MODES

SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
TORCH_MODES = sorted(set(MODES) - {"GRU_RESET_BEFORE"})


def tensors_in_graph(outputs):
    """Tensors that autograd Functions keep as plain attributes, which no hook sees."""
    nodes, seen = [x.grad_fn for x in outputs if x.grad_fn is not None], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from (x for x in getattr(node, "__dict__", {}).values() if isinstance(x, torch.Tensor))
        nodes += [next_node for next_node, _ in node.next_functions]


def bytes_held(call, not_counted):
    """Bytes of the results and of all that was saved for the backward pass, each storage once."""
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        outputs = call()
    storages = {}
    for x in [*saved, *outputs, *tensors_in_graph(outputs)]:
        if x.layout is torch.strided:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        else:  # oneDNN's own layout, which the LSTM's workspace may have
            storages[id(x)] = x.numel() * x.element_size()
    for x in not_counted:
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def held_by_module(case, library):
    module, data = make_module(case, library), make_data(case)
    not_counted = [*data.values(), *module.parameters()]
    return bytes_held(lambda: list(call_module(case, module, data).values()), not_counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"packed": "unsorted"},
        {"states": False},
    ],
    ids=lambda v: "-".join(v) or "plain",
)
@pytest.mark.parametrize("mode", TORCH_MODES)
def test_training_step_holds_no_more_than_torchs(mode, variant, dtype):
    case = Case(mode, dtype, steps=20, batch=8, input_size=16, hidden_size=32, **variant)
    ours, torchs = held_by_module(case, fastseq), held_by_module(case, nn)
    assert 0 < ours <= torchs, f"{ours} bytes, torch.nn {torchs}"


def test_projected_lstm_holds_no_more_than_torchs():
    case = Case(steps=20, batch=8, input_size=16, hidden_size=32, proj_size=8, bidirectional=True)
    assert held_by_module(case, fastseq) <= held_by_module(case, nn)


def test_reset_before_gru_holds_no_more_than_the_other():
    sizes = {"steps": 20, "batch": 8, "input_size": 16, "hidden_size": 32}
    assert held_by_module(Case("GRU_RESET_BEFORE", **sizes), fastseq) <= held_by_module(
        Case("GRU", **sizes), nn
    )


@pytest.mark.parametrize("mode", TORCH_MODES)
def test_training_step_of_a_cell_holds_no_more_than_torchs(mode):
    def held(library):
        cls, arguments = cell_class(library, mode)
        cell, x = cls(16, 32, **arguments), torch.randn(8, 16)
        call = (lambda: list(cell(x))) if mode == "LSTM" else (lambda: [cell(x)])
        return bytes_held(call, [x, *cell.parameters()])

    assert held(fastseq) <= held(nn)


@pytest.mark.parametrize("mode", MODES)
def test_inference_holds_nothing_but_its_results(mode):
    """Under no_grad, and also when nothing requires a gradient."""
    case = Case(mode, steps=20, batch=8, num_layers=2)
    module = make_module(case)
    data = {name: x.detach() for name, x in make_data(case).items()}
    saved = []

    def saves():
        saved.clear()
        with saved_tensors_hooks(saved.append, lambda x: x):
            outputs = call_module(case, module, data)
        assert all(x.grad_fn is None for x in outputs.values())
        return saved

    with torch.no_grad():
        assert not saves()
    with torch.inference_mode():
        assert not saves()
    module.requires_grad_(False)
    assert not saves()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps freed memory for a while")
@pytest.mark.parametrize("mode", ["LSTM", "GRU_RESET_BEFORE"])
def test_repeated_training_steps_do_not_leak(mode):
    case = Case(mode, steps=50, batch=16, input_size=64, hidden_size=64)  # a step saves over 1 MB
    module, data = make_module(case), make_data(case)

    def training_step():
        output = call_module(case, module, data)["output"]
        torch.autograd.grad(output.sum(), list(module.parameters()))

    for _ in range(20):
        training_step()
    resident = resident_bytes()
    for _ in range(60):
        training_step()
    assert resident_bytes() - resident < 24e6


@pytest.mark.parametrize("wanted", ["input", "h0", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_nobody_wants_are_not_allocated(mode, wanted):
    """The operator is asked for the wanted gradient alone."""

    class Record(TorchDispatchMode):
        results = None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "backward" in func.name():
                self.results = result
            return result

    case = Case(mode)
    module, data = make_module(case), make_data(case)
    tensors = {**data, **dict(module.named_parameters())}
    for name, x in tensors.items():
        x.requires_grad_(name == wanted)
    output = call_module(case, module, data)["output"]
    with Record() as record:
        output.sum().backward()
    allocated = [x for x in record.results if isinstance(x, torch.Tensor) and x.numel()]
    assert [x.shape for x in allocated] == [tensors[wanted].shape]
    assert [name for name, x in tensors.items() if x.grad is not None] == [wanted]
