"""Attention of any shape, strides and masks, and what the equation promises whatever the numbers are."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseq
from attention_harness import LAYOUTS, Case, call_fastseq, check, make_data
from harness import DTYPES
from tolerances import SAME_FLOAT64

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = st.sampled_from(
    [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 80, 96, 127, 128, 129]
)
LENGTH = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 47, 48, 63, 64, 65, 96, 127, 129, 193])
EXTENT = st.sampled_from([None, -1, 0, 1, 2, 7, 63, 64, 65, 500])


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 4]))
    packed = draw(st.integers(0, 4)) == 0
    lengths = not packed and draw(st.booleans())
    mask = "" if packed else draw(st.sampled_from(["", "bool", "float", "float32"]))
    returned = ["lse"] if packed else ["lse", "weights"]
    head_size = draw(SIZE)
    return Case(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=kv_heads if group > 1 or draw(st.booleans()) else 0,
        queries=draw(LENGTH),
        keys=draw(LENGTH),
        head_size=head_size,
        value_size=draw(st.one_of(st.just(head_size), SIZE)),
        layout="BHSD" if packed else draw(st.sampled_from(sorted(LAYOUTS))),
        mask=mask,
        mask_dims="".join(dim for dim in "BHQK" if draw(st.booleans())) if mask else "BHQK",
        causal=draw(st.sampled_from(["", "top_left", "bottom_right"])),
        window=draw(st.one_of(st.none(), st.tuples(EXTENT, EXTENT))),
        scale=draw(st.sampled_from([None, None, 0.3, 1.0, -0.5])),
        softcap=draw(st.sampled_from([None, None, 0.5, 20.0])),
        alibi=draw(st.sampled_from(["", "", "H", "BH"])),
        sinks=draw(st.booleans()),
        lengths=lengths,
        packed=packed,
        dropout=draw(st.sampled_from([0.0, 0.0, 0.1, 0.6])),
        returns=tuple(name for name in returned if draw(st.booleans())),
    )


@settings(max_examples=150)
@given(case=cases(), seed=st.integers(0, 100))
def test_any_case_matches_float64_reference(case, seed):
    check(case, make_data(case, seed))


SMALL = st.builds(
    Case,
    dtype=st.just(torch.float64),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=LENGTH,
    keys=LENGTH,
    head_size=st.sampled_from([1, 3, 8, 20]),
    value_size=st.sampled_from([1, 4, 17]),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, 1.0]),
)


@settings(max_examples=25)
@given(case=SMALL, seed=st.integers(0, 100))
def test_order_of_the_keys_does_not_matter(case, seed):
    """Permuted keys, values and mask columns: the same output, and lse."""
    case = replace(case, mask="float", returns=("lse",))
    data = make_data(case, seed)
    order = torch.randperm(case.keys, generator=torch.Generator().manual_seed(seed))
    shuffled = {**data, "key": data["key"][:, :, order], "value": data["value"][:, :, order]}
    shuffled["attn_mask"] = data["attn_mask"][..., order]
    a, b = call_fastseq(case, data), call_fastseq(case, shuffled)
    torch.testing.assert_close(a, b, **SAME_FLOAT64)


@settings(max_examples=25)
@given(case=SMALL, seed=st.integers(0, 100))
def test_order_of_the_queries_is_the_order_of_the_outputs(case, seed):
    data = make_data(case, seed)
    order = torch.randperm(case.queries, generator=torch.Generator().manual_seed(seed))
    shuffled = {**data, "query": data["query"][:, :, order]}
    a, b = call_fastseq(case, data)["output"], call_fastseq(case, shuffled)["output"]
    torch.testing.assert_close(a[:, :, order], b, **SAME_FLOAT64)


@settings(max_examples=25)
@given(case=SMALL, seed=st.integers(0, 100), constant=st.sampled_from([-300.0, -1.0, 2.0, 700.0]))
def test_constant_added_to_the_scores_moves_lse_alone(case, seed, constant):
    case = replace(case, sinks=False, returns=("lse", "weights"))
    data = make_data(case, seed)
    moved = {**data, "attn_mask": torch.full((1, 1), constant, dtype=case.dtype)}
    a, b = call_fastseq(case, data), call_fastseq(case, moved)
    a["lse"] = a["lse"] + constant
    torch.testing.assert_close(a, b, **SAME_FLOAT64)


@settings(max_examples=25)
@given(case=SMALL, seed=st.integers(0, 100))
def test_output_is_linear_in_the_values(case, seed):
    case = replace(case, dropout=0.2)
    data, other = make_data(case, seed), make_data(case, seed + 1)["value"]

    def output(value):
        return call_fastseq(case, {**data, "value": value})["output"]

    together = output(2 * data["value"] - 3 * other)
    torch.testing.assert_close(together, 2 * output(data["value"]) - 3 * output(other), **SAME_FLOAT64)


@settings(max_examples=25)
@given(case=SMALL, seed=st.integers(0, 100))
def test_output_lies_among_the_visible_values_and_weights_sum_up_to_one(case, seed):
    case = replace(case, sinks=False, causal="top_left", returns=("weights",))
    data = make_data(case, seed)
    results = call_fastseq(case, data)
    sums = results["weights"].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), **SAME_FLOAT64)
    value = data["value"].detach()
    last = min(case.queries, case.keys)
    low, high = (f(value[:, :, :last], 2).values for f in (torch.cummin, torch.cummax))
    output = results["output"][:, :, :last]
    slack = SAME_FLOAT64["atol"]
    assert (output >= low - slack).all()
    assert (output <= high + slack).all()


@settings(max_examples=25)
@given(case=SMALL, seed=st.integers(0, 100), cut=st.integers(1, 193))
def test_causal_prefix_does_not_know_what_follows(case, seed, cut):
    """Top left: the first queries alone. Bottom right: the last queries with all keys, as in decoding."""
    case = replace(case, keys=case.queries, returns=("lse",))
    data, cut = make_data(case, seed), min(cut, case.queries)
    prefix = {name: x if name == "sinks" else x[:, :, :cut] for name, x in data.items()}
    last = {**data, "query": data["query"][:, :, -cut:]}
    top = replace(case, causal="top_left")
    whole, first = call_fastseq(top, data), call_fastseq(top, prefix)
    decoded = call_fastseq(replace(case, causal="bottom_right"), last)
    for name in ("output", "lse"):
        torch.testing.assert_close(whole[name][:, :, :cut], first[name], **SAME_FLOAT64)
        torch.testing.assert_close(whole[name][:, :, -cut:], decoded[name], **SAME_FLOAT64)


@settings(max_examples=25)
@given(case=SMALL, seed=st.integers(0, 100), cut=st.integers(1, 192))
def test_two_halves_of_the_keys_join_by_their_lse(case, seed, cut):
    """As ring attention and a split over the keys do."""
    case = replace(case, sinks=False, keys=max(2, case.keys), returns=("lse",))
    data, cut = make_data(case, seed), 1 + cut % (max(2, case.keys) - 1)
    halves = []
    for part in (slice(0, cut), slice(cut, None)):
        half = {**data, "key": data["key"][:, :, part], "value": data["value"][:, :, part]}
        halves.append(call_fastseq(case, half))
    whole = call_fastseq(case, data)
    lse = torch.stack([half["lse"] for half in halves])
    share = lse.softmax(0)[..., None]
    output = share[0] * halves[0]["output"] + share[1] * halves[1]["output"]
    torch.testing.assert_close(whole["output"], output, **SAME_FLOAT64)
    torch.testing.assert_close(whole["lse"], lse.logsumexp(0), **SAME_FLOAT64)


@pytest.mark.parametrize("causal", ["", "top_left", "bottom_right"])
@settings(max_examples=25)
@given(case=SMALL, left=EXTENT, right=EXTENT)
def test_every_option_that_masks_is_a_bool_mask(causal, case, left, right):
    """Alignment and window, written out as a mask, give the same results."""
    i, j = torch.arange(case.queries)[:, None], torch.arange(case.keys)
    place = i + (case.keys - case.queries if causal == "bottom_right" else 0)
    visible = torch.ones(case.queries, case.keys, dtype=torch.bool)
    visible &= (j <= place) if causal else visible
    visible &= (j >= place - left) if left not in (None, -1) else visible
    visible &= (j <= place + right) if right not in (None, -1) else visible
    data = make_data(case)
    named = call_fastseq(replace(case, causal=causal, window=(left, right)), data)["output"]
    masked = call_fastseq(case, {**data, "attn_mask": visible})["output"]
    torch.testing.assert_close(named, masked, **SAME_FLOAT64)


def test_positional_arguments_are_torchs():
    """query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa; the rest by name only."""
    data = make_data(Case(torch.float64, heads=4, kv_heads=2))
    mask = torch.randn(9, 13, dtype=torch.float64)
    by_name = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "scale": 0.5, "enable_gqa": True}
    ours = fastseq.scaled_dot_product_attention(*data.values(), *by_name.values())
    assert torch.equal(ours, fastseq.scaled_dot_product_attention(**data, **by_name))
    theirs = torch.nn.functional.scaled_dot_product_attention(*data.values(), **by_name)
    torch.testing.assert_close(ours, theirs, **SAME_FLOAT64)
    with pytest.raises(TypeError):
        fastseq.scaled_dot_product_attention(*data.values(), *by_name.values(), "top_left")
