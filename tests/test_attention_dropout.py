"""Dropout in attention: torch's generator decides, each weight by itself, and the backward pass knows it."""

import math
from dataclasses import replace

import pytest
import torch

import fastseq
from attention_harness import ALL, Case, call_fastseq, check, kept_weights, make_data
from harness import DTYPES, assert_same_bits, threads
from tolerances import SAME_FLOAT64

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = Case(torch.float32, 3, 4, 0, 130, 140, 8, dropout=0.3)
SIGMAS = 5  # of a count, further from its expectation than that once in a million times


def kept(case: Case, seed=3):
    return kept_weights(case, make_data(case), seed)


def agree(count: int, trials: int, probability: float):
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= SIGMAS * deviation, f"{count} of {trials}, p {probability}"


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_rate_is_right_within_binomial_bounds(dropout):
    """In all, and for every key and every query."""
    keep = kept(replace(WIDE, dropout=dropout))
    agree(int(keep.sum()), keep.numel(), 1 - dropout)
    for dims in [(0, 1, 2), (0, 1, 3)]:
        each = keep.numel() // keep.sum(dims).numel()
        for count in keep.sum(dims).tolist():
            agree(count, each, 1 - dropout)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("distance", [1, 2])
def test_decisions_of_neighbours_are_independent(axis, distance):
    """Sequences, heads, queries, keys: two decisions agree as often as independent ones do."""
    keep = kept(WIDE)
    length = keep.size(axis) - distance
    same = keep.narrow(axis, 0, length) == keep.narrow(axis, distance, length)
    agree(int(same.sum()), same.numel(), 0.7**2 + 0.3**2)


def test_decisions_of_two_seeds_are_independent():
    first, second = kept(WIDE, seed=0), kept(WIDE, seed=1)
    agree(int((first == second).sum()), first.numel(), 0.7**2 + 0.3**2)


@pytest.mark.smoke
@pytest.mark.parametrize("queries", [1, 130])
def test_reproducible_by_seed_and_different_without(queries):
    case = replace(WIDE, queries=queries)
    data = make_data(case)
    first = call_fastseq(case, data, seed=0)["output"]
    assert torch.equal(first, call_fastseq(case, data, seed=0)["output"])
    assert not torch.equal(first, call_fastseq(case, data, seed=1)["output"])
    torch.manual_seed(0)
    results = [fastseq.scaled_dot_product_attention(**data, dropout_p=0.3) for _ in range(3)]
    assert torch.equal(first, results[0])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_generator_moves_on_only_where_there_is_dropout():
    data = make_data(WIDE)
    state = torch.get_rng_state()
    fastseq.scaled_dot_product_attention(**data)
    fastseq.scaled_dot_product_attention(**data, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    fastseq.scaled_dot_product_attention(**data, dropout_p=0.1)
    moved = torch.get_rng_state()
    assert not torch.equal(moved, state)
    torch.set_rng_state(state)
    fastseq.scaled_dot_product_attention(
        **{name: x[:1, :1, :2, :3] for name, x in data.items()}, dropout_p=0.9
    )
    assert torch.equal(torch.get_rng_state(), moved), "the same draw whatever the shape"


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_weights_are_kept_and_enlarged_or_zero(dropout):
    case = replace(WIDE, dtype=torch.float64, dropout=dropout, returns=ALL)
    data = make_data(case)
    plain, dropped = call_fastseq(replace(case, dropout=0.0), data), call_fastseq(case, data)
    keep = dropped["weights"] != 0
    assert 0 < int(keep.sum()) < keep.numel()
    expected = torch.where(keep, plain["weights"] / (1 - dropout), 0)
    torch.testing.assert_close(dropped["weights"], expected, **SAME_FLOAT64)
    torch.testing.assert_close(dropped["output"], expected @ data["value"], **SAME_FLOAT64)
    assert_same_bits({"lse": dropped["lse"]}, {"lse": plain["lse"]})


def test_mean_over_seeds_is_the_output_without_dropout():
    case = Case(torch.float64, 1, 2, 0, 5, 6, 4, dropout=0.25)
    data = make_data(case)
    plain = call_fastseq(replace(case, dropout=0.0), data)["output"]
    drawn = torch.stack([call_fastseq(case, data, seed)["output"] for seed in range(400)])
    error = (drawn.mean(0) - plain).abs()
    assert (error <= SIGMAS * drawn.std(0) / math.sqrt(len(drawn))).all()
    assert (drawn.std(0) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"causal": "top_left"},
        {"causal": "bottom_right", "window": (70, 0), "keys": 300},
        {"heads": 6, "kv_heads": 2},
        {"mask": "float", "mask_dims": "QK"},
        {"lengths": True},
        {"sinks": True},
        {"queries": 1, "keys": 700},
        {"queries": 260, "keys": 129},
        {"returns": ALL},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_backward_pass_uses_the_decisions_of_the_forward_pass(option, dtype):
    """They are read off the weights of another call, and the reference is given them."""
    check(replace(WIDE, batch=2, **{"dtype": dtype, "heads": 2, **option}))


@pytest.mark.parametrize("shape", [(1, 140), (130, 1), (2, 140), (33, 35), (64, 64), (129, 65)])
def test_decision_is_about_a_query_and_a_key_whatever_the_shape(shape):
    """A call with fewer queries, keys, heads or sequences decides the same about those that it has."""
    queries, keys = shape
    keep = kept(WIDE)
    assert torch.equal(kept(replace(WIDE, queries=queries, keys=keys)), keep[:, :, :queries, :keys])
    assert torch.equal(kept(replace(WIDE, batch=1, heads=2)), keep[:1, :2])


@pytest.mark.parametrize("queries", [1, 130])
def test_decisions_are_the_same_whatever_dtype_head_size_and_layout(queries):
    case = replace(WIDE, queries=queries)
    keep = kept(case)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(kept(replace(case, dtype=dtype)), keep)
    assert torch.equal(kept(replace(case, head_size=65, value_size=3)), keep)
    assert torch.equal(kept(replace(case, layout="BSHD")), keep)
    assert torch.equal(kept(replace(case, kv_heads=2)), keep)
    visible = torch.ones(queries, 140).tril(140 - queries) > 0
    assert torch.equal(kept(replace(case, causal="bottom_right")), keep & visible)


@pytest.mark.parametrize("plan", ["", "1x1", "1x3", "2x2", "4x1"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("queries", [1, 130])
def test_decisions_are_the_same_whatever_the_plan(monkeypatch, queries, count, plan):
    case = replace(WIDE, queries=queries)
    keep = kept(case)
    if plan:
        monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", plan)
    with threads(count):
        assert torch.equal(kept(case), keep)


def test_packed_sequences_are_decided_about_like_rows_of_a_batch():
    case = Case(torch.float64, 3, 2, 0, 20, 30, dropout=0.3, packed=True)
    packed, rows = make_data(case), make_data(replace(case, packed=False))
    lengths = packed["cu_seqlens_k"].diff()
    rows["key_lengths"] = lengths
    padded = call_fastseq(replace(case, packed=False), rows)["output"]
    output = call_fastseq(case, packed)["output"]
    for b, (start, end) in enumerate(zip(packed["cu_seqlens_q"], packed["cu_seqlens_q"][1:], strict=False)):
        expected = padded[b, :, : end - start].transpose(0, 1)
        torch.testing.assert_close(output[start:end], expected, **SAME_FLOAT64)


@pytest.mark.parametrize("queries", [1, 70])
def test_dropout_of_everything_is_zero_as_in_torch(queries):
    case = Case(queries=queries, keys=70, returns=ALL)
    data = make_data(case)
    arguments = {"dropout_p": 1.0, "return_lse": True, "return_weights": True}
    output, lse, weights = fastseq.scaled_dot_product_attention(**data, **arguments)
    assert not output.any()
    assert not weights.any()
    torch.testing.assert_close(lse, call_fastseq(case, data)["lse"])
    for gradient in torch.autograd.grad(output.sum() + weights.sum(), list(data.values())):
        assert not gradient.any()
