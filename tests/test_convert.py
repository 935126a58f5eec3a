"""fastseq.convert and revert: what a model holds, and what holds it, goes on working."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastseq
from tolerances import SAME_FLOAT64, TRAINING_CURVE

pytestmark = pytest.mark.usefixtures("one_thread")

TORCHS = {
    "rnn": lambda: nn.RNN(6, 6, 2, "relu", bidirectional=True, batch_first=True),
    "lstm": lambda: nn.LSTM(6, 8, 2, proj_size=3, bidirectional=True, batch_first=True, bias=False),
    "gru": lambda: nn.GRU(6, 6, batch_first=True),
    "rnn_cell": lambda: nn.RNNCell(6, 6, nonlinearity="relu"),
    "lstm_cell": lambda: nn.LSTMCell(6, 6),
    "gru_cell": lambda: nn.GRUCell(6, 6, bias=False),
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True),
}


class Model(nn.Module):
    """One of each."""

    def __init__(self):
        super().__init__()
        for name, make in TORCHS.items():
            setattr(self, name, make())
        self.double()

    def forward(self, x):
        x = x + self.rnn(x)[0].unflatten(-1, (2, 6)).sum(-2)
        x = x + self.lstm(x)[0]
        x = x + self.gru(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        step = x[:, 0] + self.rnn_cell(x[:, 1]) + self.lstm_cell(x[:, 2])[0] + self.gru_cell(x[:, 3])
        return x, step


X = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss_of(model):
    output, step = model(X)
    return output.sin().sum() + step.square().sum()


def results(model):
    loss = loss_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **SAME_FLOAT64)


def calls_of(function):
    return {call.mode for call in fastseq.explain(function)}


def test_every_module_is_converted_and_computes_the_same():
    model = Model()
    expected = results(model)
    identities = {name: id(p) for name, p in model.named_parameters()}
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    report = fastseq.convert(model)
    assert [change.name for change in report.changed] == list(TORCHS)
    assert not report.left
    for name in TORCHS:
        module = getattr(model, name)
        assert module is modules[name], "the same object"
        assert type(module).__module__.startswith("fastseq.")
    assert dict(model.named_modules()) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == keys
    assert_same(results(model), expected)
    assert calls_of(lambda: model(X)) == {"RNN_RELU", "LSTM", "GRU", "ATTENTION"}


@pytest.mark.parametrize("name", TORCHS)
def test_converted_module_has_what_a_new_one_has(name):
    """And nothing but the record beside: no second list of the weights, which would keep replaced ones."""
    module = TORCHS[name]()
    ours = type(module)
    fastseq.convert(module)
    ours = getattr(fastseq, ours.__name__)
    fresh = {
        "rnn": lambda: ours(6, 6, 2, "relu", bidirectional=True, batch_first=True),
        "lstm": lambda: ours(6, 8, 2, proj_size=3, bidirectional=True, batch_first=True, bias=False),
        "gru": lambda: ours(6, 6, batch_first=True),
        "rnn_cell": lambda: ours(6, 6, nonlinearity="relu"),
        "lstm_cell": lambda: ours(6, 6),
        "gru_cell": lambda: ours(6, 6, bias=False),
        "attention": lambda: ours(6, 2, batch_first=True, add_bias_kv=True),
    }[name]()
    assert type(module) is ours
    assert repr(module) == repr(fresh)
    missing, more = vars(fresh).keys() - vars(module).keys(), vars(module).keys() - vars(fresh).keys()
    assert missing <= {"_flat_weight_refs"}
    assert more == {"_converted_by_fastseq"}
    assert len(module._forward_pre_hooks) == len(fresh._forward_pre_hooks)


@pytest.mark.parametrize("name", TORCHS)
def test_revert_undoes_exactly(name):
    module = TORCHS[name]()
    module.mine = [1]
    before, cls = dict(vars(module)), type(module)
    fastseq.convert(module)
    report = fastseq.revert(module)
    assert [change.new for change in report.changed] == [f"torch.nn.{cls.__name__}"]
    assert type(module) is cls
    after = dict(vars(module))
    flat, refs = after.pop("_flat_weights", None), after.pop("_flat_weight_refs", None)
    if "_flat_weights" in before:
        assert all(a is b for a, b in zip(flat, before.pop("_flat_weights"), strict=True))
        assert [ref() for ref in refs] == [ref() for ref in before.pop("_flat_weight_refs")]
    assert after == before
    pickle.dumps(module)


def test_model_goes_back_and_forth():
    model = Model()
    expected = results(model)
    for _ in range(2):
        fastseq.convert(model)
        fastseq.revert(model)
        assert_same(results(model), expected)
    assert not calls_of(lambda: model(X))


def test_the_root_may_be_such_a_module():
    module = nn.GRU(3, 5)
    expected = module(torch.ones(2, 1, 3))[0]
    report = fastseq.convert(module)
    assert str(report) == "changed:\n  the model itself: torch.nn.GRU -> fastseq.GRU"
    assert type(module) is fastseq.GRU
    torch.testing.assert_close(module(torch.ones(2, 1, 3))[0], expected)


def test_convert_twice_is_harmless():
    model = Model()
    fastseq.convert(model)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    report = fastseq.convert(model)
    assert not report.changed
    assert {module.reason for module in report.left} == {"fastseq's already"}
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    assert len(fastseq.revert(model).changed) == len(TORCHS)


def test_no_random_number_is_drawn():
    model = Model()
    state = torch.get_rng_state()
    fastseq.convert(model)
    fastseq.revert(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_optimizer_with_its_state_goes_on():
    """Converted and reverted in the middle of a training, which takes the same course."""
    curves = []
    for change_at in ((), (2, 5)):
        torch.manual_seed(2)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        curve = []
        for step in range(8):
            if step in change_at:
                (fastseq.convert if step == change_at[0] else fastseq.revert)(model)
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(*curves, **TRAINING_CURVE)
    assert curves[0][-1] < curves[0][0]


def test_hooks_of_every_kind_run():
    model, calls = Model(), []
    module = model.gru
    module.register_forward_pre_hook(lambda *_: calls.append("forward_pre"))
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_pre_hook(lambda *_: calls.append("backward_pre"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre"))
    module.register_state_dict_post_hook(lambda *_: calls.append("state_dict_post"))
    module.register_load_state_dict_pre_hook(lambda *_: calls.append("load_pre"))
    module.register_load_state_dict_post_hook(lambda *_: calls.append("load_post"))
    module.weight_hh_l0.register_hook(lambda grad: calls.append("of parameter"))
    handle = model.attention.register_forward_pre_hook(lambda *_: calls.append("attention"))
    fastseq.convert(model)
    model.load_state_dict(model.state_dict())
    loss_of(model).backward()
    of_gru = [call for call in calls if call != "attention"]
    assert sorted(of_gru) == sorted(
        ["forward_pre", "forward", "backward_pre", "backward", "state_dict_pre", "state_dict_post"]
        + ["load_pre", "load_post", "of parameter"]
    )
    assert "attention" in calls
    handle.remove()
    fastseq.revert(model)
    assert not model.attention._forward_pre_hooks
    assert len(module._forward_pre_hooks) == 1


def test_tied_weights_and_modules_at_two_places():
    model = nn.ModuleDict({"a": nn.GRU(5, 5), "b": nn.GRU(5, 5)}).double()
    model["c"] = model["a"]
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    x = torch.randn(4, 2, 5).double()

    def gradients():
        output = model["c"](model["b"](model["a"](x)[0])[0])[0]
        return torch.autograd.grad(output.sin().sum(), list(model.parameters()))

    expected, elsewhere = gradients(), [model["a"]]
    report = fastseq.convert(model)
    assert [(change.name, change.others) for change in report.changed] == [("a", ("c",)), ("b", ())]
    assert "a, c: torch.nn.GRU -> fastseq.GRU" in str(report)
    assert model["c"] is model["a"] is elsewhere[0]
    assert model["b"].weight_hh_l0 is model["a"].weight_hh_l0
    assert_same(gradients(), expected)


def test_training_flag_requires_grad_dtype_and_attributes_stay():
    model = Model()
    model.gru.eval()
    model.lstm.bfloat16()
    model.gru.weight_hh_l0.requires_grad_(False)
    model.rnn.register_buffer("mine", torch.ones(2))
    model.rnn.word = "kept"
    fastseq.convert(model)
    assert not model.gru.training
    assert model.lstm.training
    assert model.lstm.weight_hh_l0.dtype == torch.bfloat16
    assert not model.gru.weight_hh_l0.requires_grad
    assert model.gru.weight_ih_l0.requires_grad
    assert model.rnn.word == "kept"
    assert "rnn.mine" in model.state_dict()


def test_checkpoints_go_between_both():
    theirs, ours = Model(), Model()
    fastseq.convert(ours)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True))
    assert_same(results(ours), results(theirs))
    theirs.load_state_dict(ours.state_dict())


def test_copies_and_pickles_are_converted_and_can_be_reverted():
    model = Model()
    fastseq.convert(model)
    expected = results(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.lstm) is fastseq.LSTM
        assert_same(results(twin), expected)
        assert len(fastseq.revert(twin).changed) == len(TORCHS)
        assert type(twin.lstm) is nn.LSTM
        assert_same(results(twin), expected)
    assert type(model.lstm) is fastseq.LSTM


def test_replaced_parameter_is_used_and_the_old_one_is_freed():
    module, x = nn.LSTM(3, 5), torch.randn(2, 1, 3)
    fastseq.convert(module)
    old = weakref.ref(module.weight_hh_l0)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(20, 5))
    assert old() is None
    output = module(x)[0]
    fastseq.revert(module)
    torch.testing.assert_close(module(x)[0], output)


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights(parametrization):
    model = Model()
    for module, name in ((model.gru, "weight_hh_l0"), (model.lstm_cell, "weight_ih")):
        getattr(parametrizations, parametrization)(module, name)
    parametrizations.weight_norm(model.attention, "in_proj_weight")
    model.eval()
    expected = results(model)
    report = fastseq.convert(model)
    assert "gru: torch.nn.GRU -> fastseq.GRU" in str(report)
    assert isinstance(model.gru, fastseq.GRU)
    assert_same(results(model), expected)
    assert_same(results(copy.deepcopy(model)), expected)
    parametrize.remove_parametrizations(model.lstm_cell, "weight_ih")
    assert type(model.lstm_cell) is fastseq.LSTMCell
    fastseq.revert(model)
    assert type(model.lstm_cell) is nn.LSTMCell
    assert isinstance(model.gru, nn.GRU)
    assert parametrize.is_parametrized(model.gru, "weight_hh_l0")
    torch.testing.assert_close(loss_of(model), expected[0], **SAME_FLOAT64)


def test_parametrized_after_conversion_can_be_reverted():
    module, x = nn.GRU(3, 5), torch.randn(2, 1, 3)
    fastseq.convert(module)
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
    expected = module(x)[0]
    assert fastseq.revert(module).changed
    assert isinstance(module, nn.GRU)
    torch.testing.assert_close(module(x)[0], expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "pruning"])
def test_weights_made_by_hooks_before_each_call(way):
    model = Model()
    if way == "pruning":
        prune.random_unstructured(model.gru, "weight_hh_l0", amount=0.5)
        prune.l1_unstructured(model.lstm_cell, "weight_ih", amount=3)
    else:
        getattr(nn.utils, way)(model.gru, "weight_hh_l0")
        getattr(nn.utils, way)(model.lstm_cell, "weight_ih")
    model.eval()
    model(X)
    expected = results(model)
    assert len(fastseq.convert(model).changed) == len(TORCHS)
    assert_same(results(model), expected)
    with torch.no_grad():
        for parameter in model.gru.parameters():
            parameter.mul_(0.5)
    loss = loss_of(model)
    assert not torch.allclose(loss, expected[0])
    fastseq.revert(model)
    torch.testing.assert_close(loss_of(model), loss, **SAME_FLOAT64)


def test_compiled_model_sees_the_change():
    """It was compiled, around what torch.compile refuses, before it was converted; after that, as a whole."""
    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    expected = [x.detach() for x in compiled(X)]
    fastseq.convert(model)
    with torch.no_grad():
        called = set()
        with torch.profiler.profile() as profile:
            assert_same(compiled(X), expected)
        called = {event.name for event in profile.events()}
    assert {"fastseq::recurrent", "fastseq::recurrent_cell", "fastseq::attention"} <= called
    torch._dynamo.reset()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(whole(X), expected)


def test_isinstance_is_that_of_the_bases():
    model = Model()
    fastseq.convert(model)
    assert isinstance(model.lstm, nn.modules.rnn.RNNBase)
    assert not isinstance(model.lstm, nn.LSTM)
    assert isinstance(model.gru_cell, nn.modules.rnn.RNNCellBase)
    assert isinstance(model.attention, nn.MultiheadAttention)


def test_data_parallel_wrapper_holds_a_converted_module():
    model = nn.DataParallel(nn.GRU(3, 5))
    assert [change.name for change in fastseq.convert(model).changed] == ["module"]
    assert model(torch.ones(2, 1, 3))[0].isfinite().all()
