"""Every option of attention and every pair of them, forward and backward, against the float64 reference."""

import sys
from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastseq
from attention_harness import (
    ALL,
    Case,
    call_fastseq,
    check,
    kept_weights,
    make_data,
    run_fastseq,
    run_reference,
)
from harness import DTYPES, assert_same_bits, threads, with_gradients
from tolerances import SAME_FLOAT32, SAME_FLOAT64

pytestmark = pytest.mark.usefixtures("one_thread")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [(1, 1), (1, 90), (90, 1), (64, 130), (130, 64), (65, 66), (9, 8)]  # queries, keys
ALIGNMENTS = ["top_left", "bottom_right"]
SUBSETS = ["".join(s) for s in chain.from_iterable(combinations("BHQK", n) for n in range(5))]


@pytest.mark.parametrize("dims", SUBSETS)
@pytest.mark.parametrize("queries", [1, 20, 67])
@pytest.mark.parametrize("mask", ["bool", "float"])
@two_dtypes
def test_mask_broadcast_in_any_dimensions(dtype, mask, queries, dims):
    """And the gradient of a float mask, reduced over them."""
    check(Case(dtype, 3, 2, 0, queries, 70, mask=mask, mask_dims=dims))


@pytest.mark.parametrize("batch", [2, 7, 8, 9, 21])
@pytest.mark.parametrize("dims", ["", "K", "HQ", "HQK"])
@two_dtypes
def test_gradient_of_a_mask_over_batches_of_any_size(dtype, dims, batch):
    """It is added up in a few copies, unless these were large."""
    check(Case(dtype, batch, 2, 0, 20, 30, mask="float", mask_dims=dims))


WRITTEN = {
    "plain": {},
    "causal": {"causal": "top_left"},
    "causal from the end": {"causal": "bottom_right"},
    "window": {"window": (20, 3)},
    "key lengths": {"lengths": True},
    "soft cap": {"softcap": 2.0},
    "grouped queries": {"heads": 4, "kv_heads": 2},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("option", WRITTEN)
@pytest.mark.parametrize(("queries", "keys"), [(1, 600), (2, 1), (40, 600), (200, 255), (3, 1100)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "mask"),
    [(dtype, "float") for dtype in DTYPES] + [(torch.bfloat16, "float32"), (torch.float16, "float32")],
    ids=str,
)
def test_gradient_of_a_mask_that_is_broadcast_nowhere_is_written_everywhere(
    dtype, mask, batch, queries, keys, option
):
    """Of keys that nobody sees too, tile by tile, in the mask's own dtype."""
    case = Case(dtype, batch, 2, 0, queries, keys, 8, mask=mask, mask_dims="BHQK")
    check(replace(case, **WRITTEN[option]))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("option", ["plain", "key lengths", "window", "causal from the end"])
@pytest.mark.parametrize("plan", ["1x1", "1x2", "1x4", "2x2"])
@two_dtypes
def test_gradient_of_a_mask_is_written_everywhere_by_parts_of_the_keys(dtype, plan, option, monkeypatch):
    monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", plan)
    case = Case(dtype, 2, 1, 0, 40, 1100, 8, mask="float", mask_dims="BHQK")
    with threads(4):
        check(replace(case, **WRITTEN[option]))


@pytest.mark.parametrize("keys", [2, 3, 5, 8, 16, 17])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"sinks": True, "returns": ("lse",)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_few_keys_are_as_exact_as_torchs(dtype, options, keys):
    """Root mean squares over many rows: delta from the rounded output lost to torch."""
    case = Case(dtype, 8, 2, 0, 100, keys, 64, mask="float", mask_dims="BHQK", **options)
    data = make_data(case)
    keep = kept_weights(case, data)
    exact, _ = run_reference(case, data, keep)
    ours, torchs = run_fastseq(case, data), run_reference(case, data, keep, case.dtype)[0]
    for name in ("query", "key", "attn_mask"):
        name = f"grad of {name}"
        unit = torch.finfo(dtype).eps * exact[name].square().mean().sqrt()
        error, theirs = ((x[name].double() - exact[name]).square().mean().sqrt() for x in (ours, torchs))
        assert error <= 1.6 * theirs + 0.25 * unit, (
            f"{name}: {error / unit:.2f} units, torch {theirs / unit:.2f}"
        )


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("hidden", [slice(0, 300), slice(200, 600), slice(None)], ids=str)
@pytest.mark.parametrize("plan", ["1x1", "1x2", "2x2"])
def test_gradient_of_a_mask_is_zero_where_it_hides_whole_tiles(plan, hidden, monkeypatch):
    monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", plan)
    case = Case(torch.float32, 1, 1, 0, 140, 600, 8, mask="float", mask_dims="BHQK")
    data = make_data(case)
    mask = torch.zeros(1, 1, 140, 600)
    mask[..., hidden] = -torch.inf
    data["attn_mask"] = mask.requires_grad_()
    with threads(4):
        gradient = run_fastseq(case, data)["grad of attn_mask"]
        check(case, data)
    assert gradient.isfinite().all()
    assert not gradient[..., hidden].any()


def test_gradient_of_a_large_mask_takes_no_copies():
    """8 MB of it: one of them would be as much."""
    case = Case(torch.float32, 2, 1, 0, 1024, 2048, 8, mask="float", mask_dims="QK")
    data = make_data(case)
    results = run_fastseq(case, data)
    halves = [{name: x if name == "attn_mask" else x[b : b + 1] for name, x in data.items()} for b in (0, 1)]
    outputs = torch.cat([call_fastseq(replace(case, batch=1), half)["output"] for half in halves])
    expected = with_gradients({"output": outputs}, {"attn_mask": data["attn_mask"]}, case.dtype)
    torch.testing.assert_close(results["grad of attn_mask"], expected["grad of attn_mask"])


@pytest.mark.parametrize("dims", ["", "K", "QK", "HQK", "BK", "BHQK"])
@pytest.mark.parametrize("returns", [(), ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_float32_mask_beside_another_dtype(dtype, returns, dims):
    check(Case(dtype, 2, 3, 0, 40, 70, mask="float32", mask_dims=dims, returns=returns))


@pytest.mark.parametrize("lead", [(), (9,), (4, 9), (1, 9), (2, 1, 9), (4, 1)])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_mask_of_lower_rank_is_broadcast_from_the_right(mask, lead):
    case = Case(torch.float64, mask="float", returns=ALL)
    data = make_data(case)
    keys = 13 if lead[-1:] != (1,) else 1
    values = torch.randn(*lead, keys, dtype=torch.float64)
    values = values > 0 if mask == "bool" else values.requires_grad_()
    results = []
    for shown in (values, values.expand(2, 4, 9, 13)):
        data["attn_mask"] = shown
        leaves = [x for name, x in data.items() if name != "attn_mask"]
        leaves += [values] if values.requires_grad else []
        outputs = call_fastseq(case, data)
        gradients = torch.autograd.grad(sum(x.square().sum() for x in outputs.values()), leaves)
        results.append([*outputs.values(), *gradients])
    assert values.dtype is torch.bool or results[0][-1].shape == values.shape
    torch.testing.assert_close(*results, **SAME_FLOAT64)


@pytest.mark.parametrize("queries", [1, 66])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_mask_of_any_strides(mask, queries):
    """Keys not contiguous, rows overlapping, every other element; also where the tensor is expanded."""
    case = Case(torch.float32, 2, 4, 0, queries, 70, mask=mask, returns=ALL)
    data = make_data(case)
    plain = data["attn_mask"].detach()
    expected = run_fastseq(case, data)
    for layout in (
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],
        lambda x: torch.cat([x, x], 2)[:, :, :queries],
    ):
        data["attn_mask"] = layout(plain).requires_grad_(mask == "float")
        assert_same_bits(run_fastseq(case, data), expected)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("causal", ALIGNMENTS)
@two_dtypes
def test_causal_alignments_where_there_are_more_keys_or_more_queries(dtype, causal, queries, keys):
    check(Case(dtype, queries=queries, keys=keys, causal=causal, returns=ALL))


def test_is_causal_is_torchs_alignment():
    case = Case(queries=20, keys=31)
    data = make_data(case)
    ours = fastseq.scaled_dot_product_attention(**data, is_causal=True)
    assert torch.equal(ours, fastseq.scaled_dot_product_attention(**data, causal="top_left"))
    theirs = F.scaled_dot_product_attention(*data.values(), is_causal=True)
    torch.testing.assert_close(ours, theirs, **SAME_FLOAT32)
    bottom_right = fastseq.scaled_dot_product_attention(**data, causal="bottom_right")
    assert not torch.equal(ours, bottom_right)


@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (1, 140), (70, 140), (140, 70)])
@pytest.mark.parametrize("window", [(0, 0), (3, 2), (None, 5), (5, -1), (64, 0), (1000, 1000), (None, None)])
@pytest.mark.parametrize("causal", ["", *ALIGNMENTS])
def test_window_around_the_place_of_each_query(causal, window, queries, keys):
    check(Case(torch.float32, 1, 2, 0, queries, keys, causal=causal, window=window))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("queries", [1, 3, 70])
@every_dtype
def test_grouped_queries(dtype, queries, kv_heads):
    check(Case(dtype, 2, 6, kv_heads, queries, 75, causal="bottom_right"))
    check(Case(dtype, 2, 6, kv_heads, queries, 75, mask="float", returns=ALL))


@pytest.mark.parametrize("queries", [1, 40])
def test_grouped_queries_are_repeated_keys_and_values(queries):
    case = Case(torch.float64, 2, 6, 2, queries, 40)
    data = make_data(case)
    grouped = fastseq.scaled_dot_product_attention(**data, enable_gqa=True)
    data |= {name: data[name].repeat_interleave(3, 1) for name in ("key", "value")}
    torch.testing.assert_close(grouped, fastseq.scaled_dot_product_attention(**data), **SAME_FLOAT64)


@pytest.mark.parametrize("softcap", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("queries", [1, 70])
@every_dtype
def test_softcap(dtype, queries, softcap):
    check(Case(dtype, queries=queries, keys=70, scale=2.0, softcap=softcap))


@pytest.mark.parametrize("alibi", ["H", "BH"])
@pytest.mark.parametrize("causal", ["", *ALIGNMENTS])
@pytest.mark.parametrize(("queries", "keys"), [(1, 90), (70, 90), (90, 70)])
@two_dtypes
def test_alibi_slopes(dtype, queries, keys, causal, alibi):
    check(Case(dtype, 3, queries=queries, keys=keys, causal=causal, alibi=alibi))


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("returns", [(), ALL])
@every_dtype
def test_sinks_take_part_of_the_weight_and_have_a_gradient(dtype, returns, queries):
    check(Case(dtype, 3, queries=queries, keys=70, sinks=True, returns=returns))


@pytest.mark.parametrize("size", [-20.0, 20.0])
def test_sinks_that_take_all_of_the_weight_and_none_of_it(size):
    case = Case(torch.float64, sinks=True, returns=ALL)
    data = make_data(case)
    data["sinks"] = torch.full((4,), size, dtype=torch.float64, requires_grad=True)
    check(case, data)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("causal", ["", *ALIGNMENTS])
@pytest.mark.parametrize("queries", [1, 70])
@two_dtypes
def test_key_lengths_from_none_to_all(dtype, queries, causal, integers):
    case = Case(dtype, 5, 2, 0, queries, 130, causal=causal, lengths=True, returns=ALL)
    data = make_data(case)
    assert {0, 130} <= set(data["key_lengths"].tolist())
    data["key_lengths"] = data["key_lengths"].to(integers)
    check(case, data)


def test_key_lengths_are_a_shorter_call():
    case = Case(torch.float64, 4, 3, 2 - 1, 10, 70, lengths=True, causal="bottom_right", returns=ALL)
    data = make_data(case)
    whole = call_fastseq(case, data)
    for b, length in enumerate(data["key_lengths"].tolist()):
        part = {"query": data["query"][b : b + 1]}
        part |= {name: data[name][b : b + 1, :, :length] for name in ("key", "value")}
        alone = call_fastseq(replace(case, lengths=False), part)
        for name in ("output", "lse"):
            torch.testing.assert_close(whole[name][b], alone[name][0], **SAME_FLOAT64)
        torch.testing.assert_close(whole["weights"][b, ..., :length], alone["weights"][0], **SAME_FLOAT64)
        assert not whole["weights"][b, ..., length:].any()


PACKED = [
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right"},
    {"window": (3, 4), "causal": "bottom_right"},
    {"window": (10, 2)},
    {"heads": 6, "kv_heads": 2, "causal": "bottom_right"},
    {"alibi": "BH"},
    {"alibi": "H", "causal": "bottom_right"},
    {"sinks": True},
    {"softcap": 1.0},
    {"dropout": 0.4},
    {"dropout": 0.4, "heads": 6, "kv_heads": 3, "causal": "bottom_right"},
]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("lengths", [(40, 140), (140, 40), (2, 200)])
@pytest.mark.parametrize("option", PACKED, ids=lambda o: "-".join(o) or "plain")
@two_dtypes
def test_packed_sequences_of_any_lengths(dtype, option, lengths, batch):
    case = Case(dtype, batch, queries=lengths[0], keys=lengths[1], packed=True, returns=("lse",))
    check(replace(case, **option))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("option", PACKED[:-2], ids=lambda o: "-".join(o) or "plain")
def test_packed_is_as_many_separate_calls(option, integers):
    """Results and gradients; some sequences have no queries or no keys."""
    case = replace(Case(torch.float64, 4, queries=30, keys=37, packed=True, returns=("lse",)), **option)
    data = make_data(case)
    starts = {name: data[f"cu_seqlens_{name}"].tolist() for name in "qk"}
    for name in "qk":
        data[f"cu_seqlens_{name}"] = data[f"cu_seqlens_{name}"].to(integers)
    packed = run_fastseq(case, data)
    leaves = [data[name] for name in ("query", "key", "value")]
    outputs, lses = [], []
    for b in range(case.batch):
        part = {"query": data["query"][starts["q"][b] : starts["q"][b + 1]]}
        part |= {name: data[name][starts["k"][b] : starts["k"][b + 1]] for name in ("key", "value")}
        part = {name: x.transpose(0, 1)[None] for name, x in part.items()}
        if case.sinks:
            part["sinks"] = data["sinks"]
        if case.alibi:
            slopes = data["alibi_slopes"]
            part["alibi_slopes"] = slopes[b] if slopes.dim() == 2 else slopes
        alone = call_fastseq(replace(case, packed=False), part)
        outputs.append(alone["output"][0].transpose(0, 1))
        lses.append(alone["lse"][0])
    separate = [torch.cat(outputs), torch.cat(lses, 1)]
    g = torch.Generator().manual_seed(2)  # the gradients that run_fastseq lets come in
    incoming = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in separate]
    gradients = torch.autograd.grad(separate, leaves, incoming)
    expected = dict(
        zip(
            ["output", "lse", *(f"grad of {n}" for n in ("query", "key", "value"))],
            [*(x.detach() for x in separate), *gradients],
            strict=True,
        )
    )
    for name, x in expected.items():
        torch.testing.assert_close(packed[name], x, **SAME_FLOAT64)


def test_packed_without_any_row():
    empty = torch.zeros(0, 4, 8, requires_grad=True)
    for starts in ([0], [0, 0, 0]):
        starts = torch.tensor(starts)
        arguments = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "return_lse": True}
        output, lse = fastseq.scaled_dot_product_attention(empty, empty, empty, **arguments)
        assert (output.shape, lse.shape) == ((0, 4, 8), (4, 0))
        (gradient,) = torch.autograd.grad(output.sum(), empty)
        assert gradient.shape == (0, 4, 8)


OPTIONS = {
    "bool mask": {"mask": "bool", "mask_dims": "BQK"},
    "float mask": {"mask": "float", "mask_dims": "HQK"},
    "causal": {"causal": "top_left"},
    "causal from the end": {"causal": "bottom_right"},
    "window": {"window": (30, 3)},
    "grouped queries": {"heads": 6, "kv_heads": 2},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "BH"},
    "sinks": {"sinks": True},
    "key lengths": {"lengths": True},
    "packed": {"packed": True},
    "dropout": {"dropout": 0.3},
    "scale": {"scale": 0.4},
    "lse": {"returns": ("lse",)},
    "weights": {"returns": ("weights",)},
}
NEVER = [  # together
    {"packed", "bool mask"},
    {"packed", "float mask"},
    {"packed", "key lengths"},
    {"packed", "weights"},
    {"bool mask", "float mask"},
    {"causal", "causal from the end"},
    {"lse", "weights"},
]
PAIRS = [pair for pair in combinations(OPTIONS, 2) if set(pair) not in NEVER]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("queries", [3, 67])
@two_dtypes
def test_pairs_of_options_match_float64_reference(dtype, queries, pair):
    case = Case(dtype, 3, 2, 0, queries, 70, 12)
    for option in pair:
        case = replace(case, **OPTIONS[option])
    check(case)


@pytest.mark.smoke
@pytest.mark.parametrize("queries", [1, 67])
@every_dtype
def test_all_options_together(dtype, queries):
    everything = {"causal": "bottom_right", "window": (30, 0), "softcap": 2.0, "alibi": "BH", "sinks": True}
    case = Case(dtype, 3, 6, 2, queries, 70, 12, 20, dropout=0.2, **everything)
    check(replace(case, mask="float", mask_dims="BQK", lengths=True, returns=ALL))
    check(replace(case, mask="bool", mask_dims="BK", lengths=True))
    check(replace(case, packed=True, returns=("lse",)))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("packed", "lse", "weights")])
@pytest.mark.parametrize("used", ["lse", "weights"])
@pytest.mark.parametrize("queries", [1, 40])
def test_loss_of_lse_or_of_the_weights_alone(queries, used, option):
    """The other results count as zero gradients: the same as with zeros given for them."""
    case = replace(Case(torch.float64, 2, 2, 0, queries, 50, returns=ALL), **OPTIONS[option])
    data = make_data(case)
    leaves = [x for x in data.values() if x.requires_grad]
    outputs = call_fastseq(case, data)
    incoming = torch.randn_like(outputs[used])
    alone = torch.autograd.grad(outputs[used], leaves, incoming, allow_unused=True)
    outputs = call_fastseq(case, data)
    zeros = {name: torch.zeros_like(x) for name, x in outputs.items()} | {used: incoming}
    together = torch.autograd.grad(list(outputs.values()), leaves, list(zeros.values()))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(torch.zeros_like(b) if a is None else a, b)
    one_key = queries == 1 and option == "causal"  # whose weight is 1
    assert one_key or any(x.any() for x in together)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("packed", "dropout")])
@pytest.mark.parametrize("queries", [1, 67])
@two_dtypes
def test_asking_for_lse_and_weights_changes_neither_output_nor_gradients(dtype, queries, option):
    case = replace(Case(dtype, 3, 2, 0, queries, 70), **OPTIONS[option])
    data = make_data(case)
    leaves = [x for x in data.values() if x.requires_grad]
    results = []
    for returns in ((), ("lse",), ALL):
        output = call_fastseq(replace(case, returns=returns), data)["output"]
        results.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-3, 30.0])
@every_dtype
def test_scale(dtype, scale):
    check(Case(dtype, queries=70, keys=70, scale=scale, returns=("lse",)))


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_overflow_nothing(dtype, size):
    """exp of a score would be infinite; the largest comes last, so that all before it is scaled down."""
    case = Case(dtype, 1, 2, 0, 5, 300, 4, returns=ALL)
    data = make_data(case)
    ramp = torch.linspace(0, size, 300).view(-1, 1)
    with torch.no_grad():
        data["query"].abs_()
        data["key"].copy_(ramp.expand(300, 4))
    results = run_fastseq(case, data)
    assert all(x.isfinite().all() for x in results.values())
    check(case, data)


@pytest.mark.parametrize("far", [10**6, sys.maxsize, 2**63, 10**30])
def test_window_farther_than_any_key_is_no_limit(far):
    query, key, value = (torch.randn(1, 1, 5, 8) for _ in range(3))
    plain = fastseq.scaled_dot_product_attention(query, key, value)
    for window in ((far, None), (None, far)):
        assert torch.equal(fastseq.scaled_dot_product_attention(query, key, value, window=window), plain)


def test_soft_cap_above_any_score_is_none():
    query, key, value = (torch.randn(1, 1, 5, 8) for _ in range(3))
    plain = fastseq.scaled_dot_product_attention(query, key, value)
    assert torch.equal(fastseq.scaled_dot_product_attention(query, key, value, softcap=1e300), plain)


def test_autocast_casts_as_torchs_function_does():
    query, key, value = (torch.randn(1, 1, 5, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        for tensors in ((query, key, value), (query.bfloat16(), key, value)):
            ours = fastseq.scaled_dot_product_attention(*tensors)
            assert ours.dtype is F.scaled_dot_product_attention(*tensors).dtype is torch.bfloat16
            cast = fastseq.scaled_dot_product_attention(*(tensor.bfloat16() for tensor in tensors))
            assert torch.equal(ours, cast)
        doubles = fastseq.scaled_dot_product_attention(query.double(), key.double(), value.double())
        assert doubles.dtype is torch.float64


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_autocast_takes_torchs_causal_biases(bias):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (9, 12, 12))
    with torch.autocast("cpu", torch.bfloat16):
        ours = fastseq.scaled_dot_product_attention(q, k, v, bias(9, 12))
        theirs = F.scaled_dot_product_attention(q, k, v, bias(9, 12))
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
