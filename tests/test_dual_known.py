"""recurrent_tangents, and recurrent_dual_backward with the gradient of h that recurrent_backward kept:
tangents alone, of numbers that passes without tangents made, which the CPU's kernels read."""

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from fastseq import dual_ops, ops
from harness import DTYPES, assert_all_as_accurate_as_torch, assert_same_bits
from sequence_options import ALL, EACH, Options
from test_dual_operators import CASES, LAYERS, RESULTS, SMALL, Layer, assert_clear_error, check_operators
from test_operators import Calls, trained


class Known(Layer):
    def run_known(self, wanted=None):
        """Tangents alone, of what the operators without tangents kept."""
        arguments, tangents, layer = self.call()
        bounds = self.options.bounds()
        clip, truncate = bounds.get("grad_clip"), bounds.get("truncate", 0)
        results = ops.recurrent(*arguments, *layer, False, "gates")
        count, kept = 3 if self.case.mode == "LSTM" else 2, (results[0], results[3])
        cotangents = [[*x, *[None] * (3 - count)] for x in self.cotangents(results[:count])]
        none, wanted = [False] * len(self.names()), wanted or self.wanted()
        bounds = (clip, truncate)
        (hidden,) = ops.recurrent_backward(*cotangents[0], *arguments, *kept, *layer, *bounds, none, True)
        made = dual_ops.recurrent_tangents(*arguments, *kept, *tangents, *layer, truncate, True)
        given = (*cotangents[0], *cotangents[1], *arguments, *kept, *tangents, made[0], made[3])
        grads = iter(dual_ops.recurrent_dual_backward(*given, *layer, *bounds, none, wanted, hidden))
        named = {f"tangent of {name}": x for name, x in zip(RESULTS[:count], made, strict=False)}
        for name, want in zip(self.names(), wanted, strict=True):
            if want and self.values.get(name) is not None:
                named[f"tangent of grad of {name}"] = next(grads)
        return named


def tangents_of(results):
    return {name: x for name, x in results.items() if name.startswith("tangent of")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangents_of_known_numbers_have_the_bits_of_one_pass_over_both(case):
    layer = Known(case)
    assert_same_bits(layer.run_known(), tangents_of(layer.run()))


@pytest.mark.parametrize("options", [*EACH, replace(ALL, truncate=False)], ids=str)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_tangents_of_known_numbers_with_each_option(mode, proj_size, options):
    case = replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True)
    for given in (None, ["input"], ["weight_hh_l0", "h0"]):
        layer = Known(case, options, given)
        assert_same_bits(layer.run_known(), tangents_of(layer.run()))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.batch == 37 or c.proj_size], ids=str)
def test_tangents_of_known_numbers_match_the_equations(case, dtype):
    case = replace(case, dtype=dtype)
    layer = Known(case)
    in_dtype, exact = (tangents_of(layer.expected(x)) for x in (dtype, torch.float64))
    assert_all_as_accurate_as_torch(layer.run_known(), in_dtype, exact, dtype)


@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_known_numbers_need_no_gradient_that_is_not_wanted(mode, proj_size):
    layer = Known(replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True))
    every, there = layer.run_known(), layer.wanted()
    for i in range(len(there)):
        results = layer.run_known([there[i] and j == i for j in range(len(there))])
        assert sum("grad of" in name for name in results) == there[i]
        assert_same_bits(results, {name: every[name] for name in results})


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_tangents_of_known_numbers_have_the_same_bits_in_every_partition(
    mode, proj_size, dtype, two_threads, monkeypatch
):
    case = replace(SMALL, mode=mode, proj_size=proj_size, batch=13, hidden_size=45, bidirectional=True)
    layer = Known(replace(case, dtype=dtype), Options(lengths=True))
    monkeypatch.setenv("FASTSEQ_PLAN", "1x1x1")
    first = layer.run_known()
    assert_same_bits(first, layer.run_known())
    for plan in ("2x1x1", "1x2x1", "1x1x2"):
        monkeypatch.setenv("FASTSEQ_PLAN", plan)
        assert_same_bits(first, layer.run_known(), f" with {plan}")


def with_gradients_of_known_numbers():
    layer = Known(SMALL)
    with Calls() as run:
        layer.run_known()
    op, arguments = run.calls[-1]
    op(*arguments[:26], layer.wanted(), *arguments[27:])


def with_gradients_of_h_of_another_shape():
    with Calls() as run:
        Known(SMALL).run_known()
    op, arguments = run.calls[-1]
    op(*arguments[:-1], arguments[-1][:, 1:])


def with_gradients_of_h_in_a_graph():
    with Calls() as run:
        Known(SMALL).run_known()
    op, arguments = run.calls[1]
    op(*trained(op, arguments))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (with_gradients_of_known_numbers, "grad_hidden, and gradients"),
        (with_gradients_of_h_of_another_shape, "grad_hidden of shape"),
        (with_gradients_of_h_in_a_graph, "keep=True where a graph is recorded"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(call, words):
    assert_clear_error(call, words)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(("mode", "proj_size"), [("RNN_TANH", 0), ("LSTM", 3)])
def test_opcheck(mode, proj_size, lengths):
    case = replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True)
    with Calls() as run:
        Known(case, Options(lengths, resets=True, truncate=True)).run_known()
    assert [op for op, _ in run.calls[2:]] == [dual_ops.recurrent_tangents, dual_ops.recurrent_dual_backward]
    opcheck(*run.calls[1])  # recurrent_backward, which keeps
    check_operators(run.calls[2:])
