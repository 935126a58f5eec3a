"""recurrent_dual and recurrent_dual_backward against torch's derivatives of the equations, in every dtype.

On every rung of the ladder (see conftest.py); what only the CPU's engine promises is in test_dual_cpu.py."""

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

import reference
from fastseq import dual_ops, ops
from harness import (
    DTYPES,
    Case,
    assert_all_as_accurate_as_torch,
    assert_same_bits,
    make_data,
    make_module,
    threads,
)
from reference import MODES
from sequence_options import ALL, EACH, Options
from test_operators import Calls, trained
from tolerances import DIFFERENCES, EPSILON, SAME_FLOAT32, SAME_FLOAT64

SMALL = Case(steps=5, batch=3, input_size=4, hidden_size=7)
PLAIN = Options()
RESULTS = ("output", "h_n", "c_n")


class Layer:
    """One layer: its arguments, tangents of them, gradients of its results, and tangents of those."""

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
        """Results, tangents, gradients and tangents of gradients by torch's derivatives of the equations."""
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
        planes = ("", results, grads), ("tangent of ", results_tangents, grads_tangents)
        for prefix, of_results, of_grads in planes:
            named |= {prefix + name: x for name, x in zip(RESULTS, of_results, strict=False)}
            named |= {f"{prefix}grad of {self.names()[i]}": x for i, x in zip(there, of_grads, strict=True)}
        return named

    def cotangents(self, results):
        like = {str(i): x for i, x in enumerate(results)}
        return [list(self.random(like, seed).values()) for seed in (6, 7)]

    def call(self, along=0.0):
        """What both operators take: layer arguments, tangents and constants, all moved by `along` times the
        tangents."""
        case, dtype = self.case, self.case.dtype
        values, tangents = self.cast(self.values, dtype), self.cast(self.tangents, dtype)
        if along:
            values = [x if t is None else x + along * t for x, t in zip(values, tangents, strict=True)]
        rows = (self.batch_sizes(), self.rows.get("lengths"), self.rows.get("resets"))
        arguments = (values[0], *rows, *values[1:3], values[3:])
        return arguments, (*tangents[:3], tangents[3:]), (case.mode, case.directions, case.bias)

    def wanted(self):
        return [self.values.get(name) is not None for name in self.names()]

    def run(self, wanted=None):
        """The same by the operators; `wanted`: of which arguments, for numbers and for tangents."""
        arguments, tangents, layer = self.call()
        bounds = self.options.bounds()
        clip, truncate = bounds.get("grad_clip"), bounds.get("truncate", 0)
        made = dual_ops.recurrent_dual(*arguments, *tangents, *layer, False, truncate, True)
        count = 3 if self.case.mode == "LSTM" else 2
        cotangents = [[*x, *[None] * (3 - count)] for x in self.cotangents(made[:count])]
        wanted = wanted or [self.wanted()] * 2
        grads = iter(
            dual_ops.recurrent_dual_backward(
                *cotangents[0],
                *cotangents[1],
                *arguments,
                made[0],
                made[3],
                *tangents,
                made[4],
                made[7],
                *layer,
                clip,
                truncate,
                *wanted,
            )
        )
        named = {}
        for prefix, results, plane in (("", made[:3], wanted[0]), ("tangent of ", made[4:7], wanted[1])):
            named |= {prefix + name: x for name, x in zip(RESULTS[:count], results, strict=False)}
            for name, want, there in zip(self.names(), plane, self.wanted(), strict=True):
                if want and there:
                    named[f"{prefix}grad of {name}"] = next(grads)
        return named

    def run_plainly(self, along=0.0):
        """Results and gradients by the operators without tangents, moved along the direction."""
        arguments, _, layer = self.call(along)
        bounds = self.options.bounds()
        clip, truncate = bounds.get("grad_clip"), bounds.get("truncate", 0)
        made = ops.recurrent(*arguments, *layer, False, "gates")
        count = 3 if self.case.mode == "LSTM" else 2
        cotangents = [x + along * t for x, t in zip(*self.cotangents(made[:count]), strict=True)]
        cotangents += [None] * (3 - count)
        grads = iter(
            ops.recurrent_backward(
                *cotangents, *arguments, made[0], made[3], *layer, clip, truncate, self.wanted()
            )
        )
        names = [f"grad of {name}" for name, there in zip(self.names(), self.wanted(), strict=True) if there]
        results = dict(zip(RESULTS, made[:count], strict=False))
        return results | {name: next(grads) for name in names}


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
    replace(SMALL, batch=1, hidden_size=300, input_size=5),
    replace(SMALL, states=False),
]
CASES = [replace(v, mode=mode) for v in VARIANTS for mode in (["LSTM"] if v.proj_size else MODES)]
LAYERS = [(mode, 0) for mode in MODES] + [("LSTM", 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_gradients_and_their_tangents_match_the_equations(case, dtype):
    check(Layer(replace(case, dtype=dtype)))


@pytest.mark.parametrize("options", [o for o in EACH if not o.grad_clip and not o.truncate], ids=str)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_lengths_and_resets_match_the_equations(mode, proj_size, options):
    check(Layer(replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True), options))


@pytest.mark.parametrize("options", [*EACH, replace(ALL, truncate=False)], ids=str)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_tangents_of_gradients_are_their_differences(mode, proj_size, options):
    """Of what the plain operators return, moved along the direction by a little, with each option. What
    truncates gradients cuts tangents of states too, of which the plain forward pass knows nothing."""
    case = replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True, dtype=torch.float64)
    layer = Layer(case, options)
    results = layer.run()
    before, here, after = (layer.run_plainly(along) for along in (-EPSILON, 0.0, EPSILON))
    for name, x in here.items():
        torch.testing.assert_close(results[name], x, **SAME_FLOAT64)
        if not options.truncate:
            difference = (after[name] - before[name]) / (2 * EPSILON)
            torch.testing.assert_close(results[f"tangent of {name}"], difference, **DIFFERENCES)


@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_truncated_tangents_are_those_of_pieces(mode, proj_size):
    """A sequence of two pieces, the second of which takes the first one's states as constants."""
    case = replace(SMALL, steps=6, mode=mode, proj_size=proj_size, dtype=torch.float64)
    whole, pieces = Layer(case, Options(truncate=True)), []
    results, states = whole.run(), None
    for first in (0, 3):
        piece = Layer(replace(case, steps=3))
        for planes, of_whole in ((piece.values, whole.values), (piece.tangents, whole.tangents)):
            planes.update(of_whole)
            planes["input"] = of_whole["input"][first : first + 3]
        if states:
            piece.values.update(states)
            piece.tangents.update(dict.fromkeys(states))
        arguments, tangents, layer = piece.call()
        made = dual_ops.recurrent_dual(*arguments, *tangents, *layer, False, 0, True)
        states = {"h0": made[1]} | ({"c0": made[2]} if mode == "LSTM" else {})
        pieces.append(made)
    for name, i in (("output", 0), ("tangent of output", 4)):
        torch.testing.assert_close(results[name], torch.cat([p[i] for p in pieces]), **SAME_FLOAT64)
    torch.testing.assert_close(results["tangent of h_n"], pieces[1][5], **SAME_FLOAT64)


@pytest.mark.parametrize("packed", ["", "sorted"])
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_a_tangent_that_is_none_is_one_of_zeros(mode, proj_size, packed):
    """Each alone, and none at all; whose products are left out."""
    case = replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True, packed=packed)
    names = Layer(case).names()
    for given in [[], *([name] for name in names if name in Layer(case).values)]:
        some, zeros = Layer(case, given=given), Layer(case, given=given)
        for name, x in zeros.values.items():
            if zeros.tangents[name] is None:
                zeros.tangents[name] = torch.zeros_like(x)
        for name, x in zeros.run().items():
            torch.testing.assert_close(some.run()[name], x, **SAME_FLOAT32, msg=f"{name}, given {given}")


@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_what_is_not_wanted_is_left_out_and_the_rest_is_the_same(mode, proj_size):
    layer = Layer(replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True))
    every, there = layer.run(), layer.wanted()
    for plane in (0, 1):
        for i in range(len(there)):
            wanted = [[False] * len(there), [False] * len(there)]
            wanted[plane][i] = there[i]
            results = layer.run(wanted)
            assert sum("grad of" in name for name in results) == there[i]
            assert_same_bits(results, {name: every[name] for name in results})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_same_bits_from_run_to_run(mode, proj_size, dtype, one_thread):
    case = replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True, dtype=dtype)
    for options in (PLAIN, ALL):
        layer = Layer(case, options)
        assert_same_bits(layer.run(), layer.run())


@pytest.mark.parametrize(
    ("packed", "options"), [("", PLAIN), ("sorted", PLAIN), ("", Options(lengths=True))], ids=str
)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_nothing_is_read_before_it_is_written(
    mode, proj_size, packed, options, one_thread, uninitialized_memory_is_nan
):
    case = replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True, packed=packed)
    for given in (None, ["input"]):
        for name, x in Layer(case, options, given).run().items():
            assert not x.isnan().any(), name


def test_tensors_of_any_strides():
    layer = Layer(replace(SMALL, bidirectional=True))
    expected = layer.run()
    for planes in (layer.values, layer.tangents):
        for name, x in planes.items():
            planes[name] = x.transpose(0, -1).contiguous().transpose(0, -1)
    layer.values["input"] = layer.values["input"].contiguous()  # unlike its tangent
    assert_same_bits(layer.run(), expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_fake_results_have_the_shapes_and_strides_of_real_ones(mode, batch_first):
    arguments, tangents, layer = Layer(replace(SMALL, mode=mode, bidirectional=True)).call()

    def meta(x):
        return [meta(y) for y in x] if isinstance(x, list) else x if x is None else x.to("meta")

    constants = (*layer, batch_first, 0, True)
    real = dual_ops.recurrent_dual(*arguments, *tangents, *constants)
    fake = dual_ops.recurrent_dual(*map(meta, arguments), *map(meta, tangents), *constants)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def with_tangent(name, change):
    def call():
        layer = Layer(SMALL)
        layer.tangents[name] = change(layer.tangents[name])
        layer.run()

    return call


def assert_clear_error(call, words):
    with pytest.raises(RuntimeError, match=words) as error:
        call()
    assert all(word in str(error.value) for word in ("given:", "accepted:", "try:"))


def with_states_of_an_rnn():
    layer = Layer(replace(SMALL, mode="GRU", states=False))
    layer.tangents["h0"] = torch.zeros(1, 3, 7)
    layer.run()


def with_a_tangent_of_another_dtype():
    arguments, tangents, layer = Layer(SMALL).call()
    of_input, of_h0, *others = tangents
    dual_ops.recurrent_dual(*arguments, of_input, of_h0.double(), *others, *layer, False, 0, True)


def with_too_few_tangents():
    arguments, tangents, layer = Layer(SMALL).call()
    dual_ops.recurrent_dual(*arguments, *tangents[:3], tangents[3][:-1], *layer, False, 0, True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (with_tangent("input", lambda x: x[:-1]), "tangent of input of shape"),
        (with_a_tangent_of_another_dtype, "tangent of h0 of dtype torch.float64"),
        (with_tangent("weight_hh_l0", lambda x: x.t()), r"tangent of weights\[1\] of shape"),
        (with_states_of_an_rnn, "tangent of h0, which is None"),
        (with_too_few_tangents, "3 tangents of 4 weights"),
    ],
)
def test_a_tangent_that_does_not_fit_is_a_clear_error(call, words):
    assert_clear_error(call, words)


def check_operators(calls):
    """All of them, and the first, of tangents, with a graph too."""
    for op, arguments in calls:
        opcheck(op, arguments)
    op, arguments = calls[0]
    opcheck(op, trained(op, arguments))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(("mode", "proj_size"), [("RNN_TANH", 0), ("LSTM", 3)])
def test_opcheck(mode, proj_size, lengths):
    """Schema, fake results and registration; of the forward operator also gradients while it is traced."""
    case = replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True)
    with Calls() as run:
        Layer(case, Options(lengths, resets=True, truncate=True)).run()
    assert [op for op, _ in run.calls] == [dual_ops.recurrent_dual, dual_ops.recurrent_dual_backward]
    check_operators(run.calls)
