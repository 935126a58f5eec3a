"""Under torch.set_default_device all that is made on the way lies where the arguments lie: the same bits."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fastseq
from devices import HOPPER
from harness import same_bits

SIZES = STEPS, BATCH, FEATURES = 6, 3, 4
LENGTHS = torch.tensor([6, 0, 4])
BATCH_SIZES = torch.tensor([3, 2, 2, 2, 1, 1])
ORDER = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
MODULES = ("RNN", "LSTM", "GRU")
KINDS = ("padded", "lengths", "packed", "packed unsorted")


def tensors_in(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for result in results if result is not None for x in tensors_in(result)]


def with_gradients(call, *leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = [x for x in tensors_in(call(*leaves)) if x.is_floating_point()]
    return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)]


def assert_default_device_changes_nothing(call):
    """call() of tensors on the CPU, beside a default device where nothing can be read."""
    results = []
    for default in (None, "meta"):
        torch.manual_seed(1)
        torch.set_default_device(default)
        try:
            results.append(call())
        finally:
            torch.set_default_device(None)
    for a, b in zip(*results, strict=True):
        assert a.device == b.device
        assert same_bits(a, b)


def network(name, where="cpu", memory="fast"):
    options = {"grad_clip": 0.1, "truncate": 4, "memory": memory}
    torch.manual_seed(2)
    module = getattr(fastseq, name)(FEATURES, 21, 2, bidirectional=True, dropout=0.5, **options)
    return module.to(where)


def run(module, x, kind):
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool, device=x.device)
    resets[3] = True
    if kind == "padded":
        return module(x, resets=resets)
    if kind == "lengths":
        return module(x, lengths=LENGTHS, resets=resets)
    order = [i.to(x.device) for i in ORDER] if kind == "packed unsorted" else []
    sequence = PackedSequence(x.flatten(0, 1)[: BATCH_SIZES.sum()], BATCH_SIZES, *order)
    output, hidden = module(sequence, resets=resets)
    return output.data, hidden


@pytest.mark.parametrize("memory", ["fast", "recompute", "checkpoint:2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODULES)
def test_layers_with_every_option(name, kind, memory):
    module, x = network(name, memory=memory), torch.randn(SIZES)
    assert_default_device_changes_nothing(lambda: with_gradients(lambda x: run(module, x, kind), x))


@pytest.mark.parametrize("plan", ["cluster:2x1:sums", "steps"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_the_kernels_for_cuda(device, plan, kind):
    module, x = network("LSTM", device.where), torch.randn(SIZES).to(device.where)
    with device.using(plan, HOPPER):
        assert_default_device_changes_nothing(lambda: with_gradients(lambda x: run(module, x, kind), x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODULES)
def test_second_derivatives_and_forward_mode_of_layers(name, kind):
    module, x, t = network(name), torch.randn(SIZES), torch.randn(SIZES)
    module.grad_clip = None

    def call(x):
        return tensors_in(run(module, x, kind))[0]

    def gradient(x):
        return torch.autograd.grad(call(x).square().sum(), x, create_graph=True)

    assert_default_device_changes_nothing(lambda: with_gradients(gradient, x))
    assert_default_device_changes_nothing(lambda: torch.func.jvp(call, (x,), (t,)))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name):
    cell, x = getattr(fastseq, name)(FEATURES, 5), torch.randn(BATCH, FEATURES)
    assert_default_device_changes_nothing(lambda: with_gradients(cell, x))


MASK = torch.rand(9, 9) < 0.7
ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (3, 1)},
    "boolean mask": {"attn_mask": MASK},
    "additive mask": {"attn_mask": torch.randn(4, 9, 9)},
    "dropout": {"dropout_p": 0.3},
    "all dropped": {"dropout_p": 1.0},
    "lengths": {"key_lengths": torch.tensor([9, 4])},
    "causal lengths": {"key_lengths": torch.tensor([9, 4]), "causal": "bottom_right"},
    "slopes and sinks": {"alibi_slopes": torch.rand(4), "sinks": torch.randn(4)},
    "weights": {"return_weights": True},
    "log-sum-exps": {"return_lse": True},
}


@pytest.mark.parametrize("what", ATTENTION)
def test_attention_with_every_option(what):
    qkv, options = [torch.randn(2, 4, 9, 8) for _ in range(3)], ATTENTION[what]

    def call(*qkv):
        return fastseq.scaled_dot_product_attention(*qkv, **options)

    def gradients(*qkv):
        outputs = tensors_in(call(*qkv))
        return torch.autograd.grad(sum(x.square().sum() for x in outputs), qkv, create_graph=True)

    assert_default_device_changes_nothing(lambda: with_gradients(call, *qkv))
    if what != "all dropped":
        assert_default_device_changes_nothing(lambda: with_gradients(gradients, *qkv))
    if "dropout" not in what:
        tangents = tuple(torch.randn_like(x) for x in qkv)
        assert_default_device_changes_nothing(lambda: tensors_in(torch.func.jvp(call, tuple(qkv), tangents)))


def test_packed_attention():
    qkv, ends = [torch.randn(9, 4, 8) for _ in range(3)], torch.tensor([0, 5, 9])
    assert_default_device_changes_nothing(
        lambda: with_gradients(
            lambda *qkv: fastseq.scaled_dot_product_attention(
                *qkv, is_causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends
            ),
            *qkv,
        )
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    module, x = fastseq.MultiheadAttention(8, 2, dropout=0.2), torch.randn(5, 3, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    options = {"key_padding_mask": padding, "need_weights": need_weights}
    assert_default_device_changes_nothing(lambda: with_gradients(lambda x: module(x, x, x, **options), x))


def test_convert_and_revert_of_a_model_on_the_cpu():
    """Parameters stay where they are, and what the model makes of its input is that of a model as usual."""
    model = nn.ModuleList([nn.LSTM(4, 5), nn.GRUCell(4, 5), nn.MultiheadAttention(4, 2)])
    x = torch.randn(SIZES)

    def call():
        assert len(fastseq.convert(model).changed) == 3
        lstm, cell, attention = model
        results = [*tensors_in(lstm(x)), cell(x[0]), *tensors_in(attention(x, x, x))]
        fastseq.revert(model)
        assert type(lstm) is nn.LSTM
        return [*results, *tensors_in(lstm(x)), *model.parameters()]

    assert_default_device_changes_nothing(call)


def test_modules_are_made_on_the_default_device():
    """As torch.nn's are."""
    with torch.device("meta"):
        modules = [getattr(fastseq, name)(4, 5) for name in (*MODULES, "LSTMCell")]
    assert all(p.is_meta for module in modules for p in module.parameters())
