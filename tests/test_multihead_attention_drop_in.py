"""fastseq.MultiheadAttention in the place of torch.nn's: construction, persistence, layers, bad input."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import fastseq
from fastseq.modules import attention
from harness import as_leaves, assert_same_bits, same_bits, with_gradients
from multihead import EMBED, MASKS, OPTIONS, Case, call, make, make_data
from tolerances import SAME_FLOAT64


@pytest.mark.parametrize("options", OPTIONS)
def test_constructor_initial_values_and_repr_are_torchs(options):
    arguments = {"num_heads": 3, **OPTIONS[options], "dropout": 0.25, "dtype": torch.float64}
    modules, after = [], []
    for library in (fastseq, nn):
        torch.manual_seed(3)
        modules.append(library.MultiheadAttention(EMBED, **arguments))
        after.append(torch.rand(1))
    ours, torchs = modules
    assert isinstance(ours, nn.MultiheadAttention)
    assert repr(ours) == repr(torchs)
    assert torch.equal(*after), "as many random numbers are drawn"
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for name, parameter in torchs.state_dict().items():
        assert same_bits(ours.state_dict()[name], parameter), name
    known = ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn")
    for name in (*known, "_qkv_same_embed_dim", "training"):
        assert getattr(ours, name) == getattr(torchs, name), name


def test_constructor_takes_torchs_positions_and_devices():
    arguments = (EMBED, 3, 0.5, False, True, True, 5, 7, True, "meta", torch.bfloat16)
    ours, torchs = fastseq.MultiheadAttention(*arguments), nn.MultiheadAttention(*arguments)
    for (name, a), (other, b) in zip(ours.named_parameters(), torchs.named_parameters(), strict=True):
        assert (name, a.shape, a.dtype, a.device) == (other, b.shape, b.dtype, b.device)
    assert ours.batch_first
    assert ours.dropout == 0.5


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_goes_both_ways(options):
    case = Case(OPTIONS[options], "cross", dtype=torch.float64)
    ours, torchs, data = make(case, seed=1), make(case, nn, seed=2), make_data(case)
    before = call(case, torchs, data)["output"]
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(call(case, ours, data)["output"], before, **SAME_FLOAT64)
    torchs = make(case, nn, seed=3)
    torchs.load_state_dict(ours.state_dict())
    assert torch.equal(call(case, torchs, data)["output"], before)


def test_copies_and_pickles_are_equal_and_independent():
    module, x = make(Case(OPTIONS["bias_kv"])), torch.randn(5, 2, EMBED)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    pickled = pickle.loads(pickle.dumps(module))
    for twin in (copy.deepcopy(module), pickled, torch.load(file, weights_only=False)):
        assert type(twin) is fastseq.MultiheadAttention
        assert_same_bits(*({"output": m(x, x, x)[0].detach()} for m in (twin, module)))
        assert len(twin._forward_pre_hooks) == 1, "torch's layers still see that it must be called"
        with torch.no_grad():
            twin.in_proj_weight.zero_()
        assert module.in_proj_weight.any()


def counted(monkeypatch):
    """A list that grows by a call's query with every call of the attention function by the module."""
    calls, function = [], attention.scaled_dot_product_attention

    def count(query, *arguments, **keywords):
        calls.append(query)
        return function(query, *arguments, **keywords)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", count)
    return calls


def with_fastseq(model: nn.Module) -> nn.Module:
    """A copy with each torch.nn.MultiheadAttention replaced."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.MultiheadAttention:
                ours = fastseq.MultiheadAttention(
                    child.embed_dim,
                    child.num_heads,
                    child.dropout,
                    child.in_proj_bias is not None,
                    batch_first=child.batch_first,
                    dtype=child.out_proj.weight.dtype,
                )
                ours.load_state_dict(child.state_dict())
                setattr(module, name, ours.train(child.training))
    return model


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal and padding"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_transformer_encoder_runs_it(monkeypatch, training, masks, batch_first):
    """In inference too, where torch's layer bypasses its own attention, and makes padded batches nested."""
    layer = nn.TransformerEncoderLayer(EMBED, 2, 16, 0.0, batch_first=batch_first, dtype=torch.float64)
    torchs = nn.TransformerEncoder(layer, num_layers=2).train(training)
    ours = with_fastseq(torchs)
    x = torch.randn((3, 5, EMBED) if batch_first else (5, 3, EMBED), dtype=torch.float64)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]) > 0
    arguments = {"src_key_padding_mask": padding} if "padding" in masks else {}
    if "causal" in masks:
        arguments["mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    seen = ~padding if "padding" in masks else torch.ones_like(padding)
    seen = seen if batch_first else seen.t()
    calls = counted(monkeypatch)
    with torch.set_grad_enabled(training):
        outputs = [model(x, **arguments) for model in (ours, torchs)]
    assert len(calls) == 2, "each layer calls the module once"
    torch.testing.assert_close(outputs[0][seen], outputs[1][seen], **SAME_FLOAT64)
    if training:
        gradients = [
            torch.autograd.grad(output[seen].square().sum(), list(model.parameters()))
            for output, model in zip(outputs, (ours, torchs), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_transformer_with_decoder_runs_it(monkeypatch, training):
    sizes = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    torchs = nn.Transformer(EMBED, 2, num_encoder_layers=1, num_decoder_layers=2, **sizes).train(training)
    ours, calls = with_fastseq(torchs), counted(monkeypatch)
    source, target = torch.randn(3, 6, EMBED).double(), torch.randn(3, 4, EMBED).double()
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.rand(3, 6) < 0.3,
    }
    with torch.set_grad_enabled(training):
        outputs = [model(source, target, **masks) for model in (ours, torchs)]
    assert len(calls) == 1 + 2 * 2
    torch.testing.assert_close(*outputs, **SAME_FLOAT64)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("options", ["plain", "zero_attn", "kdim and vdim"])
def test_nested_tensors_are_as_many_sequences(layout, options):
    case = Case(OPTIONS[options], dtype=torch.float64, batch_first=True)
    module, lengths = make(case), (5, 1, 3)
    inputs = [[torch.randn(n, size).double() for n in lengths] for size in (EMBED, module.kdim, module.vdim)]
    leaves = [[x.requires_grad_() for x in sequences] for sequences in inputs]
    nested = [torch.nested.as_nested_tensor(sequences, layout=layout) for sequences in leaves]
    if options != "kdim and vdim":
        nested, leaves = [nested[0]] * 3, [leaves[0]] * 3
    output, weights = module(*nested, need_weights=False)
    assert weights is None
    assert output.layout == layout
    alone = [module(*one, need_weights=False)[0] for one in zip(*leaves, strict=True)]
    wanted = [*module.parameters(), *leaves[0]]
    sums = [sum(x.sin().sum() for x in outputs) for outputs in (output.unbind(), alone)]
    for a, b in zip(output.unbind(), alone, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)
    for a, b in zip(*(torch.autograd.grad(x, wanted) for x in sums), strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_nested_tensors_are_not_combined_with_what_torch_does_not_combine():
    module = make(Case(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(2, EMBED), torch.randn(3, EMBED)], layout=torch.jagged)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for keywords in ({}, {"need_weights": False, "key_padding_mask": mask}):
        with pytest.raises(AssertionError, match="given: a nested tensor beside") as error:
            module(x, x, x, **keywords)
        assert len(str(error.value).splitlines()) == 3


def test_parameters_are_read_by_name_at_every_call():
    case = Case(dtype=torch.float64)
    module, x = make(case), torch.randn(5, 2, EMBED).double()
    plain = module(x, x, x)[0]
    doubled = {name: 2 * p for name, p in module.named_parameters()}
    other = functional_call(module, doubled, (x, x, x))[0]
    loaded = make(case)
    loaded.load_state_dict(doubled)
    assert torch.equal(other, loaded(x, x, x)[0])
    parametrizations.weight_norm(module, "in_proj_weight")
    parametrizations.weight_norm(module.out_proj, "weight")
    torch.testing.assert_close(module(x, x, x)[0], plain, **SAME_FLOAT64)
    with torch.no_grad():
        module.parametrizations.in_proj_weight.original0.mul_(2)
    assert not torch.allclose(module(x, x, x)[0], plain)


@pytest.mark.parametrize("options", ["plain", "bias_kv and zero_attn", "kdim and vdim"])
def test_torch_compile_sees_one_graph(options):
    case = Case(OPTIONS[options], "cross", MASKS["padding and 2-D"], torch.float64)
    module, data = make(case), make_data(case)

    def outputs(data):
        return call(case, module, data)

    results = []
    for function in (outputs, torch.compile(outputs, fullgraph=True, backend="aot_eager")):
        leaves = as_leaves(data)
        results.append(
            with_gradients(function(leaves), {**leaves, **dict(module.named_parameters())}, case.dtype)
        )
    for name, eager in results[0].items():
        torch.testing.assert_close(results[1][name], eager, **SAME_FLOAT64)


def test_meta_tensors_get_the_shapes_of_real_ones():
    for options in OPTIONS.values():
        case = Case(options, "separate", MASKS["padding and 2-D"])
        module, data = make(case), make_data(case)
        real = call(case, module, data)
        meta = call(case, module.to("meta"), {name: x.to("meta") for name, x in data.items()})
        assert {name: x.shape for name, x in meta.items()} == {name: x.shape for name, x in real.items()}


X = torch.randn(5, 2, EMBED)  # (L, B, E)
BAD = {
    "query of rank 1": lambda m: m(X[0, 0], X, X),
    "query of rank 4": lambda m: m(X[None], X, X),
    "key of another rank": lambda m: m(X, X[0], X),
    "value of another rank": lambda m: m(X[:, 0], X[:, 0], X),
    "query of other features": lambda m: m(X[..., :5], X, X),
    "key of other features": lambda m: m(X, X[..., :5], X),
    "key and value of other features": lambda m: m(X, X[..., :5], X[..., :5]),
    "value of another length": lambda m: m(X, X, X[:4]),
    "key of another batch": lambda m: m(X, X[:, :1], X[:, :1]),
    "padding of rank 1": lambda m: m(X, X, X, torch.zeros(5) > 0),
    "padding of rank 2, unbatched": lambda m: m(X[:, 0], X[:, 0], X[:, 0], torch.zeros(1, 5) > 0),
    "padding of another batch": lambda m: m(X, X, X, torch.zeros(3, 5) > 0),
    "padding of another length": lambda m: m(X, X, X, torch.zeros(2, 4) > 0),
    "padding of integers": lambda m: m(X, X, X, torch.zeros(2, 5, dtype=torch.int64)),
    "mask of rank 1": lambda m: m(X, X, X, attn_mask=torch.zeros(5)),
    "mask of rank 4": lambda m: m(X, X, X, attn_mask=torch.zeros(1, 1, 5, 5)),
    "mask of another length": lambda m: m(X, X, X, attn_mask=torch.zeros(5, 4)),
    "mask of another batch": lambda m: m(X, X, X, attn_mask=torch.zeros(2, 5, 5)),
    "mask of integers": lambda m: m(X, X, X, attn_mask=torch.zeros(5, 5, dtype=torch.int64)),
}


@pytest.mark.parametrize("sizes", [{}, {"kdim": EMBED, "vdim": EMBED + 1}], ids=["plain", "vdim"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_rejected_as_torch_rejects_it_in_three_lines(bad, sizes):
    errors = []
    for library in (nn, fastseq):
        module = library.MultiheadAttention(EMBED, 3, **sizes)
        with pytest.raises((AssertionError, RuntimeError)) as error:
            BAD[bad](module)
        errors.append(error.value)
    assert type(errors[1]) is type(errors[0]), f"torch says {errors[0]}"
    if not sizes:
        given, accepted, remedy = str(errors[1]).splitlines()
        assert (given[:7], accepted[:10], remedy[:5]) == ("given: ", "accepted: ", "try: ")


@pytest.mark.parametrize("arguments", [(0, 1), (12, 0), (12, 5)], ids=str)
def test_constructor_rejects_what_torchs_rejects(arguments):
    with pytest.raises((ValueError, AssertionError)) as torchs:
        nn.MultiheadAttention(*arguments)
    with pytest.raises(torchs.type):
        fastseq.MultiheadAttention(*arguments)
