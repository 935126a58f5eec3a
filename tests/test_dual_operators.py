"""recurrent_dual and recurrent_dual_backward against torch's derivatives of the equations, in float64 and in the
other dtypes."""

from dataclasses import replace

import pytest
import torch

import reference
from fastseq import dual_ops
from harness import (
    DTYPES,
    Case,
    assert_all_as_accurate_as_torch,
    make_data,
    make_module,
    threads,
)
from reference import MODES
from sequence_options import Options

SMALL = Case(steps=5, batch=3, input_size=4, hidden_size=7)
PLAIN = Options()


class Layer:
    """One layer of a case: its arguments, tangents of them, gradients of its results, and tangents of those."""

    def __init__(self, case: Case, options: Options = PLAIN, given=None):
        self.case, self.options = case, options
        module, data = make_module(case), make_data(case)
        self.values = {name: x.detach() for name, x in [*data.items(), *module.named_parameters()]}
        if case.packed:  # rows of all steps one after another
            data = self.values["input"]
            rows = [data[t, b] for t, n in enumerate(self.batch_sizes()) for b in range(n)]
            self.values["input"] = torch.stack(rows)
        self.tangents = self.random(self.values, seed=5)
        for name in set(self.tangents) - set(given if given is not None else self.tangents):
            self.tangents[name] = None
        self.rows = options.rows(case)

    def random(self, like, seed):
        g = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(x.shape, generator=g, dtype=torch.float64).to(self.case.dtype)
            for name, x in like.items()
        }

    def batch_sizes(self):
        return (
            (torch.arange(self.case.steps)[:, None] < self.case.lengths()).sum(1)
            if self.case.packed
            else None
        )

    def names(self):
        """Of the arguments in the operators' order."""
        return ["input", "h0", "c0", *(name for name in self.values if name not in ("input", "h0", "c0"))]

    def equations(self, *tensors):
        """output, h_n and c_n by the equations, padded rows of a packed case taken out again."""
        given = dict(zip(self.names(), tensors, strict=True))
        crossing = reference.Crossing(resets=self.rows.get("resets"), **self.options.bounds())
        layers = reference.layers_of(given, 1, self.case.bidirectional)
        input, lengths = given["input"], self.rows.get("lengths")
        like = input.new_zeros(self.case.directions, self.case.batch, self.case.width)
        h0 = like if given["h0"] is None else given["h0"]
        c0 = given.get("c0")
        if self.case.mode == "LSTM" and c0 is None:
            c0 = like.new_zeros(self.case.directions, self.case.batch, self.case.hidden_size)
        sizes = self.batch_sizes()
        if sizes is not None:
            lengths = self.case.lengths()
            pieces = input.split(sizes.tolist())
            input = torch.stack(
                [torch.cat([x, x.new_zeros(self.case.batch - len(x), x.shape[1])]) for x in pieces]
            )
        output, h_n, c_n = reference.recurrent(self.case.mode, input, h0, c0, layers, lengths, crossing)
        if sizes is not None:
            output = torch.cat([x[:n] for x, n in zip(output, sizes.tolist(), strict=True)])
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    def cast(self, tensors, dtype):
        return [None if (x := tensors.get(name)) is None else x.to(dtype) for name in self.names()]

    def expected(self, dtype):
        """Results, tangents, gradients and tangents of gradients by torch's own derivatives of the equations."""
        values, tangents = self.cast(self.values, dtype), self.cast(self.tangents, dtype)
        there = [i for i, x in enumerate(values) if x is not None]

        def call(*some):
            every = list(values)
            for i, x in zip(there, some, strict=True):
                every[i] = x
            return self.equations(*every)

        primals = tuple(values[i] for i in there)
        along = tuple(torch.zeros_like(values[i]) if tangents[i] is None else tangents[i] for i in there)
        with threads(1):
            results, results_tangents = torch.func.jvp(call, primals, along)
            cotangents = self.cotangents(results)

            def gradients(given, *some):
                return torch.func.vjp(call, *some)[1](given)

            inner = tuple(x.to(dtype) for x in cotangents[0]), *primals
            outer = tuple(x.to(dtype) for x in cotangents[1]), *along
            grads, grads_tangents = torch.func.jvp(gradients, inner, outer)
        named = {}
        for prefix, of_results, of_grads in (
            ("", results, grads),
            ("tangent of ", results_tangents, grads_tangents),
        ):
            named |= {prefix + name: x for name, x in zip(("output", "h_n", "c_n"), of_results, strict=False)}
            named |= {f"{prefix}grad of {self.names()[i]}": x for i, x in zip(there, of_grads, strict=True)}
        return named

    def cotangents(self, results):
        like = {str(i): x for i, x in enumerate(results)}
        return [list(self.random(like, seed).values()) for seed in (6, 7)]

    def run(self, wanted=None):
        """The same by the operators; `wanted`: of which arguments, for numbers and for tangents."""
        dtype, case = self.case.dtype, self.case
        values, tangents = self.cast(self.values, dtype), self.cast(self.tangents, dtype)
        rows = (self.batch_sizes(), self.rows.get("lengths"), self.rows.get("resets"))
        layer, truncate = (case.mode, case.directions, case.bias), self.options.bounds().get("truncate", 0)
        clip = self.options.bounds().get("grad_clip")
        arguments = (values[0], *rows, *values[1:3], values[3:])
        along = (*tangents[:3], tangents[3:])
        made = dual_ops.recurrent_dual(*arguments, *along, *layer, False, truncate, True)
        count = 3 if case.mode == "LSTM" else 2
        cotangents = [x + [None] * (3 - count) for x in self.cotangents(made[:count])]
        wanted = wanted or [[x is not None for x in values]] * 2
        grads = dual_ops.recurrent_dual_backward(
            *cotangents[0],
            *cotangents[1],
            *arguments,
            made[0],
            made[3],
            *along,
            made[4],
            made[7],
            *layer,
            clip,
            truncate,
            *wanted,
        )
        named, grads = {}, iter(grads)
        for prefix, results, of_plane in (("", made[:3], wanted[0]), ("tangent of ", made[4:7], wanted[1])):
            named |= {prefix + n: x for n, x in zip(("output", "h_n", "c_n")[:count], results, strict=False)}
            named |= {
                f"{prefix}grad of {name}": next(grads)
                for name, x, want in zip(self.names(), values, of_plane, strict=True)
                if want and x is not None
            }
        return named


def check(layer: Layer):
    in_dtype, exact = layer.expected(layer.case.dtype), layer.expected(torch.float64)
    assert_all_as_accurate_as_torch(layer.run(), in_dtype, exact, layer.case.dtype)


VARIANTS = [
    SMALL,
    replace(SMALL, bidirectional=True, bias=False),
    replace(SMALL, packed="sorted", bidirectional=True),
    replace(SMALL, proj_size=3),
    replace(SMALL, proj_size=3, bidirectional=True, packed="sorted"),
    replace(SMALL, steps=1, batch=1, hidden_size=1, input_size=1),
    replace(SMALL, batch=37, hidden_size=65, input_size=33, steps=9),
    replace(SMALL, states=False),
]
CASES = [replace(v, mode=mode) for v in VARIANTS for mode in (["LSTM"] if v.proj_size else MODES)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_tangents_and_gradients_match_the_equations(case, dtype):
    check(Layer(replace(case, dtype=dtype)))
