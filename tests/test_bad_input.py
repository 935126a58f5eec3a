"""What torch.nn rejects is rejected with the same exception type, in three lines that name the argument.

torch.nn is asked in the same test what it thinks of each bad input; so nothing here can go out of date.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from fastseq import ops
from harness import Case, call_module, make_data, make_module, run_module
from reference import MODES

MODULES = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
X = torch.randn(4, 2, 3)  # [T, B, I]
H = torch.randn(1, 2, 5)  # [L, B, H]


def hx(module, h, c=None):
    """The state that the module wants, with h in all its places, or with c in the second."""
    return (h, h if c is None else c) if "LSTM" in type(module).__name__ else h


def packed(x):
    return pack_padded_sequence(x, torch.tensor([4, 2]))


def unsorted(x):
    return pack_padded_sequence(x, torch.tensor([2, 4]), enforce_sorted=False)


def with_weight(module, name, weight):
    setattr(module, name, nn.Parameter(weight))
    return module


# name of the argument -> what is wrong with it -> the call that is to fail
BAD_CALLS = {
    "input": {
        "rank 1": lambda m: m(X[0, 0]),
        "rank 4": lambda m: m(X[None]),
        "wrong features": lambda m: m(X[..., :2]),
        "wrong features, unbatched": lambda m: m(X[:, 0, :2]),
        "wrong features, packed": lambda m: m(packed(X[..., :2])),
        "float64": lambda m: m(X.double()),
        "bfloat16": lambda m: m(X.bfloat16()),
        "integers": lambda m: m(X.long()),
        "booleans": lambda m: m(X > 0),
        "complex": lambda m: m(X.to(torch.complex64)),
        "no steps": lambda m: m(X[:0]),
        "no steps and no rows": lambda m: m(X[:0, :0]),
        "other device": lambda m: m(X.to("meta")),
        "other device than the module": lambda m: m.to("meta")(X),
        "None": lambda m: m(None),
        "a list": lambda m: m(X.tolist()),
        "an array of numpy": lambda m: m(X.numpy()),
    },
    "hx": {
        "rank 2 for batched input": lambda m: m(X, hx(m, H[0])),
        "rank 3 for unbatched input": lambda m: m(X[:, 0], hx(m, H)),
        "rank 1 for unbatched input": lambda m: m(X[:, 0], hx(m, H[0, 0])),
        "wrong batch": lambda m: m(X, hx(m, H[:, :1])),
        "wrong batch, packed": lambda m: m(packed(X), hx(m, H[:, :1])),
        "wrong batch, packed unsorted": lambda m: m(unsorted(X), hx(m, H[:, :1])),
        "wrong batch of the cell state, packed": lambda m: m(unsorted(X), hx(m, H, H[:, :1])),
        "wrong features": lambda m: m(X, hx(m, H[..., :4])),
        "wrong features, packed unsorted": lambda m: m(unsorted(X), hx(m, H[..., :4])),
        "too many layers": lambda m: m(X, hx(m, H.repeat(2, 1, 1))),
        "wrong cell state": lambda m: m(X, hx(m, H, H[..., :4])),
        "cell state of rank 2": lambda m: m(X, hx(m, H, H[0])),
        "float64": lambda m: m(X, hx(m, H.double())),
        "float64 cell state": lambda m: m(X, hx(m, H, H.double())),
        "integers": lambda m: m(X, hx(m, H.long())),
        "other device": lambda m: m(X, hx(m, H.to("meta"))),
        "a number": lambda m: m(X, 3),
        "a number, packed": lambda m: m(packed(X), 3),
        "a number, packed unsorted": lambda m: m(unsorted(X), 3),
        "numbers": lambda m: m(X, hx(m, 3)),
        "a tuple for a tensor": lambda m: m(X, hx(m, (H, H))),
        "a tuple for a tensor, packed unsorted": lambda m: m(unsorted(X), hx(m, (H, H))),
        "one state in a tuple": lambda m: m(X, (H,)),
        "None in a tuple": lambda m: m(X, (H, None)),
        "None in a tuple, packed unsorted": lambda m: m(unsorted(X), (H, None)),
        "one state": lambda m: m(X, H),
    },
    "weight_hh": {
        "float64": lambda m: with_weight(m, "weight_hh_l0", m.weight_hh_l0.double())(X),
        "too narrow": lambda m: with_weight(m, "weight_hh_l0", m.weight_hh_l0[:, :4])(X),
    },
}
BAD_CELL_CALLS = {
    "input": {
        "rank 0": lambda m: m(X[0, 0, 0]),
        "rank 3": lambda m: m(X),
        "wrong features": lambda m: m(X[0, :, :2]),
        "wrong features, unbatched": lambda m: m(X[0, 0, :2]),
        "float64": lambda m: m(X[0].double()),
        "integers": lambda m: m(X[0].long()),
        "other device": lambda m: m(X[0].to("meta")),
        "other device than the module": lambda m: m.to("meta")(X[0]),
        "None": lambda m: m(None),
        "a list": lambda m: m(X[0].tolist()),
    },
    "hx": {
        "rank 3": lambda m: m(X[0], hx(m, H)),
        "rank 1 for batched input": lambda m: m(X[0], hx(m, H[0, 0])),
        "rank 2 for unbatched input": lambda m: m(X[0, 0], hx(m, H[0])),
        "wrong batch": lambda m: m(X[0], hx(m, H[0, :1])),
        "wrong features": lambda m: m(X[0], hx(m, H[0, :, :4])),
        "wrong cell state": lambda m: m(X[0], hx(m, H[0], H[0, :, :4])),
        "float64": lambda m: m(X[0], hx(m, H[0].double())),
        "float64 cell state": lambda m: m(X[0], hx(m, H[0], H[0].double())),
        "a number": lambda m: m(X[0], 3),
        "numbers": lambda m: m(X[0], hx(m, 3)),
        "a tuple for a tensor": lambda m: m(X[0], hx(m, (H[0], H[0]))),
        "None in a tuple": lambda m: m(X[0], (H[0], None)),
        "None in a tuple, unbatched": lambda m: m(X[0, 0], (H[0, 0], None)),
        "one state": lambda m: m(X[0], H[0]),
    },
}
NAMES = {"input": ("input",), "hx": ("hx", "h_0", "c_0"), "weight_hh": ("weight_hh",)}
BAD_CONSTRUCTIONS = {
    "input_size of 0": lambda cls: cls(0, 5),
    "input_size below 0": lambda cls: cls(-1, 5),
    "input_size that is a float": lambda cls: cls(3.0, 5),
    "hidden_size of 0": lambda cls: cls(3, 0),
    "hidden_size below 0": lambda cls: cls(3, -1),
    "hidden_size that is a string": lambda cls: cls(3, "5"),
    "no hidden_size": lambda cls: cls(3),
    "num_layers of 0": lambda cls: cls(3, 5, 0),
    "num_layers below 0": lambda cls: cls(3, 5, -1),
    "num_layers that is a float": lambda cls: cls(3, 5, 1.5),
    "bias that is an integer": lambda cls: cls(3, 5, bias=1),
    "batch_first that is a string": lambda cls: cls(3, 5, batch_first="yes"),
    "dropout above 1": lambda cls: cls(3, 5, dropout=1.5),
    "dropout below 0": lambda cls: cls(3, 5, dropout=-0.1),
    "dropout that is a bool": lambda cls: cls(3, 5, dropout=True),
    "proj_size below 0": lambda cls: cls(3, 5, proj_size=-1),
    "proj_size of hidden_size": lambda cls: cls(3, 5, proj_size=5),
    "unknown nonlinearity": lambda cls: cls(3, 5, nonlinearity="sigmoid"),
    "unknown keyword": lambda cls: cls(3, 5, foo=1),
    "dtype of integers": lambda cls: cls(3, 5, dtype=torch.int64),
}

# What is no mistake for some classes.
ONE_STATE = ("RNN", "GRU", "RNNCell", "GRUCell")
NO_MISTAKE = {
    # One state is read where the LSTM reads two.
    "wrong cell state": ONE_STATE,
    "wrong batch of the cell state, packed": ONE_STATE,
    "cell state of rank 2": ONE_STATE,
    "float64 cell state": ONE_STATE,
    "one state": ONE_STATE,
    # The cells take what the layers refuse: no features, no units.
    "input_size of 0": CELLS,
    "hidden_size of 0": CELLS,
    # The third argument of a cell is bias, of which only the truth is asked.
    "num_layers of 0": CELLS,
    "num_layers below 0": CELLS,
    "num_layers that is a float": CELLS,
    "bias that is an integer": CELLS,
    # It is looked at when the cell is called: see test_unknown_nonlinearity_of_a_cell.
    "unknown nonlinearity": ("RNNCell",),
}
# Mistakes that torch.nn does not see: two dtypes in one LSTMCell, a weight beyond whose end oneDNN reads.
UNSEEN_BY_TORCH = {("LSTMCell", "float64 cell state"), ("LSTM", "too narrow")}


class Mistake(NamedTuple):
    class_name: str
    argument: str
    what: str
    call: Callable

    def __str__(self):
        return f"{self.class_name}-{self.argument}-{self.what}"


def mistakes(class_names, table):
    """Every call that is to fail, for each class."""
    return [
        Mistake(class_name, argument, what, call)
        for class_name in class_names
        for argument, calls in table.items()
        for what, call in calls.items()
        if class_name not in NO_MISTAKE.get(what, ())
    ]


def error_of(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return error
    return None


def assert_rejected_like_torch(mistake):
    theirs = error_of(mistake.call, getattr(nn, mistake.class_name)(3, 5))
    ours = error_of(mistake.call, getattr(fastseq, mistake.class_name)(3, 5))
    assert theirs or (mistake.class_name, mistake.what) in UNSEEN_BY_TORCH, "torch.nn takes it"
    accepted = type(theirs) if theirs else RuntimeError
    assert isinstance(ours, accepted), f"torch.nn: {theirs!r}, fastseq: {ours!r}"
    assert_three_lines(ours)
    names = NAMES[mistake.argument]
    assert any(name in str(ours) for name in names), f"does not name {mistake.argument}: {ours}"


def assert_three_lines(error):
    lines = str(error).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["given", "accepted", "try"], str(error)
    assert all(line.partition(": ")[2] for line in lines), "an empty line"
    assert max(len(line) for line in lines) <= 160, "the lines are short"


@pytest.mark.parametrize("mistake", mistakes(MODULES, BAD_CALLS), ids=str)
def test_bad_call_of_a_module(mistake):
    assert_rejected_like_torch(mistake)


@pytest.mark.parametrize("mistake", mistakes(CELLS, BAD_CELL_CALLS), ids=str)
def test_bad_call_of_a_cell(mistake):
    assert_rejected_like_torch(mistake)


@pytest.mark.parametrize("mistake", mistakes(MODULES + CELLS, {"constructor": BAD_CONSTRUCTIONS}), ids=str)
def test_bad_construction(mistake):
    """With torch.nn's own message, as its own constructor makes the parameters."""
    theirs = error_of(mistake.call, getattr(nn, mistake.class_name))
    ours = error_of(mistake.call, getattr(fastseq, mistake.class_name))
    assert theirs, "torch.nn takes it"
    assert isinstance(ours, type(theirs)), f"torch.nn: {theirs!r}, fastseq: {ours!r}"


def test_unknown_nonlinearity_of_a_cell():
    """Like torch.nn's, it says so when it is called."""
    theirs = error_of(nn.RNNCell(3, 5, nonlinearity="sigmoid"), X[0])
    ours = error_of(fastseq.RNNCell(3, 5, nonlinearity="sigmoid"), X[0])
    assert isinstance(ours, type(theirs))
    assert_three_lines(ours)
    assert "nonlinearity" in str(ours)


@pytest.mark.parametrize("class_name", MODULES)
def test_packed_input_of_another_dtype(class_name):
    """torch.nn's own exception differs here from module to module; fastseq's is the one of padded input."""
    error = error_of(getattr(fastseq, class_name)(3, 5), packed(X.double()))
    assert isinstance(error, ValueError)
    assert "input" in str(error)
    assert_three_lines(error)


@pytest.mark.parametrize("class_name", MODULES)
def test_weight_of_the_wrong_shape_is_never_read(class_name):
    """Also where torch.nn's kernels read on beyond the end."""
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        module = getattr(fastseq, class_name)(3, 5)
        with_weight(module, name, getattr(module, name)[:-1])
        error = error_of(module, X)
        assert isinstance(error, RuntimeError)
        assert "weight_" in str(error) or "bias_" in str(error)


@pytest.mark.parametrize("what", ["None", "[None]", "a tensor", "none", "one", "None in it", "a number"])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_malformed_weights_are_named(name, what):
    weights = {
        "None": None,
        "[None]": [None],
        "a tensor": X[0],
        "none": [],
        "one": [[X[0]]],
        "None in it": [[torch.randn({"rnn": 5, "lstm": 20, "gru": 15}[name], 3), None]],
        "a number": [[X[0], X.sum()]],
    }[what]
    error = error_of(getattr(fastseq.functional, name), X, weights)
    assert isinstance(error, TypeError if "None" in what or what in ("a tensor", "none") else RuntimeError)
    assert_three_lines(error)
    assert "weights" in str(error).splitlines()[0]


def test_a_weight_that_is_no_tensor_is_named():
    """Also behind those of the first layer's first direction, and of a cell."""
    layer = [[torch.randn(5, 3), torch.randn(5, 5), torch.randn(5), torch.randn(5)]] * 2
    layer[1] = [*layer[1][:3], None]
    error = error_of(lambda: fastseq.functional.rnn(X, layer, bidirectional=True))
    assert "bias_hh_reverse of type NoneType" in str(error)
    assert_three_lines(error)
    error = error_of(fastseq.functional.rnn_cell, X[0], None, None, torch.randn(5, 5))
    assert "weight_ih of type NoneType" in str(error)
    assert_three_lines(error)


class Subclass(torch.Tensor):
    pass


KINDS_OF_TENSOR = {
    "tensor": lambda sizes: sizes,
    "parameter": lambda sizes: nn.Parameter(sizes, requires_grad=False),
    "subclass": lambda sizes: sizes.as_subclass(Subclass),
}
BAD_BATCH_SIZES = [[2, 3, 1], [2, 2, 1], [2, 2, 3], [4, 3], [2, 2, -1, 3], [7, -1], [6, 0, 0, 1], []]


@pytest.mark.parametrize("kind", KINDS_OF_TENSOR)
@pytest.mark.parametrize("sizes", BAD_BATCH_SIZES, ids=str)
@pytest.mark.parametrize("class_name", MODULES)
def test_batch_sizes_that_would_lead_out_of_bounds(class_name, sizes, kind):
    """A PackedSequence made by hand, of 6 rows, whose batch_sizes increase, do not add up or are negative."""
    bad = PackedSequence(torch.randn(6, 3), KINDS_OF_TENSOR[kind](torch.tensor(sizes, dtype=torch.int64)))
    module = getattr(fastseq, class_name)(3, 5)
    for call in (module, torch.no_grad()(module)):
        error = error_of(call, bad)
        assert isinstance(error, RuntimeError)
        assert_three_lines(error)
        assert "batch_sizes" in str(error)


@pytest.mark.parametrize("kind", KINDS_OF_TENSOR)
def test_operators_check_batch_sizes_themselves(kind):
    """Forward and backward, however they are called, as the kernels trust these numbers."""
    x, h0, weights = torch.randn(6, 3), torch.randn(1, 2, 5), [torch.randn(5, 3), torch.randn(5, 5)]
    saved = x.new_empty(0)
    for sizes in BAD_BATCH_SIZES:
        batch_sizes = KINDS_OF_TENSOR[kind](torch.tensor(sizes, dtype=torch.int64))
        for recurrent in (ops.recurrent, torch.ops.fastseq.recurrent):
            with pytest.raises(RuntimeError, match="batch_sizes"):
                recurrent(
                    x, batch_sizes, None, None, h0, None, weights, "RNN_TANH", 1, False, False, "nothing"
                )
        for backward in (ops.recurrent_backward, torch.ops.fastseq.recurrent_backward):
            grad = output = torch.randn(6, 5)
            tensors = (grad, None, None, x, batch_sizes, None, None, h0, None, weights, output, saved)
            with pytest.raises(RuntimeError, match="batch_sizes"):
                backward(*tensors, "RNN_TANH", 1, False, None, 0, [True, False, False, True, True])


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
@pytest.mark.parametrize("class_name", MODULES)
def test_tensor_for_which_there_is_no_kernel(class_name, layout):
    x = X.to_sparse() if layout == "sparse" else X.to_mkldnn()
    error = error_of(getattr(fastseq, class_name)(3, 5), x)
    assert isinstance(error, RuntimeError)  # NotImplementedError is one
    assert_three_lines(error)
    assert "input" in str(error)


PLACES = [  # where a value that is no number may come from
    (mode, place)
    for mode in MODES
    for place in ("input", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
    if mode != "GRU_RESET_BEFORE" and (place != "c0" or mode == "LSTM")
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "place"), PLACES)
def test_nan_and_infinity_pass_through_as_in_torch(mode, dtype, place, value):
    """NaN, infinity and finite numbers stand where they stand in torch's results."""
    case = Case(mode, dtype, batch=9, hidden_size=19)
    ours, torchs, data = make_module(case), make_module(case, nn), make_data(case)
    with torch.no_grad():
        if place in data:
            data[place][-1 if place == "input" else 0, 1, 0] = value
        else:
            for module in (ours, torchs):
                getattr(module, place)[(2, 0) if "weight" in place else 2] = value
    expected = call_module(case, torchs, data)
    for name, x in call_module(case, ours, data).items():
        y = expected[name]
        assert torch.equal(x.isnan(), y.isnan()), f"{name}: NaN in other places"
        assert torch.equal(x.isinf(), y.isinf()), f"{name}: infinity in other places"


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_the_incoming_gradient_reaches_every_weight_and_no_other_row(mode):
    case = Case(mode, batch=4)
    module, data = make_module(case), make_data(case)
    output = call_module(case, module, data)["output"]
    incoming = torch.zeros_like(output)
    incoming[-1, 1] = float("nan")
    gradients = torch.autograd.grad(output, [data["input"], module.weight_hh_l0], incoming)
    rows = gradients[0].isnan().any(-1).any(0).tolist()
    assert gradients[1].isnan().any()
    assert rows == [False, True, False, False] or mode == "RNN_RELU"
    assert not any(rows[b] for b in (0, 2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_large_pre_activations_saturate_without_nan(mode):
    case = Case(mode)
    module, data = make_module(case), make_data(case)
    with torch.no_grad():
        for scale in (1e2, 1e4, 1e30):
            data["input"].copy_(make_data(case)["input"] * scale)
            output = call_module(case, module, data)["output"]
            assert not output.isnan().any()
            assert mode == "RNN_RELU" or output.abs().max() <= data["h0"].abs().max().clamp(min=1)
    results = run_module(case, module, make_data(case) | {"input": data["input"]})
    assert mode == "RNN_RELU" or all(
        x.isfinite().all() for name, x in results.items() if "weight" not in name
    )
