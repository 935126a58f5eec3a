"""Lengths, resets, bounded gradients and truncated backpropagation: against the equations, against
torch.nn.utils.rnn's packed sequences, and against pieces of sequences that are fed one after the other."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from harness import (
    DTYPES,
    Case,
    assert_all_as_accurate_as_torch,
    assert_same_bits,
    make_data,
    make_module,
    named_outputs,
    same_bits,
    states_of,
    with_gradients,
)
from reference import MODES
from sequence_options import ALL, EACH, Options, check, run_module
from tolerances import GRADCHECK, SAME_FLOAT64

CASE = Case(steps=8, batch=5, hidden_size=19, num_layers=2, bidirectional=True)
CASES = [
    replace(CASE, mode=mode, proj_size=proj, batch_first=batch_first)
    for mode, proj in [*((mode, 0) for mode in MODES), ("LSTM", 3)]
    for batch_first in (False, True)
]


@pytest.mark.smoke
@pytest.mark.parametrize("options", [*EACH, ALL], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_match_float64_reference(case, options):
    check(case, make_module(case), make_data(case), options)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_dtype_matches_float64_reference(mode, dtype):
    case = replace(CASE, mode=mode, dtype=dtype, num_layers=1)
    for options in (*EACH, ALL):
        check(case, make_module(case), make_data(case), options, what=f" with {options}")


@pytest.mark.parametrize("plan", ["2x1x1", "1x2x1", "1x1x2", "1x1x2x4", "1x2x1x1"])
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_every_partition_gives_the_same_bits(case, plan, two_threads, monkeypatch):
    case = replace(case, hidden_size=45, num_layers=1)
    module, data = make_module(case), make_data(case)
    monkeypatch.setenv("FASTSEQ_PLAN", "1x1x1")
    expected = run_module(case, module, data, ALL)
    monkeypatch.setenv("FASTSEQ_PLAN", plan)
    results = run_module(case, module, data, ALL)
    if plan.count("x") == 3:  # chunks of other lengths: sums over steps are rounded at other places
        expected = {k: x for k, x in expected.items() if "grad of" not in k or "l0" not in k}
        results = {k: x for k, x in results.items() if k in expected}
    assert_same_bits(results, expected, f" with FASTSEQ_PLAN={plan}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lengths_are_torchs_packed_sequence(case):
    """As pad_packed_sequence(module(pack_padded_sequence(..., enforce_sorted=False))), gradients too."""
    if case.mode == "GRU_RESET_BEFORE":
        pytest.skip("torch has none")
    lengths = torch.tensor([3, 8, 1, 8, 6])
    ours, torchs, data = make_module(case), make_module(case, nn), make_data(case)
    torchs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, torchs):
        if module is ours:
            output, hidden = module(data["input"], states_of(data), lengths=lengths)
        else:
            packed = pack_padded_sequence(data["input"], lengths, case.batch_first, enforce_sorted=False)
            output, hidden = module(packed, states_of(data))
            output, _ = pad_packed_sequence(output, case.batch_first)
        leaves = {**data, **dict(module.named_parameters())}
        results.append(with_gradients(named_outputs(output, hidden), leaves, case.dtype))
    exact = run_packed_exactly(case, ours, data, lengths)
    assert_all_as_accurate_as_torch(*results, exact, case.dtype)


def run_packed_exactly(case, module, data, lengths):
    case = replace(case, dtype=torch.float64)
    double = make_module(case)
    double.load_state_dict(module.state_dict())
    data = {name: x.detach().double().requires_grad_() for name, x in data.items()}
    output, hidden = double(data["input"], states_of(data), lengths=lengths)
    return with_gradients(
        named_outputs(output, hidden), {**data, **dict(double.named_parameters())}, torch.float32
    )


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_behind_the_end_of_a_row_reaches_anything(mode, kind):
    """Neither what the input holds there, nor what comes back for its output."""
    case = replace(CASE, mode=mode)
    module, data = make_module(case), make_data(case)
    lengths = torch.tensor([3, 8, 0, 1, 6], dtype=kind)
    behind = torch.arange(8)[:, None] >= lengths
    results = []
    for value in (0.0, float("nan")):
        input = data["input"].detach().masked_fill(behind[..., None], value).requires_grad_()
        output, hidden = module(input, states_of(data), lengths=lengths)
        assert not output[behind].any()
        grad = torch.ones_like(output).masked_fill(behind[..., None], value)
        leaves = [input, *(x for name, x in data.items() if name != "input"), *module.parameters()]
        states = list(hidden) if isinstance(hidden, tuple) else [hidden]
        ones = [torch.ones_like(x) for x in states]
        gradients = torch.autograd.grad([output, *states], leaves, [grad, *ones])
        assert not gradients[0][behind].any()
        results.append({str(i): x for i, x in enumerate([output, *states, *gradients])})
    assert_same_bits(*results)


@pytest.mark.parametrize("pages", [0, 1 << 30], ids=["new pages", "cleared"])
def test_what_no_row_fills_of_the_gates_is_zero(monkeypatch, pages):
    monkeypatch.setattr(fastseq.lengths, "_PAGES", pages)
    for mode, save, shape in (("LSTM", "gates", (5, 7)), ("LSTM", "states", (7,)), ("GRU", "gates", (4, 7))):
        case = Case(mode, bidirectional=True)
        module, data = make_module(case), make_data(case)
        weights, lengths = list(module.parameters()), torch.tensor([1, 0, 3, 2, 0])[: case.batch]
        states = (data["h0"].detach(), data["c0"].detach() if mode == "LSTM" else None)
        arguments = (data["input"].detach(), None, lengths, None, *states, weights, mode, 2, True, False)
        with torch.no_grad():
            *_, saved = torch.ops.fastseq.recurrent(*arguments, save)
        assert saved.shape == (2, case.steps * case.batch, *shape)
        filled = int(lengths.sum())
        assert saved[:, :filled].count_nonzero() > 0
        assert not saved[:, filled:].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_a_step_hands_its_state_through(mode):
    case = replace(CASE, mode=mode, num_layers=1)
    module, data = make_module(case), make_data(case)
    for lengths in ([0, 8, 3, 0, 1], [0] * 5):
        lengths = torch.tensor(lengths)
        empty = lengths == 0
        output, hidden = module(data["input"], states_of(data), lengths=lengths)
        outputs = named_outputs(output, hidden)
        for name, first in (("h_n", data["h0"]), ("c_n", data.get("c0"))):
            if name in outputs:
                assert torch.equal(outputs[name][:, empty], first[:, empty])
                grad = torch.randn_like(first)
                (of_first,) = torch.autograd.grad(outputs[name], first, grad, retain_graph=True)
                assert torch.equal(of_first[:, empty], grad[:, empty])
        gradients = torch.autograd.grad(output.sum(), list(module.parameters()))
        assert all(bool(g.any()) == (not empty.all()) for g in gradients)


@pytest.mark.parametrize("case", [replace(CASE, mode=mode, bidirectional=False) for mode in MODES], ids=str)
def test_a_reset_is_a_new_call_without_a_state(case):
    """Episodes fed on their own, and one after the other in a row, are the same bits, gradients close."""
    case = replace(case, dtype=torch.float64, num_layers=1)
    module, data = make_module(case), make_data(case)
    resets = torch.zeros(8, 5, dtype=torch.bool)
    resets[5] = True
    whole, hidden = module(data["input"], states_of(data), resets=resets)
    first, _ = module(data["input"][:5], states_of(data))
    second, last = module(data["input"][5:])
    assert same_bits(whole, torch.cat([first, second]))
    assert_same_bits(named_outputs(whole[-1], hidden), named_outputs(second[-1], last))
    leaves = [*data.values(), *module.parameters()]
    grad = torch.randn_like(whole)
    in_one = torch.autograd.grad(whole, leaves, grad)
    in_two = torch.autograd.grad(torch.cat([first, second]), leaves, grad)
    for a, b in zip(in_one, in_two, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_in_pieces_is_the_same_bits(mode, dtype):
    """The state carried from call to call, also within lengths and resets."""
    case = replace(CASE, mode=mode, dtype=dtype, bidirectional=False, num_layers=2)
    module, data = make_module(case), make_data(case)
    lengths, resets = torch.tensor([3, 8, 0, 1, 6]), ALL.rows(case)["resets"]
    with torch.no_grad():
        whole, expected = module(data["input"], states_of(data), lengths=lengths, resets=resets)
        pieces, state = [], states_of(data)
        for begin, end in ((0, 2), (2, 3), (3, 8)):
            part = {"lengths": (lengths - begin).clamp(0, end - begin), "resets": resets[begin:end]}
            output, state = module(data["input"][begin:end], state, **part)
            pieces.append(output)
    assert same_bits(torch.cat(pieces), whole)
    assert_same_bits(named_outputs(whole, state), named_outputs(whole, expected))


@pytest.mark.parametrize("mode", MODES)
def test_truncate_is_detached_states_between_pieces(mode):
    case = replace(CASE, mode=mode, dtype=torch.float64, bidirectional=False)
    module, data = make_module(case), make_data(case)
    leaves, grad = [*data.values(), *module.parameters()], torch.randn(8, 5, 19, dtype=torch.float64)

    module.truncate = 3
    output, _ = module(data["input"], states_of(data))
    truncated = torch.autograd.grad(output, leaves, grad)
    module.truncate = None
    outputs, state = [], states_of(data)
    for piece in data["input"].split(3):
        output, state = module(piece, state)
        outputs.append(output)
        state = tuple(x.detach() for x in state) if isinstance(state, tuple) else state.detach()
    expected = torch.autograd.grad(torch.cat(outputs), leaves, grad)
    for a, b in zip(truncated, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)
    for i in range(len(data)):  # no sums over steps
        assert same_bits(truncated[i], expected[i])
    everything = torch.autograd.grad(module(data["input"], states_of(data))[0], leaves, grad)
    assert not torch.equal(everything[0], truncated[0])


@pytest.mark.parametrize("mode", MODES)
def test_no_bound_that_is_reached_changes_nothing(mode):
    """Bits: a grad_clip that nothing exceeds, a truncate of all steps, lengths of T, no reset."""
    case = replace(CASE, mode=mode)
    module, data = make_module(case), make_data(case)
    expected = run_module(case, module, data, Options())
    leaves = {**data, **dict(module.named_parameters())}
    module.grad_clip, module.truncate = 1e30, 8
    rows = {"lengths": torch.full((5,), 8), "resets": torch.zeros(8, 5, dtype=torch.bool)}
    outputs = named_outputs(*module(data["input"], states_of(data), **rows))
    assert_same_bits(with_gradients(outputs, leaves, case.dtype), expected)


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_a_gradient_is_not_bounded_away(mode):
    module = make_module(replace(CASE, mode=mode))
    module.grad_clip = 0.1
    input = torch.randn(8, 5, 4, requires_grad=True)
    output, _ = module(input)
    grad = torch.ones_like(output)
    grad[7, 1, 0] = float("nan")
    (of_input,) = torch.autograd.grad(output, input, grad)
    assert of_input[:, 1].isnan().any()
    assert not of_input[:, [0, 2, 3, 4]].isnan().any()


@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("mode", MODES)
def test_resets_of_a_packed_sequence_are_those_of_lengths(mode, order):
    case = replace(CASE, mode=mode)
    module, data = make_module(case), make_data(case)
    lengths = torch.tensor([8, 6, 3, 3, 1])
    lengths = lengths if order == "sorted" else lengths.roll(2)
    resets = ALL.rows(case)["resets"]
    padded, expected = module(data["input"], states_of(data), lengths=lengths, resets=resets)
    packed = pack_padded_sequence(data["input"], lengths, enforce_sorted=order == "sorted")
    output, state = module(packed, states_of(data), resets=resets)
    assert_same_bits(named_outputs(pad_packed_sequence(output)[0], state), named_outputs(padded, expected))


@pytest.mark.parametrize("options", [Options(lengths=True), Options(resets=True), ALL], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, options):
    """Finite differences, of what is a derivative."""
    case = Case(mode, torch.float64, steps=4, batch=3, input_size=2, hidden_size=3, bidirectional=True)
    module, data = make_module(case), make_data(case)
    rows = options.rows(case)

    def call(input, *states):
        hx = states if mode == "LSTM" else states[0]
        output, hidden = module(input, hx, **rows)
        return tuple(named_outputs(output, hidden).values())

    assert gradcheck(call, tuple(data.values()), **GRADCHECK)


def test_dropout_between_layers_draws_as_without_lengths():
    case = replace(CASE, batch_first=True)
    module, data = make_module(case), make_data(case)
    module.dropout = 0.5
    torch.manual_seed(5)
    expected = module(data["input"], states_of(data))
    torch.manual_seed(5)
    output, hidden = module(data["input"], states_of(data), lengths=torch.tensor([8, 8, 8, 8, 4]))
    assert same_bits(output[:4], expected[0][:4])
    assert same_bits(hidden[0][:, :4], expected[1][0][:, :4])


def test_torch_compile_sees_one_graph():
    case = replace(CASE, mode="LSTM", dtype=torch.float64)
    module, data = make_module(case), make_data(case)
    module.grad_clip, module.truncate = 0.05, 3
    rows, names = ALL.rows(case), ("lengths", "resets")

    def call(input, *rows):
        return module(input, **dict(zip(names, rows, strict=True)))[0]

    leaves, results = [data["input"], *module.parameters()], []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        output = function(data["input"], *(rows[name] for name in names))
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **SAME_FLOAT64)


BAD = {  # what is wrong, and what the message names
    "a length above T": ({"lengths": torch.tensor([9, 1, 1])}, "lengths from 1 to 9"),
    "a length below 0": ({"lengths": torch.tensor([-1, 1, 1])}, "lengths from -1 to 1"),
    "too few lengths": ({"lengths": torch.tensor([1, 1])}, "lengths of shape"),
    "lengths of two dimensions": ({"lengths": torch.ones(3, 1, dtype=torch.int64)}, "lengths of shape"),
    "lengths that are no integers": ({"lengths": torch.ones(3)}, "lengths of shape"),
    "lengths without values": (
        {"lengths": torch.ones(3, dtype=torch.int64, device="meta")},
        "lengths on device meta",
    ),
    "lengths in a list": ({"lengths": [1, 2, 3]}, "lengths of type list"),
    "resets (B, T)": ({"resets": torch.zeros(3, 8, dtype=torch.bool)}, "resets of shape"),
    "resets that are not bool": ({"resets": torch.zeros(8, 3)}, "resets of shape"),
    "resets elsewhere": ({"resets": torch.zeros(8, 3, dtype=torch.bool, device="meta")}, "resets on device"),
    "resets of one row": ({"resets": torch.zeros(8, dtype=torch.bool)}, "resets of shape"),
}


def assert_error(call, names):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert names in lines[0]


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_bad_lengths_and_resets(name, what):
    rows, names = BAD[what]
    module = getattr(fastseq, name)(4, 5)
    for input in (torch.randn(8, 3, 4), torch.randn(8, 3, 4, requires_grad=True)):
        assert_error(lambda input=input: module(input, **rows), names)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_lengths_and_resets_where_they_cannot_be(name):
    module = getattr(fastseq, name)(4, 5)
    packed = pack_padded_sequence(torch.randn(8, 3, 4), torch.tensor([8, 4, 2]))
    assert_error(lambda: module(packed, lengths=torch.tensor([8, 4, 2])), "lengths of a packed")
    assert_error(lambda: module(packed, resets=torch.zeros(14, dtype=torch.bool)), "resets of shape")
    assert_error(lambda: module(torch.randn(8, 4), lengths=torch.tensor([8])), "lengths of an input without")
    no_resets = torch.zeros(8, 1, dtype=torch.bool)
    assert_error(lambda: module(torch.randn(8, 4), resets=no_resets), "resets of an input without")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("grad_clip", value) for value in (-1.0, float("nan"), "a", (1, 2), True, 1j)),
        *(("grad_clip", torch.tensor(value)) for value in (1.0, [1.0, 2.0])),
        *(("truncate", value) for value in (0, -3, 1.5, "a", True, torch.tensor(3))),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_bad_bounds_are_errors_of_the_constructor_and_of_the_call(name, option, value):
    assert_error(lambda: getattr(fastseq, name)(4, 5, **{option: value}), option)
    module = getattr(fastseq, name)(4, 5)
    setattr(module, option, value)
    assert_error(lambda: module(torch.randn(8, 3, 4)), option)


def test_what_is_given_for_truncate_is_what_the_error_says():
    with pytest.raises(RuntimeError, match="given: truncate=0\n"):
        fastseq.LSTM(4, 5, truncate=0)


@pytest.mark.parametrize("value", [1, np.float32(1), Fraction(1)], ids=repr)
def test_any_real_number_bounds_gradients(value):
    """With the bits of the float that it is."""
    module, x = fastseq.LSTM(4, 5), torch.randn(8, 3, 4)
    grads = []
    for module.grad_clip in (value, 1.0):
        grads.append(torch.autograd.grad((100 * module(x)[0]).sum(), list(module.parameters())))
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_options_are_attributes_and_shown():
    module = fastseq.GRU(4, 5, grad_clip=0.5, truncate=3)
    assert (module.grad_clip, module.truncate) == (0.5, 3)
    assert "grad_clip=0.5, truncate=3" in repr(module)
    assert "truncate" not in repr(fastseq.GRU(4, 5))
