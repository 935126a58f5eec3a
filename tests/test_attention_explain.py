"""fastseq.explain of attention: what ran, what was saved, why not faster, and what could be replaced."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastseq
from fastseq import _C, attention_ops
from fastseq.attention_checks import Attention
from harness import threads
from test_explain import counting

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 9, 11, 8, 6
SIZES = Attention(B, HQ, HKV, SQ, SK, D, DV)
PACKED = {"cu_seqlens_q": torch.tensor([0, 4, 10]), "cu_seqlens_k": torch.tensor([0, 5, 12])}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"causal": "bottom_right", "window": (3, None)},
    "a bool mask": {"attn_mask": torch.ones(SQ, SK, dtype=torch.bool)},
    "a float mask": {"attn_mask": torch.zeros(B, 1, 1, SK)},
    "dropout": {"dropout_p": 0.25},
    "softcap": {"softcap": 30.0},
    "slopes and sinks": {"alibi_slopes": torch.ones(HQ), "sinks": torch.zeros(HQ)},
    "lengths": {"key_lengths": torch.tensor([11, 3])},
    "all results": {"return_lse": True, "return_weights": True},
    "packed": PACKED,
}


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch):
    monkeypatch.delenv("FASTSEQ_ATTENTION_PLAN", raising=False)


def tensors(options, dtype=torch.float32, requires_grad=True):
    if "cu_seqlens_q" in options:
        shapes = [(10, HQ, D), (12, HKV, D), (12, HKV, DV)]
    else:
        shapes = [(B, HQ, SQ, D), (B, HKV, SK, D), (B, HKV, SK, DV)]
    return [torch.randn(*shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def call(options, *given, dtype=torch.float32, requires_grad=True):
    given = given or tensors(options, dtype, requires_grad)
    return fastseq.scaled_dot_product_attention(*given, enable_gqa=True, **options)


def explain(options, *given, **how):
    (one,) = fastseq.explain(call, options, *given, **how)
    return one


def cut(sizes, dtype, backward, keeps=False, *of_mask):
    code = _C.DTYPES[str(dtype).removeprefix("torch.")]
    return _C.attention_plan(code, torch.get_num_threads(), *sizes, backward, keeps, *of_mask)


# ---- what is reported is what there is ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", OPTIONS)
def test_a_call_is_reported_with_its_sizes_and_its_plan(what, dtype):
    one, packed = explain(OPTIONS[what], dtype=dtype), what == "packed"
    assert (one.operator, one.mode, one.weight) == ("attention", "ATTENTION", "")
    assert (one.dtype, one.device.type, one.packed) == (dtype, "cpu", packed)
    assert one.layer == (SIZES if not packed else SIZES._replace(queries=10, keys=12))
    planned = SIZES if not packed else SIZES._replace(queries=6, keys=7)  # of the longest
    for plan, backward in ((one.plan, False), (one.backward, True)):
        assert plan.architecture == _C.cpu_info()["isa"]
        assert {"kernel": plan.kernel, **plan.partition} == cut(planned, dtype, backward)


WORDS = {
    "plain": [],
    "causal": ["causal"],
    "window": ["window (3, 0) from the bottom right"],
    "a bool mask": ["attn_mask bool (1, 1, 9, 11)"],
    "a float mask": ["attn_mask float32 (2, 1, 1, 11)"],
    "dropout": ["dropout 0.25"],
    "softcap": ["softcap 30"],
    "slopes and sinks": ["alibi_slopes", "sinks"],
    "lengths": ["key_lengths"],
    "all results": [],
    "packed": ["packed"],
}


@pytest.mark.parametrize("what", OPTIONS)
def test_the_title_has_the_options(what):
    text = str(explain(OPTIONS[what]))
    title = " ".join(text.partition("\n  ")[0].split())
    sizes = "Sq 10, Sk 12" if what == "packed" else "Sq 9, Sk 11"
    assert title.startswith(f"attention, float32 on cpu, B 2, Hq 4, Hkv 2, {sizes}, D 8, Dv 6")
    everything = {word for words in WORDS.values() for word in words}
    assert {word for word in everything if word in title} == set(WORDS[what])
    assert max(map(len, text.splitlines())) <= 120


def test_a_decoding_step_reads_keys_and_values_once():
    q, k = torch.randn(8, 16, 1, 64), torch.randn(8, 2, 4096, 64)
    one = explain({}, q, k, k)
    reasons = "\n".join(one.plan.reasons)
    assert one.plan.kernel == "decode"
    assert "8 query rows for each key: 33.6 MB of keys and values are read once" in reasons
    assert explain({}).plan.kernel == "tiles"
    assert "read once" not in "\n".join(explain({}).plan.reasons)


def test_the_backward_pass_is_reported_and_was_foretold():
    explanation = fastseq.explain(lambda: call({"is_causal": True}).sum().backward())
    forward, backward = explanation
    assert (forward.operator, backward.operator) == ("attention", "attention_backward")
    assert forward.backward == backward.plan
    assert (backward.backward, backward.saved, backward.layer) == (None, {}, SIZES)
    assert str(backward).startswith("the gradients of attention, float32")


def test_attention_and_recurrent_layers_are_reported_in_order():
    layer, x = fastseq.GRU(8, 8), torch.randn(5, 2, 8)

    def model(x):
        x = layer(x)[0].transpose(0, 1)
        return fastseq.functional.scaled_dot_product_attention(x, x, x)

    explanation = fastseq.explain(model, x)
    assert [one.operator for one in explanation] == ["recurrent", "attention"]
    assert explanation[1].layer == Attention(1, 2, 2, 5, 5, 8, 8)


# ---- what is saved ----


@pytest.mark.parametrize("what", OPTIONS)
def test_bytes_saved_are_those_that_autograd_holds(what):
    options = OPTIONS[what]
    given = tensors(options)
    with counting() as held:
        one = explain(options, *given)
    assert one.saved_bytes == sum(one.saved.values()) == sum(held) > 0
    assert {"query", "key", "value", "output", "normalizer"} <= one.saved.keys()
    assert ("weights" in one.saved) == ("return_weights" in options)
    assert ("seed" in one.saved) == ("dropout_p" in options)


@pytest.mark.parametrize("how", ["no_grad", "nothing requires one"])
def test_without_gradients_nothing_is_saved(how):
    with torch.set_grad_enabled(how != "no_grad"):
        one = explain({}, requires_grad=how == "no_grad")
    assert (one.saved, one.saved_bytes, one.backward) == ({}, 0, None)
    assert "saved     nothing" in str(one)


def test_a_gradient_of_the_mask_alone_is_one_too():
    mask = torch.zeros(SQ, SK, requires_grad=True)
    one = explain({"attn_mask": mask}, *tensors({}, requires_grad=False))
    assert one.saved["attn_mask"] == mask.nbytes
    assert one.backward is not None


# ---- why it is not faster ----


def reasons_of(options=None, *given, **how):
    return "\n".join(explain(options or {}, *given, **how).plan.reasons)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_that_the_cpu_converts_are_named(dtype):
    name, native = str(dtype).removeprefix("torch."), _C.cpu_info()["isa"] == "avx512bf16"
    assert (name in reasons_of(dtype=dtype)) == (dtype is not torch.bfloat16 or not native)


def test_threads_that_are_not_used_are_explained(monkeypatch):
    many = torch.randn(2, 8, 256, 16)
    torch.set_num_threads(1)
    several = len(os.sched_getaffinity(0)) > 1
    assert ("torch.set_num_threads" in reasons_of({}, many, many, many)) == several
    torch.set_num_threads(4)
    one = torch.randn(1, 1, 4, 16)
    assert "1 of 4 threads: sequences x heads of key and value give 1" in reasons_of({}, one, one, one)
    assert "of 4 threads" not in reasons_of({}, many, many, many)
    monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", "1x2")
    assert "FASTSEQ_ATTENTION_PLAN=1x2 forces the cut" in reasons_of({}, many, many, many)


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_tensors_that_are_copied_are_named(place):
    given = dict(zip(("query", "key", "value"), tensors({}), strict=True))
    assert "copied" not in reasons_of({}, *given.values())
    given[place] = given[place].mT.contiguous().mT
    assert f"copied in every call: {place}.contiguous()" in reasons_of({}, *given.values())


def test_weights_that_are_returned_have_their_price():
    one = explain({"return_weights": True})
    assert any(reason.startswith("return_weights writes 3.2 KB") for reason in one.plan.reasons)
    assert "return_weights" not in reasons_of()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_averaged_weights_have_the_price_of_one_head_without_gradients(requires_grad):
    options = {"return_weights": True, "average_weights": True}
    price = "3.2 KB" if requires_grad else f"{4 * B * SQ * SK} bytes"
    assert f"return_weights writes {price}" in reasons_of(options, *tensors({}, requires_grad=requires_grad))


# ---- what it can replace ----

SDPA = "torch.nn.functional.scaled_dot_product_attention"
OURS = "fastseq.scaled_dot_product_attention"


def test_torchs_function_can_be_replaced():
    q = torch.randn(2, 4, 5, 8)

    def model(times):
        for _ in range(times):
            F.scaled_dot_product_attention(q, key=q, value=q)
        F.scaled_dot_product_attention(query=q.to("meta"), key=q.to("meta"), value=q.to("meta"))

    assert fastseq.explain(model, 1).replaceable == (f"{SDPA} with {OURS}",)
    assert fastseq.explain(model, 3).replaceable == (f"{SDPA}, called 3 times, with {OURS}",)
    assert fastseq.explain(model, 0).replaceable == ()  # fastseq has no kernel for the last one
    assert fastseq.explain(call, {}).replaceable == ()


def test_torchs_module_can_be_replaced():
    x = torch.randn(3, 2, 8)
    attention = nn.MultiheadAttention(8, 2)
    replaceable = ("torch.nn.MultiheadAttention with fastseq.MultiheadAttention",)
    for need_weights in (False, True):
        assert fastseq.explain(attention, x, x, x, need_weights=need_weights).replaceable == replaceable
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    assert fastseq.explain(model, x).replaceable == (f"layers.0.self_attn, {replaceable[0]}",)


# ---- nothing else changes ----


def test_results_and_random_state_are_as_without():
    given, results = tensors({}), []
    state = torch.get_rng_state()
    fastseq.explain(lambda: results.append(call({"dropout_p": 0.5}, *given)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], call({"dropout_p": 0.5}, *given))


def test_modes_are_gone_after_an_error():
    with pytest.raises(RuntimeError):
        fastseq.explain(call, {}, torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5))
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0


def test_tensors_without_data_are_explained_too():
    given = [x.to("meta") for x in tensors({})]
    one = explain({}, *given)
    assert (one.plan.kernel, one.backward.kernel) == ("none", "none")
    assert "nothing is computed on device meta" in str(one)


def test_a_compiled_call_is_explained():
    given = tensors({})
    compiled = torch.compile(lambda *given: call({}, *given), backend="eager", fullgraph=True)
    (one,) = fastseq.explain(compiled, *given)
    assert one.layer == SIZES


def test_every_operator_can_be_explained():
    from fastseq.explain_calls import READERS

    assert set(attention_ops.OPERATORS) <= READERS.keys()


@pytest.mark.parametrize("options", [{}, {"return_weights": True}], ids=["training", "weights"])
def test_few_queries_that_keep_their_sums_are_no_decoding_step(options):
    """Their keys are packed, as the backward pass and the weights need the same scores again."""
    given = [torch.randn(2, HQ, n, D, requires_grad=not options) for n in (1, 300, 300)]
    one = explain(options, *given)
    assert one.plan.kernel == "tiles"
    with torch.no_grad():
        assert explain({}, *given).plan.kernel == "decode"


def test_a_trained_mask_of_queries_keeps_the_keys_together():
    given = [torch.randn(1, 1, n, D, requires_grad=True) for n in (64, 2000, 2000)]
    mask = torch.zeros(1, 1, 64, 1, requires_grad=True)
    with threads(4):
        assert explain({}, *given).backward.partition["threads"] == 4
        assert explain({"attn_mask": mask}, *given).backward.partition["threads"] == 1
