"""lengths, resets, grad_clip and truncate of a case, and how to run one with them through fastseq and by the
equations."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import reference
from harness import (
    Case,
    as_leaves,
    assert_all_as_accurate_as_torch,
    move,
    named_outputs,
    states_of,
    threads,
    with_gradients,
)


@dataclass(frozen=True)
class Options:
    """Which of them a call has."""

    lengths: bool = False
    resets: bool = False
    grad_clip: bool = False
    truncate: bool = False

    def __str__(self):
        return "+".join(name for name, given in vars(self).items() if given) or "none"

    def rows(self, case: Case) -> dict[str, Tensor]:
        """Lengths from 0 to T, unsorted; an episode begins at a third of the steps, one at step 0."""
        g = torch.Generator().manual_seed(3)
        rows = {}
        if self.lengths:
            rows["lengths"] = torch.linspace(case.steps, 0, case.batch).round().long().roll(1)
        if self.resets:
            rows["resets"] = torch.rand(case.steps, case.batch, generator=g) < 0.3
            rows["resets"][0, -1] = True
        return rows

    def bounds(self) -> dict[str, float | int]:
        bounds = {"grad_clip": 0.05} if self.grad_clip else {}
        return bounds | ({"truncate": 3} if self.truncate else {})


EACH = [Options(**{name: True}) for name in ("lengths", "resets", "grad_clip", "truncate")]
ALL = Options(True, True, True, True)


def run_module(case: Case, module: nn.Module, data, options: Options, where="cpu") -> dict[str, Tensor]:
    """Results and gradients."""
    module, data = move(module, data, where)
    for name in ("grad_clip", "truncate"):
        setattr(module, name, options.bounds().get(name))
    rows = {name: x.to(where) for name, x in options.rows(case).items()}
    outputs = named_outputs(*module(data["input"], states_of(data), **rows))
    return with_gradients(outputs, {**data, **dict(module.named_parameters())}, case.dtype)


def run_reference(case: Case, parameters, data, options: Options, dtype) -> dict[str, Tensor]:
    """The same by the equations, in this dtype."""
    parameters, data = as_leaves(parameters, dtype), as_leaves(data, dtype)
    rows = options.rows(case)
    crossing = reference.Crossing(resets=rows.get("resets"), **options.bounds())
    layers = reference.layers_of(parameters, case.num_layers, case.bidirectional)
    input = data["input"].transpose(0, 1) if case.batch_first else data["input"]
    with threads(1):
        output, h_n, c_n = reference.recurrent(
            case.mode, input, data["h0"], data.get("c0"), layers, rows.get("lengths"), crossing
        )
        outputs = named_outputs(
            output.transpose(0, 1) if case.batch_first else output, h_n if c_n is None else (h_n, c_n)
        )
        return with_gradients(outputs, {**data, **parameters}, case.dtype)


def check(case: Case, module: nn.Module, data, options: Options, where="cpu", what="") -> dict[str, Tensor]:
    """Results and all gradients are as accurate as those of the equations in the case's dtype."""
    parameters = dict(module.named_parameters())
    ours = run_module(case, module, data, options, where)
    in_dtype = run_reference(case, parameters, data, options, case.dtype)
    exact = run_reference(case, parameters, data, options, torch.float64)
    assert_all_as_accurate_as_torch(ours, in_dtype, exact, case.dtype, what)
    return ours
