"""What fastseq.convert and revert leave, and say so; and torch's transformers around what they change."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import fastseq
from fastseq import ops
from tolerances import SAME_FLOAT64

pytestmark = pytest.mark.usefixtures("one_thread")


class WithForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class WithoutForward(nn.GRU):
    pass


def replaced_forward():
    module = nn.GRU(3, 5)
    module.forward = lambda x: (x, None)
    return module


def uninitialised():
    module = nn.GRU(3, 5)
    module.weight_ih_l0 = nn.UninitializedParameter()
    return module


def managed_by_fully_shard():
    """As torch.distributed.fsdp.fully_shard does it."""
    module = nn.LSTM(3, 5)
    module.__class__ = type("FSDPLSTM", (FSDPModule, nn.LSTM), {})
    return module


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 5)), {nn.LSTM})[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Complex modules")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: WithForward(3, 5), "a subclass of torch.nn.LSTM with a forward of its own"),
        (lambda: WithoutForward(3, 5), "a subclass of torch.nn.GRU: derive it from fastseq.GRU"),
        (replaced_forward, "its forward was replaced on the object"),
        (uninitialised, "not initialised yet"),
        (lambda: fastseq.LSTM(3, 5), "fastseq's already"),
        (lambda: torch.jit.script(nn.GRU(3, 5)), "scripted: convert before"),
        (quantized, "quantized, for which there is no kernel"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(4, 2), "quantized, for which there is no kernel"),
        (managed_by_fully_shard, "managed by fully_shard: convert before it"),
        (lambda: nn.GRU(3, 5).to(torch.complex64), "a parameter of dtype torch.complex64"),
    ],
    ids=[
        "forward",
        "subclass",
        "object",
        "lazy",
        "ours",
        "scripted",
        "quantized",
        "quantizable",
        "fsdp",
        "dtype",
    ],
)
def test_what_cannot_be_converted_is_left_with_the_reason(make, reason):
    model = nn.Sequential(nn.Linear(3, 3), make(), nn.GRUCell(3, 5))
    module, cls, before = model[1], type(model[1]), dict(vars(model[1]))
    report = fastseq.convert(model)
    assert [change.name for change in report.changed] == ["2"], "the rest is converted"
    (left,) = report.left
    assert left.name == "1"
    assert left.new == ""
    assert reason in left.reason
    assert f"left:\n  1: {left.old}, {left.reason}" in str(report)
    assert type(module) is cls
    assert dict(vars(module)) == before


def test_devices_without_kernels_are_left(monkeypatch):
    module = nn.GRU(3, 5)
    monkeypatch.delitem(ops.KERNELS, "cpu")
    (left,) = fastseq.convert(module).left
    assert "on cpu, where there is no kernel" in left.reason


def test_meta_modules_are_converted_and_can_be_materialised():
    model = nn.Sequential(nn.GRU(3, 5, device="meta"))
    assert fastseq.convert(model).changed
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    assert model[0](torch.ones(2, 1, 3))[0].isfinite().all()


def test_other_modules_are_not_mentioned():
    report = fastseq.convert(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    assert not report.changed
    assert not report.left
    assert str(report) == "nothing to change"


def test_revert_leaves_what_convert_did_not_make():
    model = nn.Sequential(
        fastseq.LSTM(3, 5), nn.GRU(5, 5), WithForward(5, 5), fastseq.MultiheadAttention(4, 2)
    )
    fastseq.convert(model)
    report = fastseq.revert(model)
    assert [change.name for change in report.changed] == ["1"]
    assert [(left.name, left.reason) for left in report.left] == [
        ("0", "it was not made by convert()"),
        ("3", "it was not made by convert()"),
    ]


def test_revert_leaves_what_torch_could_not_compute():
    model = nn.Sequential(nn.GRUCell(3, 5), nn.LSTM(3, 5))
    fastseq.convert(model)
    model[0].reset_after = False
    model[1].forward = lambda x: x
    report = fastseq.revert(model)
    assert not report.changed
    reasons = [left.reason for left in report.left]
    assert reasons[0] == "reset_after=False, which torch.nn.GRUCell does not have"
    assert "its forward was replaced on the object" in reasons[1]
    model[0].reset_after = True
    del model[1].forward
    assert len(fastseq.revert(model).changed) == 2


@pytest.mark.parametrize("function", [fastseq.convert, fastseq.revert], ids=lambda f: f.__name__)
def test_only_modules_are_taken(function):
    with pytest.raises(TypeError, match="given: model of type list") as error:
        function([nn.GRU(3, 5)])
    assert len(str(error.value).splitlines()) == 3


# -------------------------------------------------------------------------------------- torch's transformers


def pair(make):
    torch.manual_seed(4)
    torchs = make().double()
    ours = copy.deepcopy(torchs)
    fastseq.convert(ours)
    return ours, torchs


def attention_calls(function):
    return sum(call.mode == "ATTENTION" for call in fastseq.explain(function))


E = 12
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]) > 0
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal and padding"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_converted_transformer_encoder_computes_the_same(masks, training, norm_first):
    """In inference too, where torch's layer takes the parameters out of self_attn and, of padded batches,
    makes nested tensors."""

    def make():
        layer = nn.TransformerEncoderLayer(E, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2)

    ours, torchs = (model.train(training) for model in pair(make))
    x = torch.randn(3, 5, E).double()
    arguments = {"src_key_padding_mask": PADDING} if "padding" in masks else {}
    if "causal" in masks:
        arguments |= {"mask": CAUSAL, "is_causal": True}
    seen = ~PADDING if "padding" in masks else torch.ones_like(PADDING)
    with torch.set_grad_enabled(training):
        outputs = [model(x, **arguments) for model in (ours, torchs)]
        assert attention_calls(lambda: ours(x, **arguments)) == 2, "each layer calls the module"
    torch.testing.assert_close(outputs[0][seen], outputs[1][seen], **SAME_FLOAT64)
    if training:
        gradients = [
            torch.autograd.grad(output[seen].sin().sum(), list(model.parameters()))
            for output, model in zip(outputs, (ours, torchs), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_converted_transformer_computes_the_same_and_goes_back(training, batch_first):
    def make():
        return nn.Transformer(E, 2, 1, 2, 16, 0.0, batch_first=batch_first)

    ours, torchs = (model.train(training) for model in pair(make))
    source, target = torch.randn(3, 5, E).double(), torch.randn(3, 4, E).double()
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        "tgt_is_causal": True,
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
    }
    with torch.set_grad_enabled(training):
        expected = torchs(source, target, **masks)
        torch.testing.assert_close(ours(source, target, **masks), expected, **SAME_FLOAT64)
        assert attention_calls(lambda: ours(source, target, **masks)) == 5
        fastseq.revert(ours)
        assert torch.equal(ours(source, target, **masks), expected), "as before, the fast path included"


def test_nested_input_of_a_converted_encoder_layer():
    def make():
        return nn.TransformerEncoderLayer(E, 2, 16, 0.0, batch_first=True)

    ours, torchs = (model.eval() for model in pair(make))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(n, E).double() for n in (5, 2, 3)])
        a, b = ours(x), torchs(x)
    for one, other in zip(a.unbind(), b.unbind(), strict=True):
        torch.testing.assert_close(one, other, **SAME_FLOAT64)
