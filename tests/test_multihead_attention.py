"""What fastseq.MultiheadAttention computes: torch.nn's outputs, weights and gradients, and no NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastseq.modules import attention
from harness import DTYPES
from multihead import EMBED, KINDS, MASKS, OPTIONS, Case, call, check, make, make_data, run
from tolerances import SAME_FLOAT64, assert_as_accurate_as_torch

# Two masks of different types are deprecated in torch, and not in fastseq.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning:torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_in_every_dtype(options, dtype):
    for kind in KINDS:
        for need_weights in (True, False):
            masks = MASKS["padding and float 3-D"]
            check(Case(OPTIONS[options], kind, masks, dtype, need_weights=need_weights))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_with_every_kind_of_input(masks, kind):
    for need_weights in (True, False):
        for dtype in (torch.float32, torch.float64):
            check(Case({}, kind, MASKS[masks], dtype, batch_first=True, need_weights=need_weights))


@settings(max_examples=200)
@given(
    st.builds(
        Case,
        options=st.sampled_from(list(OPTIONS.values())),
        kind=st.sampled_from(KINDS),
        masks=st.sampled_from(list(MASKS.values())),
        dtype=st.just(torch.float64),
        batch_first=st.booleans(),
        need_weights=st.booleans(),
        average=st.booleans(),
        batch=st.integers(1, 4),
        queries=st.integers(1, 40),
        keys=st.integers(1, 40),
    )
)
def test_any_combination(case):
    check(case)


@pytest.mark.parametrize("options", OPTIONS)
def test_results_with_and_without_weights_agree(options):
    for masks in ("", MASKS["padding and 2-D"], MASKS["causal"]):
        case = Case(OPTIONS[options], "cross", masks, torch.float64)
        module, data = make(case), make_data(case)
        with_weights = run(case, module, data)
        torch.testing.assert_close(
            call(case, module, data)["output"],
            call(Case(OPTIONS[options], "cross", masks, need_weights=False), module, data)["output"],
            **SAME_FLOAT64,
        )
        averaged = call(Case(OPTIONS[options], "cross", masks, average=False), module, data)["weights"]
        torch.testing.assert_close(averaged.mean(1), with_weights["weights"], **SAME_FLOAT64)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("where", ["a whole sequence", "one query"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_query_without_any_key_has_no_nan(kind, where, need_weights):
    """torch has NaN in the output of the first, and in the gradient of every parameter."""
    case = Case(need_weights=need_weights, dtype=torch.float64, average=False)
    module, x = make(case), torch.randn(5, 3, EMBED).double().requires_grad_()
    masks = {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}
    masks["key_padding_mask"][1] = where == "a whole sequence"
    masks["attn_mask"] = torch.zeros(5, 5, dtype=torch.bool)
    masks["attn_mask"][2] = where == "one query"
    if kind == "float":
        masks = {
            name: torch.zeros_like(m, dtype=torch.float64).masked_fill(m, -torch.inf)
            for name, m in masks.items()
        }
    output, weights = module(x, x, x, need_weights=need_weights, average_attn_weights=False, **masks)
    lone = (slice(None), 1) if where == "a whole sequence" else (2, slice(None))
    assert (output[lone] == module.out_proj.bias).all()
    if need_weights:
        assert not weights[(1,) if where == "a whole sequence" else (slice(None), slice(None), 2)].any()
    gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
    assert all(g.isfinite().all() for g in (output, *gradients))


def test_nan_behind_a_mask_stays_there():
    module = make(Case(batch_first=True))
    x = torch.randn(2, 5, EMBED)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    clean = module(x, x, x, key_padding_mask=padding)[0]
    key = x.masked_fill(padding[..., None], torch.nan)
    for need_weights in (True, False):
        output = module(x, key, key, key_padding_mask=padding, need_weights=need_weights)[0]
        torch.testing.assert_close(output, clean)


def test_masks_are_not_larger_than_they_must_be(monkeypatch):
    given = []

    def record(q, k, v, mask, *arguments, **keywords):
        given.append(mask)
        return v[:, :, : q.shape[2]]

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    module, x = make(Case(batch_first=True)), torch.randn(2, 5, EMBED)
    padding, square = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    for masks, shape, dtype in [
        ({"key_padding_mask": padding}, (2, 1, 1, 5), torch.bool),
        ({"key_padding_mask": padding.float()}, (2, 1, 1, 5), torch.float32),
        ({"attn_mask": square}, (5, 5), torch.bool),
        ({"attn_mask": square.expand(6, 5, 5)}, (2, 3, 5, 5), torch.bool),
        ({"attn_mask": square, "key_padding_mask": padding}, (2, 1, 5, 5), torch.bool),
        ({"attn_mask": square, "key_padding_mask": padding, "is_causal": True}, (2, 1, 1, 5), torch.bool),
        ({"attn_mask": square.float(), "key_padding_mask": padding}, (2, 1, 5, 5), torch.float32),
    ]:
        module(x, x, x, need_weights=False, **masks)
        assert (given[-1].shape, given[-1].dtype) == (shape, dtype)
    module(x, x, x, need_weights=False, attn_mask=square, is_causal=True)
    assert given[-1] is None


def test_heads_are_views_of_one_product(monkeypatch):
    seen = []

    def record(q, k, v, *arguments, **keywords):
        seen.append((q, k, v))
        return q

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    for batch_first in (True, False):
        module, x = make(Case(batch_first=batch_first)), torch.randn(2, 5, EMBED)
        module(x, x, x, need_weights=False)
        assert len({t.untyped_storage().data_ptr() for t in seen[-1]}) == 1
        assert all(t.stride(-1) == 1 for t in seen[-1])


@pytest.mark.parametrize("options", ["plain", "bias_kv", "zero_attn"])
def test_is_causal_is_the_causal_mask_and_needs_none(options):
    """Also with more keys, which every query sees, where torch's kernel hides them from all but the last."""
    for need_weights in (True, False):
        case = Case(OPTIONS[options], dtype=torch.float64, need_weights=need_weights)
        module, x = make(case), make_data(case)["query"]
        mask = torch.ones(13, 13, dtype=torch.bool).triu(1)
        outputs = [
            module(x, x, x, need_weights=need_weights, attn_mask=m, is_causal=causal)[0]
            for m, causal in [(mask, False), (mask, True), (None, True)]
        ]
        torch.testing.assert_close(outputs[1], outputs[0], **SAME_FLOAT64)
        torch.testing.assert_close(outputs[2], outputs[0], **SAME_FLOAT64)


def test_mask_that_is_trained_is_read_beside_is_causal():
    module, x = make(Case(batch_first=True)), torch.randn(2, 5, EMBED)
    mask = torch.randn(5, 5).requires_grad_()
    causal = mask.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    output = module(x, x, x, need_weights=False, attn_mask=causal, is_causal=True)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), mask)
    assert gradient.tril().any()
    assert not gradient.triu(1).any()


def test_dropout_is_reproducible_and_only_in_training():
    module = make(Case({"dropout": 0.5}, dtype=torch.float64))
    x, results = torch.randn(7, 2, EMBED).double(), []
    for need_weights in (True, True, False):
        torch.manual_seed(5)
        results.append(module(x, x, x, need_weights=need_weights, average_attn_weights=False))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[2][0], results[0][0], **SAME_FLOAT64)
    other = module(x, x, x, average_attn_weights=False)
    assert not torch.equal(other[1] == 0, results[0][1] == 0), "another seed, another mask"

    output, weights = results[0]
    still, kept = module.eval()(x, x, x, average_attn_weights=False)
    assert (kept > 0).all()
    dropped = weights == 0
    assert 0.2 < dropped.double().mean() < 0.8
    torch.testing.assert_close(weights, torch.where(dropped, 0, 2 * kept), **SAME_FLOAT64)
    assert not torch.equal(output, still)


def test_output_is_made_of_the_weights_that_are_returned():
    """After dropout, as in torch.nn."""
    case = Case({"dropout": 0.5, "num_heads": 1}, dtype=torch.float64, batch_first=True)
    module, x = make(case), torch.randn(2, 5, EMBED).double()
    output, weights = module(x, x, x)
    _, _, w_v = module.in_proj_weight.chunk(3)
    _, _, b_v = module.in_proj_bias.chunk(3)
    torch.testing.assert_close(module.out_proj(weights @ (x @ w_v.t() + b_v)), output, **SAME_FLOAT64)


@pytest.mark.parametrize("options", ["plain", "bias_kv and zero_attn", "vdim, bias_kv"])
def test_autocast_is_obeyed(options):
    """Products, and so the attention, are in bfloat16, as in torch; masks may stay float32."""
    for need_weights in (True, False):
        case = Case(OPTIONS[options], "cross", MASKS["padding and float 3-D"], need_weights=need_weights)
        data = make_data(case)
        exact = call(case, make(case), data)
        with torch.autocast("cpu", torch.bfloat16):
            ours, torchs = call(case, make(case), data), call(case, make(case, nn), data)
        for name, x in exact.items():
            assert_as_accurate_as_torch(ours[name], torchs[name], x, torch.bfloat16, name)
