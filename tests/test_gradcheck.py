"""torch.autograd.gradcheck in float64: the analytic gradients against finite differences."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

import fastseq
from harness import (
    Case,
    assert_all_as_accurate_as_torch,
    call_module,
    call_reference,
    cell_class,
    make_data,
    make_module,
    states_of,
    with_gradients,
)
from reference import MODES
from tolerances import GRADCHECK

SMALL = Case(dtype=torch.float64, steps=3, batch=2, input_size=2, hidden_size=3)
VARIANTS = [
    SMALL,
    replace(SMALL, bidirectional=True, num_layers=2, batch_first=True),
    replace(SMALL, packed="unsorted", bidirectional=True, batch=3),
    replace(SMALL, bias=False, states=False, batched=False),
    replace(SMALL, proj_size=2),
    replace(SMALL, proj_size=2, packed="sorted", bidirectional=True, num_layers=2, bias=False),
]
CASES = [replace(v, mode=mode) for v in VARIANTS for mode in (["LSTM"] if v.proj_size else MODES)]


def gradcheck_module(case, module, data):
    parameters = dict(module.named_parameters())
    names = [*data, *parameters]

    def call(*tensors):
        given = dict(zip(names, tensors, strict=True))

        class Bound(torch.nn.Module):  # call_module calls a module; this one has the given parameters
            def forward(self, input, hx):
                return functional_call(module, {name: given[name] for name in parameters}, (input, hx))

        return tuple(call_module(case, Bound(), given).values())

    return gradcheck(call, tuple({**data, **parameters}.values()), **GRADCHECK)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_modules(case):
    assert gradcheck_module(case, make_module(case), make_data(case))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_cells(mode, bias):
    cls, arguments = cell_class(fastseq, mode)
    cell = cls(2, 3, bias=bias, dtype=torch.float64, **arguments)
    shape = replace(SMALL, mode=mode, batched=False, num_layers=2, steps=2)  # input [2, 2], states [2, 3]
    data = make_data(shape)
    names = [*data, *dict(cell.named_parameters())]

    def call(*tensors):
        given = dict(zip(names, tensors, strict=True))
        parameters = {name: given[name] for name, _ in cell.named_parameters()}
        return functional_call(cell, parameters, (given["input"], states_of(given)))

    assert gradcheck(call, (*data.values(), *cell.parameters()), **GRADCHECK)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_when_only_some_tensors_want_one(mode):
    """Each tensor alone: the gradient is the one that it gets when all want theirs."""
    case = replace(SMALL, mode=mode, bidirectional=True, proj_size=2 if mode == "LSTM" else 0)
    module, data = make_module(case), make_data(case)
    tensors = {**data, **dict(module.named_parameters())}
    everything = with_gradients(call_module(case, module, data), tensors, case.dtype)
    for name in tensors:
        for other, x in tensors.items():
            x.requires_grad_(other == name)
        alone = with_gradients(call_module(case, module, data), tensors, case.dtype)
        key = f"grad of {name}"
        assert [k for k in alone if k.startswith("grad of")] == [key]
        assert_all_as_accurate_as_torch(alone, everything, {k: everything[k] for k in alone}, case.dtype)


@pytest.mark.parametrize("packed", ["", "unsorted"])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_that_are_not_used_count_as_zero_gradients(mode, packed):
    """Only output, only h_n or only c_n reaches the loss: autograd hands undefined gradients for the rest."""
    case = replace(SMALL, mode=mode, num_layers=2, bidirectional=True, packed=packed)
    module, data = make_module(case), make_data(case)
    leaves = {**data, **dict(module.named_parameters())}
    for name in ("output", "h_n", "c_n") if mode == "LSTM" else ("output", "h_n"):
        ours = with_gradients({name: call_module(case, module, data)[name]}, leaves, case.dtype)
        parameters = dict(module.named_parameters())
        exact = with_gradients({name: call_reference(case, parameters, data)[name]}, leaves, case.dtype)
        assert_all_as_accurate_as_torch(ours, exact, exact, case.dtype)


@pytest.mark.parametrize("used", ["h", "c"])
def test_lstm_cell_with_one_of_its_two_results_used(used):
    cell = fastseq.LSTMCell(2, 3, dtype=torch.float64)
    x, h, c = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
    assert gradcheck(lambda x, h, c: cell(x, (h, c))["hc".index(used)], (x, h, c), **GRADCHECK)
