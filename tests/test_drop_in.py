"""fastseq's modules in the place of torch.nn's: construction, parameters, persistence, tools around them."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from harness import (
    Case,
    assert_same_bits,
    call_module,
    cell_class,
    make_data,
    make_module,
    module_class,
    named_outputs,
    run_module,
    run_torch,
    states_of,
    with_gradients,
)
from reference import MODES
from tolerances import SAME_FLOAT32, SAME_FLOAT64, TRAINING_CURVE, assert_as_accurate_as_torch

TORCH_MODES = [mode for mode in MODES if mode != "GRU_RESET_BEFORE"]
CONSTRUCTIONS = [
    ("RNN", (3, 5), {}),
    ("RNN", (3, 5, 2, "relu", False, True, 0.25, True), {}),
    ("RNN", (3, 5), {"nonlinearity": "relu", "num_layers": 2, "dropout": 0.5}),
    ("LSTM", (3, 5), {}),
    ("LSTM", (3, 5, 2, False, True, 0.25, True, 2), {}),
    ("LSTM", (3, 5), {"proj_size": 4, "dtype": torch.float64}),
    ("LSTM", (3, 5), {"device": "meta"}),
    ("GRU", (3, 5), {}),
    ("GRU", (3, 5, 2, False, True, 0.25, True), {}),
    (
        "GRU",
        (),
        {"input_size": 3, "hidden_size": 5, "num_layers": 3, "bidirectional": True, "dtype": torch.bfloat16},
    ),
    ("RNNCell", (3, 5), {}),
    ("RNNCell", (3, 5, False, "relu"), {}),
    ("LSTMCell", (3, 5, False), {"dtype": torch.float64}),
    ("GRUCell", (3, 5), {"bias": False, "device": "cpu"}),
]


def both(name, arguments, keywords):
    """The module of fastseq and the one of torch.nn, each from the same seed."""
    for library in (fastseq, nn):
        torch.manual_seed(3)
        yield getattr(library, name)(*arguments, **keywords)


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_constructor_initial_values_and_repr_are_torchs(construction):
    ours, torchs = both(*construction)
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for (name, a), (other, b) in zip(ours.named_parameters(), torchs.named_parameters(), strict=True):
        assert name == other
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert a.requires_grad
        assert a.is_meta or torch.equal(a, b)
    for attribute in (
        "input_size",
        "hidden_size",
        "bias",
        "num_layers",
        "dropout",
        "mode",
        "nonlinearity",
        "proj_size",
    ):
        assert getattr(ours, attribute, None) == getattr(torchs, attribute, None)


def test_random_numbers_after_construction_are_torchs():
    """No number more is drawn than torch.nn draws, so that what is built later is the same too."""
    for construction in CONSTRUCTIONS:
        states = []
        for _ in both(*construction):
            states.append(torch.rand(1))
        assert torch.equal(*states)


def test_reset_after_is_a_keyword_and_shows():
    assert fastseq.GRU(3, 5).reset_after is True
    assert "reset_after=False" in repr(fastseq.GRU(3, 5, reset_after=False))
    assert "reset_after=False" in repr(fastseq.GRUCell(3, 5, reset_after=False))


@pytest.mark.parametrize("mode", TORCH_MODES)
def test_state_dict_goes_both_ways(mode):
    case = Case(mode, num_layers=2, bidirectional=True, proj_size=3 if mode == "LSTM" else 0)
    ours, torchs = make_module(case, seed=1), make_module(case, nn, seed=2)
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    data = make_data(case)
    for name, x in call_module(case, ours, data).items():
        torch.testing.assert_close(x, call_module(case, torchs, data)[name], **SAME_FLOAT32)


def test_reset_parameters_and_all_weights_are_torchs():
    ours, torchs = both("LSTM", (3, 5, 2), {"bidirectional": True})
    for module in (ours, torchs):
        torch.manual_seed(4)
        module.reset_parameters()
    for a, b in zip(ours.all_weights, torchs.all_weights, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copies_of(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_are_equal_and_independent(mode):
    case = Case(mode, num_layers=2, bidirectional=True)
    module, data = make_module(case), make_data(case)
    module(data["input"])  # a module that has been used
    for twin in copies_of(module):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert torch.equal(twin(data["input"])[0], module(data["input"])[0])
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert module.weight_hh_l0.any()
        assert not torch.equal(twin(data["input"])[0], module(data["input"])[0])


def test_cells_can_be_copied_and_pickled():
    x = torch.randn(2, 3)
    for mode in MODES:
        cls, arguments = cell_class(fastseq, mode)
        cell = cls(3, 5, **arguments)
        for twin in copies_of(cell):
            a, b = (y[0] if mode == "LSTM" else y for y in (twin(x), cell(x)))
            assert torch.equal(a, b)


def test_saved_state_dict_loads_with_weights_only(tmp_path):
    a, b = fastseq.LSTM(3, 5), fastseq.LSTM(3, 5)
    torch.save(a.state_dict(), tmp_path / "weights.pt")
    b.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(a.weight_hh_l0, b.weight_hh_l0)


@pytest.mark.parametrize("mode", MODES)
def test_change_of_dtype(mode):
    case = Case(mode)
    module, x = make_module(case), make_data(case)["input"].detach()
    for change in (nn.Module.double, nn.Module.bfloat16, nn.Module.half, nn.Module.float):
        change(module)
        dtype = module.weight_hh_l0.dtype
        output, hidden = module(x.to(dtype))
        assert output.dtype == dtype
        assert (hidden[0] if mode == "LSTM" else hidden).dtype == dtype


def test_meta_module_can_be_materialised():
    module = fastseq.GRU(3, 5, device="meta").to_empty(device="cpu")
    module.load_state_dict(fastseq.GRU(3, 5).state_dict())
    assert module(torch.randn(2, 1, 3))[0].isfinite().all()


def test_share_memory_and_flatten_parameters():
    module, x = fastseq.LSTM(3, 5), torch.randn(2, 1, 3)
    expected = module(x)[0]
    addresses = [weight.data_ptr() for weight in module.parameters()]
    assert module.flatten_parameters() is None
    assert addresses == [weight.data_ptr() for weight in module.parameters()], (
        "flatten_parameters does nothing"
    )
    assert module.share_memory() is module
    assert module.weight_hh_l0.is_shared()
    assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("mode", MODES)
def test_parametrized_weights(mode, parametrize):
    """The result is that of the computed weight, and the gradient goes on into what it was computed from."""
    case = Case(mode, torch.float64, num_layers=2)
    module, plain, data = make_module(case), make_module(case), make_data(case)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        parametrize(module, name)
    module.eval()  # spectral_norm iterates at every call in training
    with torch.no_grad():
        for name in plain.state_dict():
            getattr(plain, name).copy_(getattr(module, name))
    output, expected = (m(data["input"], states_of(data))[0] for m in (module, plain))
    assert torch.equal(output, expected)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        originals = list(module.parametrizations[name].parameters())
        (through,) = torch.autograd.grad(expected.sum(), getattr(plain, name), retain_graph=True)
        chained = torch.autograd.grad(getattr(module, name), originals, through)
        ours = torch.autograd.grad(output.sum(), originals, retain_graph=True)
        for a, b in zip(ours, chained, strict=True):
            torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_parametrized_weights_in_training_follow_an_optimizer():
    module = parametrizations.weight_norm(fastseq.GRU(3, 5), "weight_hh_l0")
    x, before = torch.randn(4, 2, 3), module.weight_hh_l0.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    first = module(x)[0]
    first.sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight_hh_l0, before)
    assert not torch.equal(module(x)[0], first)


@pytest.mark.parametrize("mode", MODES)
def test_tied_weights_share_their_gradient(mode):
    case = Case(mode, torch.float64, num_layers=2)
    module, data = make_module(case), make_data(case)
    untied = copy.deepcopy(module)
    untied.weight_hh_l1 = nn.Parameter(untied.weight_hh_l0.detach().clone())
    module.weight_hh_l1 = module.weight_hh_l0
    outputs = [m(data["input"])[0] for m in (module, untied)]
    assert torch.equal(*outputs)
    (tied,) = torch.autograd.grad(outputs[0].sum(), module.weight_hh_l0)
    apart = torch.autograd.grad(outputs[1].sum(), [untied.weight_hh_l0, untied.weight_hh_l1])
    torch.testing.assert_close(tied, sum(apart), **SAME_FLOAT64)


@pytest.mark.parametrize("mode", MODES)
def test_replaced_and_functional_parameters_are_used(mode):
    case = Case(mode)
    module, other, data = make_module(case, seed=1), make_module(case, seed=2), make_data(case)
    expected = other(data["input"])[0]
    parameters = {name: x.detach().requires_grad_() for name, x in other.named_parameters()}
    output = functional_call(module, parameters, (data["input"],))[0]
    assert torch.equal(output, expected)
    assert all(g.any() for g in torch.autograd.grad(output.sum(), list(parameters.values())))
    for name, weight in other.named_parameters():
        setattr(module, name, weight)
    assert torch.equal(module(data["input"])[0], expected)


def test_weight_that_is_a_plain_tensor():
    """As weight dropping does it: the parameter is deleted and a tensor put in its place before each call."""
    module, x = fastseq.LSTM(3, 5), torch.randn(4, 2, 3)
    raw = module.weight_hh_l0
    del module.weight_hh_l0
    module.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
    module(x)[0].sum().backward()
    dropped = module.weight_hh_l0 == 0
    assert dropped.any()
    assert not raw.grad[dropped].any()
    assert raw.grad[~dropped].any()


@pytest.mark.parametrize(
    "fields", [{}, {"batch_first": True}, {"packed": "unsorted"}, {"bidirectional": True}], ids=str
)
@pytest.mark.parametrize("mode", TORCH_MODES)
def test_dropout_between_layers_is_torchs_for_the_same_seed(mode, fields):
    case = Case(mode, torch.float64, num_layers=3, batch=4, **fields)
    ours, torchs, data = make_module(case), make_module(case, nn), make_data(case)
    ours.dropout = torchs.dropout = 0.4
    results = []
    for module in (ours, torchs):
        torch.manual_seed(5)
        results.append(run_module(case, module, data))
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name], **SAME_FLOAT64)
    assert not torch.equal(call_module(case, ours, data)["output"], results[0]["output"]), (
        "another mask each time"
    )
    ours.eval()
    plain = run_torch(case, dict(ours.named_parameters()), data)
    for name, x in run_module(case, ours, data).items():
        assert_as_accurate_as_torch(x, plain[name], plain[name], case.dtype, name)


def test_dropout_of_one_layer_warns_like_torch():
    for library in (nn, fastseq):
        with pytest.warns(UserWarning, match="num_layers"):
            library.GRU(3, 5, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastseq.GRU(3, 5, num_layers=2, dropout=0.5)


def test_dropout_of_one_layer_drops_nothing():
    with pytest.warns(UserWarning, match="num_layers"):
        module = fastseq.GRU(3, 5, dropout=0.9)
    x = torch.randn(4, 2, 3)
    assert torch.equal(module(x)[0], module.eval()(x)[0])


@pytest.mark.parametrize("mode", TORCH_MODES)
def test_training_follows_the_same_curve(mode):
    """Ten steps of an optimizer: both losses stay together."""
    case = Case(mode, torch.float64, num_layers=2, bidirectional=True)
    losses = []
    for library in (fastseq, nn):
        torch.manual_seed(6)
        model = nn.ModuleDict({"recurrent": make_module(case, library), "linear": nn.Linear(14, 3)}).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x, y = (
            make_data(case)["input"].detach(),
            torch.randint(3, (5, 3), generator=torch.Generator().manual_seed(7)),
        )
        losses.append([])
        for _ in range(10):
            loss = nn.functional.cross_entropy(
                model["linear"](model["recurrent"](x)[0]).flatten(0, 1), y.flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, **TRAINING_CURVE)
    assert losses[0][-1] < losses[0][0]


def test_sequential_and_hooks():
    module, calls = fastseq.LSTM(3, 5), []
    model = nn.Sequential(nn.Linear(4, 3), module)
    module.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    module.register_forward_hook(lambda m, args, out: calls.append(out[0].shape))
    module.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append("back"))
    module.weight_hh_l0.register_hook(lambda grad: calls.append(grad.shape))
    output, _ = model(torch.randn(6, 2, 4))
    output.sum().backward()
    assert calls[:2] == ["pre", (6, 2, 5)]
    assert "back" in calls
    assert (20, 5) in calls


def test_data_may_be_given_by_keyword():
    x, h = torch.randn(4, 2, 3), torch.zeros(1, 2, 5)
    module, cell = fastseq.GRU(3, 5), fastseq.GRUCell(3, 5)
    assert torch.equal(module(input=x, hx=h)[0], module(x)[0])
    assert torch.equal(cell(input=x[0], hx=h[0]), cell(x[0]))


def test_packed_sequence_made_by_hand():
    """Only data and batch_sizes, as older code builds it."""
    x = torch.randn(4, 2, 3)
    packed = pack_padded_sequence(x, torch.tensor([4, 2]))
    bare = PackedSequence(packed.data, packed.batch_sizes)
    module = fastseq.GRU(3, 5)
    assert torch.equal(module(bare)[0].data, module(packed)[0].data)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_packed_sequence_with_steps_of_no_rows_at_its_end(mode, bidirectional):
    """torch.nn takes it; the reverse direction then starts where there is nothing."""
    case = Case(mode, torch.float64, batch=2, num_layers=2, bidirectional=bidirectional)
    x, states = torch.randn(5, case.input_size, dtype=case.dtype), states_of(make_data(case))

    def run(library, sizes):
        module, data = make_module(case, library), x.clone().requires_grad_()
        packed, hidden = module(PackedSequence(data, torch.tensor(sizes)), states)
        assert packed.batch_sizes.tolist() == sizes
        leaves = {"input": data, **dict(module.named_parameters())}
        return with_gradients(named_outputs(packed.data, hidden), leaves, case.dtype)

    ours = run(fastseq, [2, 2, 1, 0, 0])
    assert_same_bits(ours, run(fastseq, [2, 2, 1]))
    if mode in TORCH_MODES:
        torch.testing.assert_close(ours, run(nn, [2, 2, 1, 0, 0]), **SAME_FLOAT64)


@pytest.mark.parametrize("mode", MODES)
def test_functional_forms_are_the_modules(mode):
    case = Case(mode, num_layers=2, bidirectional=True, batch_first=True, batch=4)
    module, data = make_module(case), make_data(case)
    function = getattr(fastseq.functional, module_class(fastseq, mode)[0].__name__.lower())
    keywords = module_class(fastseq, mode)[1] | {"bidirectional": True, "batch_first": True}
    output, hidden = function(data["input"], module.all_weights, states_of(data), **keywords)
    expected, state = module(data["input"], states_of(data))
    assert torch.equal(output, expected)
    for a, b in zip(hidden, state, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_functional_cells_are_the_cells(mode, bias):
    cls, keywords = cell_class(fastseq, mode)
    cell, x = cls(3, 5, bias=bias, **keywords), torch.randn(2, 3)
    function = getattr(fastseq.functional, cls.__name__.replace("Cell", "_cell").lower())
    weights = [cell.weight_ih, cell.weight_hh] + ([cell.bias_ih, cell.bias_hh] if bias else [])
    ours, expected = function(x, None, *weights, **keywords), cell(x)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def test_modules_are_instances_of_torchs_base_classes():
    assert isinstance(fastseq.LSTM(2, 3), nn.RNNBase)
    assert isinstance(fastseq.LSTMCell(2, 3), nn.RNNCellBase)
