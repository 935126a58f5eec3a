"""Attention rejects what it cannot take, in three lines that name the argument.

Where torch's own function has the argument it is asked in the same test what it thinks of the mistake: the
exception must be of the same type, or of one derived from it.
"""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torchs

import fastseq
from fastseq import attention_ops
from test_bad_input import KINDS_OF_TENSOR, assert_three_lines, error_of

B, H, SQ, SK, D, DV = 2, 4, 5, 7, 8, 6
Q, K, V = torch.randn(B, H, SQ, D), torch.randn(B, H, SK, D), torch.randn(B, H, SK, DV)
# Packed: 3 sequences.
PACKED = {
    "query": torch.randn(10, H, D),
    "key": torch.randn(12, H, D),
    "value": torch.randn(12, H, DV),
    "cu_seqlens_q": torch.tensor([0, 4, 4, 10]),
    "cu_seqlens_k": torch.tensor([0, 5, 6, 12]),
}

# name of the argument -> what is wrong with it -> the arguments that differ from a good call
MISTAKES: dict[str, dict[str, dict[str, Any]]] = {
    "query": {
        "a list": {"query": [1.0]},
        "None": {"query": None},
        "rank 0": {"query": torch.tensor(1.0)},
        "rank 1": {"query": Q[0, 0, 0]},
        "other features": {"query": Q[..., :-1]},
        "other features, rank 3": {"query": Q[0, ..., :-1]},
        "other batch": {"query": Q.repeat(2, 1, 1, 1)[:3]},
        "other heads": {"query": Q[:, :3]},
        "integers": {"query": Q.long(), "key": K.long(), "value": V.long()},
        "booleans": {"query": Q > 0, "key": K > 0, "value": V > 0},
        "complex": {"query": Q + 0j, "key": K + 0j, "value": V + 0j},
        "no features": {"query": Q[..., :0], "key": K[..., :0]},
        "sparse": {"query": Q.to_sparse()},
        "mkldnn": {"query": Q.to_mkldnn(), "key": K.to_mkldnn(), "value": V.to_mkldnn()},
        "other device": {"query": Q.to("meta")},
    },
    "key": {
        "a number": {"key": 3},
        "rank 1": {"key": K[0, 0, 0]},
        "other features": {"key": K[..., :-1]},
        "other batch": {"key": K.repeat(2, 1, 1, 1)[:3], "value": V.repeat(2, 1, 1, 1)[:3]},
        "other heads": {"key": K[:, :2], "value": V[:, :2]},
        "other heads than the value": {"key": K[:, :2]},
        "heads that do not divide": {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
        "more heads than query": {"query": Q[:, :2], "enable_gqa": True},
        "no heads": {"key": K[:, :0], "value": V[:, :0], "enable_gqa": True},
        "float64": {"key": K.double()},
        "bfloat16": {"key": K.bfloat16()},
        "integers": {"key": K.long()},
        "other device": {"key": K.to("meta")},
    },
    "value": {
        "a string": {"value": "value"},
        "rank 1": {"value": V[0, 0, 0]},
        "fewer keys": {"value": V[:, :, :-1]},
        "more keys": {"value": torch.cat([V, V], 2)},
        "other batch": {"value": V.repeat(2, 1, 1, 1)[:3]},
        "other heads": {"value": V[:, :2]},
        "no features": {"value": V[..., :0]},
        "float64": {"value": V.double()},
        "other device": {"value": V.to("meta")},
    },
    "attn_mask": {
        "a list": {"attn_mask": [True]},
        "a number": {"attn_mask": 0.5},
        "other queries": {"attn_mask": torch.zeros(SQ - 1, SK)},
        "other keys": {"attn_mask": torch.zeros(SQ, SK - 1)},
        "other keys, rank 4": {"attn_mask": torch.zeros(1, 1, SQ, SK + 1)},
        "other heads": {"attn_mask": torch.zeros(2, SQ, SK)},
        "other batch": {"attn_mask": torch.zeros(3, 1, SQ, SK)},
        "transposed": {"attn_mask": torch.zeros(SK, SQ)},
        "of keys, without the dimensions between": {"attn_mask": torch.zeros(B, SK, dtype=torch.bool)},
        "rank 5": {"attn_mask": torch.zeros(1, B, H, SQ, SK)},
        "rank 4 for rank 3": {
            "query": Q[0],
            "key": K[0],
            "value": V[0],
            "attn_mask": torch.zeros(B, H, SQ, SK),
        },
        "other batch, rank 5": {
            "query": Q.expand(3, B, H, SQ, D),
            "key": K.expand(3, B, H, SK, D),
            "value": V.expand(3, B, H, SK, DV),
            "attn_mask": torch.zeros(2, 1, 1, SQ, SK),
        },
        "float64": {"attn_mask": torch.zeros(SQ, SK, dtype=torch.float64)},
        "bfloat16": {"attn_mask": torch.zeros(SQ, SK, dtype=torch.bfloat16)},
        "integers": {"attn_mask": torch.zeros(SQ, SK, dtype=torch.int64)},
        "bytes": {"attn_mask": torch.zeros(SQ, SK, dtype=torch.uint8)},
        "other device": {"attn_mask": torch.zeros(SQ, SK, device="meta")},
    },
    "dropout_p": {
        "below 0": {"dropout_p": -0.1},
        "above 1": {"dropout_p": 1.5},
        "a string": {"dropout_p": "0.5"},
        "None": {"dropout_p": None},
        "NaN": {"dropout_p": float("nan")},
    },
    "is_causal": {
        "a number": {"is_causal": 1},
        "None": {"is_causal": None},
        "a word": {"is_causal": "top_left"},
    },
    "scale": {"a string": {"scale": "1"}, "a list": {"scale": [1.0]}},
    "enable_gqa": {"a number": {"enable_gqa": 1}, "a string": {"enable_gqa": "yes"}},
    "causal": {
        "unknown": {"causal": "bottom_left"},
        "a bool": {"causal": True},
        "a tensor": {"causal": torch.ones(SQ, SK)},
        "with is_causal": {"causal": "bottom_right", "is_causal": True},
    },
    "window": {
        "one number": {"window": 128},
        "one limit": {"window": (128,)},
        "three limits": {"window": (1, 2, 3)},
        "below -1": {"window": (-2, 0)},
        "floats": {"window": (1.0, 0)},
        "bools": {"window": (True, False)},
        "strings": {"window": "10"},
        "a tensor": {"window": torch.tensor([1, 0])},
    },
    "softcap": {
        "below 0": {"softcap": -1.0},
        "infinite": {"softcap": float("inf")},
        "NaN": {"softcap": float("nan")},
        "a string": {"softcap": "50"},
    },
    "alibi_slopes": {
        "a list": {"alibi_slopes": [0.1] * H},
        "rank 0": {"alibi_slopes": torch.tensor(0.1)},
        "rank 3": {"alibi_slopes": torch.ones(1, 1, H)},
        "other heads": {"alibi_slopes": torch.ones(H + 1)},
        "one": {"alibi_slopes": torch.ones(1)},
        "other batch": {"alibi_slopes": torch.ones(B + 1, H)},
        "integers": {"alibi_slopes": torch.ones(H, dtype=torch.int64)},
        "wants a gradient": {"alibi_slopes": torch.ones(H, requires_grad=True)},
        "other device": {"alibi_slopes": torch.ones(H, device="meta")},
    },
    "sinks": {
        "a number": {"sinks": 0.0},
        "rank 0": {"sinks": torch.tensor(0.1)},
        "rank 2": {"sinks": torch.ones(B, H)},
        "other heads": {"sinks": torch.ones(H - 1)},
        "integers": {"sinks": torch.ones(H, dtype=torch.int32)},
        "other device": {"sinks": torch.ones(H, device="meta")},
    },
    "key_lengths": {
        "a list": {"key_lengths": [7, 7]},
        "rank 0": {"key_lengths": torch.tensor(7)},
        "rank 2": {"key_lengths": torch.tensor([[7], [7]])},
        "other batch": {"key_lengths": torch.tensor([7])},
        "floats": {"key_lengths": torch.tensor([7.0, 7.0])},
        "bools": {"key_lengths": torch.tensor([True, True])},
        "int16": {"key_lengths": torch.tensor([7, 7], dtype=torch.int16)},
        "below 0": {"key_lengths": torch.tensor([7, -1])},
        "above Sk": {"key_lengths": torch.tensor([8, 7])},
        "far above Sk": {"key_lengths": torch.tensor([2**62, 7])},
        "above Sk, int32": {"key_lengths": torch.tensor([8, 7], dtype=torch.int32)},
        "other device": {"key_lengths": torch.tensor([7, 7], device="meta")},
    },
}
PACKED_MISTAKES: dict[str, dict[str, dict[str, Any]]] = {
    "query": {
        "rank 4": {"query": PACKED["query"][None]},
        "rank 2": {"query": PACKED["query"][:, 0]},
        "rank 0": {"query": torch.tensor(1.0)},
        "other features": {"query": PACKED["query"][..., 1:]},
        "other heads": {"query": PACKED["query"][:, 1:]},
    },
    "key": {
        "rank 4": {"key": PACKED["key"][None]},
        "fewer rows than value": {"key": PACKED["key"][1:]},
        "other heads than value": {"key": PACKED["key"][:, 1:]},
        "heads without enable_gqa": {"key": PACKED["key"][:, 2:], "value": PACKED["value"][:, 2:]},
    },
    "value": {"rank 2": {"value": PACKED["value"][0]}, "float64": {"value": PACKED["value"].double()}},
    "cu_seqlens_q": {
        "None": {"cu_seqlens_q": None},
        "a list": {"cu_seqlens_q": [0, 4, 4, 10]},
        "rank 0": {"cu_seqlens_q": torch.tensor(0)},
        "rank 2": {"cu_seqlens_q": torch.tensor([[0, 4, 4, 10]])},
        "empty": {"cu_seqlens_q": torch.tensor([], dtype=torch.int64)},
        "floats": {"cu_seqlens_q": torch.tensor([0.0, 4.0, 4.0, 10.0])},
        "other number": {"cu_seqlens_q": torch.tensor([0, 4, 10])},
        "not from 0": {"cu_seqlens_q": torch.tensor([1, 4, 4, 10])},
        "from below 0": {"cu_seqlens_q": torch.tensor([-1, 4, 4, 10])},
        "decreases": {"cu_seqlens_q": torch.tensor([0, 5, 4, 10])},
        "beyond the end and back": {"cu_seqlens_q": torch.tensor([0, 11, 11, 10])},
        "ends too early": {"cu_seqlens_q": torch.tensor([0, 4, 4, 9])},
        "ends too late": {"cu_seqlens_q": torch.tensor([0, 4, 4, 11])},
        "ends too late, int32": {"cu_seqlens_q": torch.tensor([0, 4, 4, 11], dtype=torch.int32)},
        "no sequences but rows": {"cu_seqlens_q": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0])},
        "other device": {"cu_seqlens_q": torch.tensor([0, 4, 4, 10], device="meta")},
    },
    "cu_seqlens_k": {
        "None": {"cu_seqlens_k": None},
        "bools": {"cu_seqlens_k": torch.tensor([False, True, True, True])},
        "other number": {"cu_seqlens_k": torch.tensor([0, 5, 6, 12, 12])},
        "not from 0": {"cu_seqlens_k": torch.tensor([5, 5, 6, 12])},
        "decreases": {"cu_seqlens_k": torch.tensor([0, 7, 6, 12])},
        "ends too late": {"cu_seqlens_k": torch.tensor([0, 5, 6, 13])},
    },
    "attn_mask": {"given": {"attn_mask": torch.zeros(10, 12)}, "wrong too": {"attn_mask": torch.zeros(1)}},
    "key_lengths": {"given": {"key_lengths": torch.tensor([5, 1, 6])}},
    "return_weights": {"asked for": {"return_weights": True}},
    "alibi_slopes": {"other batch": {"alibi_slopes": torch.ones(2, H)}},
    "sinks": {"other heads": {"sinks": torch.ones(H + 1)}},
}
TORCHS_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
# What torch takes: sizes of nothing, and, in the kernel that it chooses here, what is no probability.
TAKEN_BY_TORCH = {
    ("query", "no features"),
    ("key", "no heads"),
    ("value", "no features"),
    ("dropout_p", "below 0"),
    ("dropout_p", "NaN"),
}


class Mistake(NamedTuple):
    argument: str
    what: str
    arguments: dict[str, Any]

    def __str__(self):
        return f"{self.argument}-{self.what}"


def mistakes(table, good):
    return [
        Mistake(argument, what, {**good, **changed})
        for argument, cases in table.items()
        for what, changed in cases.items()
    ]


def rejection_of(mistake, function=fastseq.scaled_dot_product_attention):
    error = error_of(lambda: function(**mistake.arguments))
    assert error is not None, "it is taken"
    assert_three_lines(error)
    assert mistake.argument in str(error), f"does not name {mistake.argument}: {error}"
    return error


@pytest.mark.parametrize("mistake", mistakes(MISTAKES, {"query": Q, "key": K, "value": V}), ids=str)
def test_bad_call(mistake):
    ours = rejection_of(mistake)
    assert isinstance(ours, (RuntimeError, TypeError, ValueError))
    if mistake.argument in TORCHS_ARGUMENTS:
        theirs = error_of(lambda: torchs(**mistake.arguments))
        assert (theirs is None) == ((mistake.argument, mistake.what) in TAKEN_BY_TORCH), f"torch: {theirs!r}"
        assert theirs is None or isinstance(ours, type(theirs)), f"torch: {theirs!r}, fastseq: {ours!r}"


@pytest.mark.parametrize("mistake", mistakes(PACKED_MISTAKES, PACKED), ids=str)
def test_bad_call_with_packed_sequences(mistake):
    error = rejection_of(mistake)
    assert isinstance(error, (RuntimeError, TypeError))
    unsupported = mistake.argument in ("attn_mask", "key_lengths", "return_weights")
    assert isinstance(error, NotImplementedError) == unsupported


@pytest.mark.parametrize("mistake", mistakes(MISTAKES, {"query": Q, "key": K, "value": V}), ids=str)
def test_bad_call_is_rejected_where_a_gradient_is_wanted(mistake):
    def leaf(x):
        differentiable = isinstance(x, torch.Tensor) and x.is_floating_point() and not x.requires_grad
        return x.detach().requires_grad_() if differentiable else x

    arguments = {name: x if name == "alibi_slopes" else leaf(x) for name, x in mistake.arguments.items()}
    rejection_of(mistake._replace(arguments=arguments))


TRAINED = {
    "alibi_slopes": torch.ones(H, requires_grad=True),
    "scale": torch.tensor(0.3, requires_grad=True),
    "softcap": torch.tensor(2.0, requires_grad=True),
}


@pytest.mark.parametrize("name", TRAINED)
def test_options_that_want_a_gradient_are_taken_where_none_is_recorded(name):
    """The error is there because a gradient would be lost."""
    arguments = {"query": Q, "key": K, "value": V, name: TRAINED[name]}
    rejection_of(Mistake(name, "trained", arguments))
    with torch.no_grad():
        assert error_of(lambda: fastseq.scaled_dot_product_attention(**arguments)) is None


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("place", ["query", "key", "value"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(place, layout):
    """By name: torch's own message is a list of its dispatcher's kernels."""
    nested = torch.nested.nested_tensor([torch.randn(n, H, D) for n in (3, 5)], layout=layout)
    arguments = {"query": Q, "key": K, "value": V, place: nested}
    error = error_of(lambda: fastseq.scaled_dot_product_attention(**arguments))
    assert isinstance(error, NotImplementedError)
    assert_three_lines(error)


def test_torchs_causal_biases_are_checked():
    for bias, changed in (
        (causal_upper_left(SQ, SK + 1), {}),
        (causal_upper_left(SQ, SK), {"is_causal": True}),
        (causal_lower_right(SQ, SK), {"causal": "bottom_right"}),
    ):
        call = functools.partial(fastseq.scaled_dot_product_attention, Q, K, V, bias, **changed)
        rejection_of(Mistake("attn_mask", "CausalBias", changed), lambda call=call, **_: call())


# ---- values that would lead out of bounds, however they come ----

BAD_LENGTHS = [[7, -1], [8, 7], [2**40, 0]]
BAD_SEQLENS = [[1, 4, 4, 10], [0, 5, 4, 10], [0, 4, 4, 11], [0, 2**40, 4, 10], [0, -4, 4, 10], [0, 4, 4, 2]]


def operator_arguments(tensors, **changed):
    """Those of the operator, of a good call but for what is changed."""
    numbers = {"scale": 0.5, "softcap": 0.0, "dropout_p": 0.0, "left": -1, "right": -1, "bottom_right": False}
    weights = {"return_weights": False, "average_weights": False}
    arguments = {**tensors, **numbers, **weights, **changed}
    return [arguments.get(name) for name in attention_ops.Arguments._fields[:-1]]


def backward_arguments(arguments, output, normalizer):
    tensors, numbers = arguments[:10], arguments[10:16]
    wanted = [True, True, True, False, False]
    return [output, None, None, *tensors, output, normalizer, None, None, *numbers, wanted]


OPERATORS = [attention_ops, torch.ops.fastseq]


@pytest.mark.parametrize("operators", OPERATORS, ids=["direct", "dispatched"])
@pytest.mark.parametrize("shape", [(B, H, SQ, SK), (1, 1, 1, 1)])
def test_backward_operator_has_no_gradient_of_a_bool_mask(shape, operators):
    """There would be no room for it in a mask's bytes."""
    mask = torch.ones(shape, dtype=torch.bool)
    arguments = operator_arguments({"query": Q, "key": K, "value": V, "attn_mask": mask})
    backward = backward_arguments(arguments, torch.randn(B, H, SQ, DV), torch.randn(2, B, H, SQ))
    backward[-1] = [False, False, False, True, False]
    error = error_of(lambda: operators.attention_backward(*backward))
    assert isinstance(error, RuntimeError)
    assert "wanted" in str(error)


@pytest.mark.parametrize("kind", KINDS_OF_TENSOR)
@pytest.mark.parametrize("operators", OPERATORS, ids=["direct", "dispatched"])
@pytest.mark.parametrize("lengths", BAD_LENGTHS, ids=str)
def test_operators_check_key_lengths_themselves(lengths, operators, kind):
    """Forward and backward, however they are called, as the kernels trust these numbers."""
    bad = KINDS_OF_TENSOR[kind](torch.tensor(lengths))
    arguments = operator_arguments({"query": Q, "key": K, "value": V}, key_lengths=bad)
    for call in (
        lambda: operators.attention(*arguments),
        lambda: operators.attention_backward(
            *backward_arguments(arguments, torch.randn(B, H, SQ, DV), torch.randn(2, B, H, SQ))
        ),
    ):
        with pytest.raises(RuntimeError, match="key_lengths"):
            call()


@pytest.mark.parametrize("kind", KINDS_OF_TENSOR)
@pytest.mark.parametrize("operators", OPERATORS, ids=["direct", "dispatched"])
@pytest.mark.parametrize("seqlens", BAD_SEQLENS, ids=str)
def test_operators_check_cu_seqlens_themselves(seqlens, operators, kind):
    bad = KINDS_OF_TENSOR[kind](torch.tensor(seqlens))
    arguments = operator_arguments(PACKED, cu_seqlens_q=bad)
    for call in (
        lambda: operators.attention(*arguments),
        lambda: operators.attention_backward(
            *backward_arguments(arguments, torch.randn(10, H, DV), torch.randn(2, H, 10))
        ),
    ):
        with pytest.raises(RuntimeError, match="cu_seqlens_q"):
            call()


BAD_FOR_THE_OPERATOR = {
    "query": {"query": Q[0]},
    "attn_mask": {"attn_mask": torch.zeros(SQ, SK)},
    "alibi_slopes": {"alibi_slopes": torch.ones(H)},
    "sinks": {"sinks": torch.ones(H, dtype=torch.float64)},
    "seed": {"dropout_p": 0.5},
    "dropout_p": {"dropout_p": 1.0, "seed": torch.tensor([1])},
    "left": {"left": -2},
    "right": {"right": -2},
    "softcap": {"softcap": -1.0},
}


@pytest.mark.parametrize("operators", OPERATORS, ids=["direct", "dispatched"])
@pytest.mark.parametrize("argument", BAD_FOR_THE_OPERATOR)
def test_operators_take_what_the_function_makes_of_arguments_and_nothing_else(argument, operators):
    arguments = operator_arguments({"query": Q, "key": K, "value": V}, **BAD_FOR_THE_OPERATOR[argument])
    error = error_of(lambda: operators.attention(*arguments))
    assert isinstance(error, (RuntimeError, ValueError))
    assert_three_lines(error)
    assert argument in str(error)


@pytest.mark.parametrize("operators", OPERATORS, ids=["direct", "dispatched"])
@pytest.mark.parametrize(
    "name", ["grad_output", "grad_lse", "grad_weights", "output", "normalizer", "weights", "remainder"]
)
def test_backward_operator_checks_what_came_from_the_forward_pass(name, operators):
    arguments = operator_arguments({"query": Q, "key": K, "value": V})
    backward = backward_arguments(arguments, torch.randn(B, H, SQ, DV), torch.randn(2, B, H, SQ))
    place = {"grad_output": 0, "grad_lse": 1, "grad_weights": 2, "output": 13, "normalizer": 14}
    place |= {"weights": 15, "remainder": 16}
    backward[place[name]] = torch.randn(B, H, SQ + 1, 3)
    error = error_of(lambda: operators.attention_backward(*backward))
    assert isinstance(error, RuntimeError)
    assert_three_lines(error)
    assert name in str(error)


@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
def test_tensor_without_memory_is_refused(name):
    """torch's zero tensors have a shape and an address of 0."""
    given = {"query": Q, "key": K, "value": V, "grad_output": torch.randn(B, H, SQ, DV)}
    given[name] = torch._efficientzerotensor(given[name].shape)
    grad_output = given.pop("grad_output")
    arguments = operator_arguments(given)
    backward = backward_arguments(arguments, torch.randn(B, H, SQ, DV), torch.randn(2, B, H, SQ))
    backward[0] = grad_output
    with pytest.raises(RuntimeError, match="memory"):
        attention_ops.attention_backward(*backward)
    if name != "grad_output":
        with pytest.raises(RuntimeError, match="memory"):
            attention_ops.attention(*arguments)


def attend(query):
    return fastseq.scaled_dot_product_attention(query, query, query)


def third_derivative(x):
    loss = attend(x).square().sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = gradient.square().sum()


def along(x, f=attend):
    """The derivative of f along x itself."""
    return torch.func.jvp(f, (x,), (x,))[1]


def along_slopes(x):
    def attend(slopes):
        return fastseq.scaled_dot_product_attention(x, x, x, alibi_slopes=slopes)

    return along(torch.ones(1), attend)


def along_scale(x):
    return along(torch.tensor(0.5), lambda scale: fastseq.scaled_dot_product_attention(x, x, x, scale=scale))


REFUSED = {
    "a third derivative": third_derivative,
    "a third derivative, by torch.func": lambda x: along(
        x, torch.func.grad(lambda x: torch.func.grad(lambda x: attend(x).square().sum())(x).square().sum())
    ),
    "forward mode twice": lambda x: along(x, along),
    "alibi_slopes": along_slopes,
    "scale": along_scale,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_derivative_is_refused_and_never_silently_wrong(what):
    error = error_of(REFUSED[what], torch.randn(2, 3, 4, requires_grad=True))
    assert isinstance(error, TypeError if what == "scale" else RuntimeError)
    assert_three_lines(error)
    assert what.partition(",")[0] in str(error)


# ---- what is no mistake ----

GOOD = {
    "no queries": {"query": Q[:, :, :0]},
    "no keys": {"key": K[:, :, :0], "value": V[:, :, :0]},
    "no batch": {"query": Q[:0], "key": K[:0], "value": V[:0]},
    "one query head for all": {"query": Q[:, :1]},
    "grouped heads": {"key": K[:, :2], "value": V[:, :2], "enable_gqa": True},
    "one key head for all": {"key": K[:, :1], "value": V[:, :1]},
    "a mask of one number": {"attn_mask": torch.tensor(True)},
    "a mask of one row": {"attn_mask": torch.zeros(SK)},
    "a mask and is_causal": {"attn_mask": torch.zeros(SK), "is_causal": True},
    "both names of one thing": {"is_causal": True, "causal": "top_left"},
    "a scale in a tensor": {"scale": torch.tensor(0.5)},
    "no limits": {"window": (None, -1)},
    "limits in a list": {"window": [3, 3]},
    "softcap of 0": {"softcap": 0},
    "lengths in int32": {"key_lengths": torch.tensor([0, 7], dtype=torch.int32)},
    "slopes in bfloat16": {"alibi_slopes": torch.ones(B, H, dtype=torch.bfloat16)},
    "sinks in float64": {"sinks": torch.ones(H, dtype=torch.float64)},
    "everything dropped": {"dropout_p": 1},
}


@pytest.mark.parametrize("what", GOOD)
def test_no_mistake(what):
    arguments = {"query": Q, "key": K, "value": V, **GOOD[what]}
    output = fastseq.scaled_dot_product_attention(**arguments)
    heads = max(arguments[name].shape[1] for name in ("query", "key"))
    assert output.shape == (arguments["query"].shape[0], heads, arguments["query"].shape[2], DV)
    assert not output.isnan().any()
