"""torch.ops.fastseq.* as torch's tools and users meet them: opcheck, and gradients of direct calls."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastseq
from harness import Case, call_module, cell_class, make_data, make_module, states_of
from reference import MODES
from tolerances import GRADCHECK, SAME_FLOAT64


class Calls(TorchDispatchMode):
    """The calls of fastseq's operators: (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastseq":
            self.calls.append((func, tree_map_only(torch.Tensor, lambda x: x.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


def calls_of(function, differentiate=True):
    with Calls() as mode:
        outputs = [x for x in function() if x.requires_grad]
        if differentiate:
            torch.autograd.backward([x.sum() for x in outputs])
    assert mode.calls
    return mode.calls


def layer(case):
    module, data = make_module(case), make_data(case)
    return calls_of(lambda: call_module(case, module, data).values())


def with_options(mode, memory, grad_clip):
    """Of rows with lengths and resets, and gradients that are cut."""
    case = Case(mode, bidirectional=True, batch=3)
    module, data = make_module(case), make_data(case)
    module.memory, module.grad_clip, module.truncate = memory, grad_clip, 3
    rows = {"lengths": torch.tensor([2, 0, case.steps]), "resets": torch.rand(case.steps, 3) < 0.3}
    return calls_of(lambda: [module(data["input"], **rows)[0]])


def cell(mode, bias, states):
    cls, arguments = cell_class(fastseq, mode)
    module, data = cls(4, 7, bias, **arguments), make_data(Case(mode))
    x, hx = data["input"][0], states_of({name: x[0] for name, x in data.items() if name != "input"})

    def step():
        result = module(x, hx if states else None)
        return result if isinstance(result, tuple) else (result,)

    return calls_of(step)


LAYERS = [Case(mode, bidirectional=i % 2 == 0, packed=("", "sorted")[i % 2]) for i, mode in enumerate(MODES)]
LAYERS += [
    Case("LSTM", torch.float64, packed="sorted", bias=False, batch=4),
    Case("LSTM", proj_size=3, bidirectional=True, states=False),
    Case("GRU", torch.bfloat16, batch_first=True, batch=4),
]
CELLS = [(mode, i % 2 == 0, i % 3 > 0) for i, mode in enumerate(MODES)]
ATTENTION = [
    {},
    {"is_causal": True, "dropout_p": 0.3},
    {"attn_mask": torch.rand(2, 1, 5, 6) > 0.3, "return_weights": True},
    {"attn_mask": torch.randn(3, 5, 6, requires_grad=True), "return_lse": True},
    {"window": (2, 1), "softcap": 3.0, "alibi_slopes": torch.rand(3)},
    {"sinks": torch.randn(3, requires_grad=True), "key_lengths": torch.tensor([6, 2])},
    {"return_weights": True, "average_weights": True},
]


def attention(options, dtype=torch.float32):
    query, key, value = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (5, 6, 6))

    def call():
        results = fastseq.scaled_dot_product_attention(query, key, value, **options)
        return results if isinstance(results, tuple) else (results,)

    return calls_of(call)


def packed_attention():
    query, starts = torch.randn(7, 3, 8, requires_grad=True), torch.tensor([0, 3, 7])
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return calls_of(lambda: [fastseq.scaled_dot_product_attention(query, query, query, **packed)])


def check(calls):
    """Without a graph, and with one where there is a derivative."""
    for op, arguments in calls:
        opcheck(op, arguments)
        given = {a.name: x for a, x in zip(op._schema.arguments, arguments, strict=False)}
        bounded = given.get("grad_clip") is not None
        if op._schema.name != "fastseq::recurrent_checkpoints" and not bounded:
            opcheck(op, trained(op, arguments))


def trained(op, arguments):
    """All that may have a gradient wants one."""
    for argument, given in zip(op._schema.arguments, arguments, strict=False):
        if argument.name != "alibi_slopes":
            tree_map_only(torch.Tensor, lambda x: x.requires_grad_(x.is_floating_point()), given)
    return arguments


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_opcheck_of_layers(case):
    check(layer(case))


@pytest.mark.parametrize("grad_clip", [None, 0.1])
@pytest.mark.parametrize("memory", ["fast", "recompute", "checkpoint:2"])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_layers_with_options(mode, memory, grad_clip):
    calls = with_options(mode, memory, grad_clip)
    names = {op._schema.name.removeprefix("fastseq::") for op, _ in calls}
    in_windows = memory != "fast" and not (memory == "recompute" and mode.startswith("RNN"))
    assert ("recurrent_windows_backward" in names) == in_windows
    assert ("recurrent_checkpoints" in names) == (memory == "checkpoint:2")
    check(calls)


@pytest.mark.parametrize(("mode", "bias", "states"), CELLS)
def test_opcheck_of_cells(mode, bias, states):
    check(cell(mode, bias, states))


@pytest.mark.parametrize("options", ATTENTION, ids=lambda options: " ".join(options) or "plain")
def test_opcheck_of_attention(options):
    check(attention(options))


def test_opcheck_of_attention_in_16_bits_and_packed():
    check(attention({}, torch.bfloat16))
    check(packed_attention())


@pytest.mark.parametrize("save", ["nothing", "states", "gates"])
@pytest.mark.parametrize("mode", MODES)
def test_operator_called_directly_has_the_gradients_of_the_module(mode, save):
    case = Case(mode, torch.float64, bidirectional=True)
    module, data = make_module(case), make_data(case)
    weights = list(module.parameters())
    leaves = [*data.values(), *weights]
    x, h0, c0 = (data.get(name) for name in ("input", "h0", "c0"))
    output, h_n, c_n, saved = torch.ops.fastseq.recurrent(
        x, None, None, None, h0, c0, weights, mode, 2, True, False, save
    )
    assert (saved.numel() > 0) == (mode in {"gates": MODES[2:], "states": ["LSTM"]}.get(save, ()))
    assert not saved.requires_grad
    expected = call_module(case, module, data)
    assert torch.equal(output, expected["output"])
    found = [output, h_n, *([c_n] if mode == "LSTM" else [])]
    ours = torch.autograd.grad([x.sin().sum() for x in found], leaves)
    theirs = torch.autograd.grad([x.sin().sum() for x in expected.values()], leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("save", [False, True])
def test_operator_of_a_cell_called_directly_has_the_gradients_of_the_module(save):
    cell, x, h = fastseq.GRUCell(4, 5).double(), torch.randn(3, 4).double(), torch.randn(3, 5).double()
    results = torch.ops.fastseq.recurrent_cell(x, h, None, *cell.parameters(), "GRU", save)
    assert len(results) == 1 + save
    ours = torch.autograd.grad(results[0].sin().sum(), list(cell.parameters()))
    theirs = torch.autograd.grad(cell(x, h).sin().sum(), list(cell.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("average", [False, True])
def test_operator_of_attention_called_directly_has_the_gradients_of_the_function(average):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6))
    tensors, numbers = (q, k, v, *[None] * 7), (8**-0.5, 0.0, 0.0, -1, -1, False)
    ours = torch.ops.fastseq.attention(*tensors, *numbers, True, average)
    theirs = fastseq.scaled_dot_product_attention(
        q, k, v, return_lse=True, return_weights=True, average_weights=average
    )
    assert ours[2].shape == (2, 1 if average else 3, 5, 6)
    losses = [sum(x.sin().sum() for x in results[:3]) for results in (ours, theirs)]
    grads = [torch.autograd.grad(loss, (q, k, v)) for loss in losses]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_operators_of_recurrent_layers_have_second_derivatives_and_forward_mode(mode, bidirectional):
    """Called directly: recurrent, and recurrent_backward as a function of all that it is given."""
    case = Case(mode, torch.float64, steps=3, batch=2, hidden_size=3, bidirectional=bidirectional)
    (_, forward), (op, arguments) = layer(case)
    weights = forward[6]
    inputs = [forward[0], forward[4], *weights]
    made = torch.ops.fastseq.recurrent(*forward)

    def run(x, h0, *weights):
        results = torch.ops.fastseq.recurrent(x, None, None, None, h0, *forward[5:6], weights, *forward[7:])
        return results[:2]

    def gradients(grad, x, h0, *weights):
        output, _, _, saved = torch.ops.fastseq.recurrent(
            x, None, None, None, h0, *forward[5:6], weights, *forward[7:-1], "gates"
        )
        before = (grad, None, None, x, None, None, None, h0, *forward[5:6], weights)
        return tuple(op(*before, output.detach(), saved.detach(), *arguments[12:]))

    grad = torch.randn_like(made[0])
    leaves = [x.detach().requires_grad_() for x in (grad, *inputs)]
    assert gradcheck(run, leaves[1:], fast_mode=True, check_forward_ad=True, **GRADCHECK)
    assert gradcheck(gradients, leaves, fast_mode=True, **GRADCHECK)


def test_operator_of_attention_refuses_slopes_that_want_a_gradient():
    q, slopes = torch.randn(1, 2, 3, 8), torch.rand(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="alibi_slopes"):
        torch.ops.fastseq.attention(
            q, q, q, *[None] * 4, slopes, None, None, 1.0, 0.0, 0.0, -1, -1, False, False
        )
