"""Attention is the same bits from run to run, whatever the threads, the plan and the rest of the batch."""

from dataclasses import replace

import pytest
import torch

from attention_harness import (
    ALL,
    Case,
    assert_right,
    call_fastseq,
    kept_weights,
    make_data,
    run_fastseq,
    run_reference,
    run_torch,
)
from fastseq import _C
from harness import DTYPES, assert_same_bits, threads

CASES = {
    "plain": Case(queries=130, keys=150, head_size=20),
    "causal": Case(queries=197, keys=197, head_size=64, causal="top_left"),
    "one head": Case(batch=1, heads=1, queries=300, keys=290, head_size=33, causal="bottom_right"),
    "long keys": Case(batch=1, heads=3, queries=140, keys=800, head_size=16, sinks=True),
    "mask": Case(queries=70, keys=75, mask="float", mask_dims="QK", sinks=True),
    "mask of its own": Case(batch=3, heads=1, queries=140, keys=800, mask="float", causal="bottom_right"),
    "mask of its own, lengths": Case(batch=3, heads=1, queries=40, keys=800, mask="float", lengths=True),
    "mask of a batch": Case(batch=11, heads=3, queries=33, keys=40, mask="float", mask_dims="HQK"),
    "bool mask of keys": Case(queries=70, keys=75, mask="bool", mask_dims="BK"),
    "window": Case(queries=200, keys=200, window=(20, 30), alibi="H", softcap=2.0),
    "grouped queries": Case(batch=1, heads=8, kv_heads=2, queries=90, keys=90, causal="bottom_right"),
    "key lengths": Case(batch=3, queries=100, keys=140, lengths=True, dropout=0.2),
    "weights": Case(queries=66, keys=70, returns=ALL),
    "averaged weights": Case(queries=140, keys=290, returns=ALL, average=True, causal="top_left"),
    "packed": Case(batch=4, queries=130, keys=140, packed=True, causal="bottom_right"),
    "decoding": Case(batch=3, queries=1, keys=700, head_size=64),
    "decoding, one head": Case(batch=1, heads=1, queries=1, keys=3000, head_size=64),
    "decoding, grouped": Case(batch=2, heads=8, kv_heads=1, queries=1, keys=1100, lengths=True),
    "few queries": Case(batch=1, heads=2, queries=5, keys=2100, head_size=40, causal="bottom_right"),
    "few more queries": Case(
        batch=1, heads=2, queries=20, keys=2100, head_size=24, mask="float", mask_dims="K"
    ),
}
PLANS = ["1x1", "1x3", "1x4", "2x2", "3x1", "4x1", "5x5"]  # heads x rows, in parts

every_case = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def forward(case, data):
    """The results alone; lse too, which shows sums that the output hides."""
    with torch.no_grad():
        returns = case.returns or ("lse",)
        return call_fastseq(replace(case, returns=returns), data)


@every_case
@every_dtype
def test_same_bits_from_run_to_run(dtype, name, two_threads):
    """Results and gradients alike."""
    case = replace(CASES[name], dtype=dtype)
    data = make_data(case)
    first = run_fastseq(case, data)
    for _ in range(2):
        assert_same_bits(run_fastseq(case, data), first)


@every_case
@every_dtype
def test_same_forward_bits_whatever_the_thread_count(dtype, name):
    case = replace(CASES[name], dtype=dtype)
    data = make_data(case)
    with threads(1):
        first = forward(case, data)
    for count in (2, 3, 6):
        with threads(count):
            assert_same_bits(forward(case, data), first, f" with {count} threads")


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_exact_whatever_the_thread_count(dtype, name):
    case = replace(CASES[name], dtype=dtype)
    data = make_data(case)
    keep = kept_weights(case, data)
    (exact, scores), torchs = run_reference(case, data, keep), run_torch(case, data, keep)
    for count in (1, 3):
        with threads(count):
            ours = run_fastseq(case, data)
        assert_right(case, data, ours, torchs, exact, scores, f" with {count} threads")


@pytest.mark.smoke
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_plan_gives_the_same_results(monkeypatch, dtype, name):
    """The same bits forward; backward, sums may be cut differently, each as exact as torch's."""
    torch.set_num_threads(4)
    case = replace(CASES[name], dtype=dtype)
    data = make_data(case)
    keep = kept_weights(case, data)
    (exact, scores), torchs = run_reference(case, data, keep), run_torch(case, data, keep)
    first = forward(case, data)
    for forced in PLANS:
        monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", forced)
        what = f" with FASTSEQ_ATTENTION_PLAN={forced}"
        assert_same_bits(forward(case, data), first, what)
        ours = run_fastseq(case, data)
        assert_right(case, data, ours, torchs, exact, scores, what)


def attention_plan(dtype="float32", threads=4, backward=False, keeps=False, **sizes):
    shape = {"batch": 2, "heads": 8, "kv_heads": 8, "queries": 512, "keys": 512}
    shape |= {"head_size": 64, "value_size": 64} | sizes
    return _C.attention_plan(_C.DTYPES[dtype], threads, *shape.values(), backward, keeps)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("forced", PLANS)
def test_forced_plan_is_the_plan(monkeypatch, forced, backward):
    """In the backward pass threads share nothing, and the second number cuts the keys if it is above 1."""
    monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", forced)
    plan = attention_plan(threads=25, backward=backward)
    heads, rows = map(int, forced.split("x"))
    assert plan["threads"] == heads * rows
    if backward:
        assert plan["split"] == (rows > 1)
    else:
        assert (plan["head_parts"], plan["row_parts"]) == (heads, rows)


@pytest.mark.parametrize("forced", PLANS)
def test_forced_plan_takes_no_more_threads_than_there_are(monkeypatch, forced):
    monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", forced)
    for count in (1, 2, 3):
        for backward in (False, True):
            assert attention_plan(threads=count, backward=backward)["threads"] <= count


@pytest.mark.parametrize("forced", ["2", "axb", "1x2x3", "0x1", "1x", "x"])
def test_malformed_forced_plan_is_an_error_of_the_next_call(monkeypatch, forced):
    case = Case()
    data = make_data(case)
    output = call_fastseq(case, data)["output"]
    monkeypatch.setenv("FASTSEQ_ATTENTION_PLAN", forced)
    for call in (lambda: call_fastseq(case, data), output.sum().backward, attention_plan):
        with pytest.raises(RuntimeError) as error:
            call()
        message = str(error.value)
        assert len(message.splitlines()) == 3, message
        assert "FASTSEQ_ATTENTION_PLAN" in message
        assert forced in message
    monkeypatch.delenv("FASTSEQ_ATTENTION_PLAN")
    assert torch.equal(call_fastseq(case, data)["output"], output)


BATCHED = ("query", "key", "value", "attn_mask", "key_lengths")


def rows_of(data, rows):
    """Some of the sequences of a batch; what is the same for all of them stays."""
    return {name: x[rows] if name in BATCHED and len(x) > 1 else x for name, x in data.items()}


ROWS = {
    "decoding": {"queries": 1, "keys": 1500, "head_size": 64},
    "decoding, few keys": {"queries": 1, "keys": 60, "head_size": 64},
    "decoding, grouped": {"queries": 1, "keys": 700, "heads": 4, "kv_heads": 1},
    "decoding, lengths": {"queries": 1, "keys": 1500, "lengths": True},
    "decoding, mask": {"queries": 1, "keys": 700, "mask": "float", "mask_dims": "BK"},
    "few queries": {"queries": 7, "keys": 700, "causal": "bottom_right"},
    "few more queries": {"queries": 20, "keys": 1300, "window": (1250, 3)},
    "many queries": {"queries": 130, "keys": 150, "head_size": 20},
    "causal": {"queries": 100, "keys": 100, "causal": "top_left", "head_size": 64},
    "lengths": {"queries": 70, "keys": 200, "lengths": True, "alibi": "H"},
    "grouped": {"queries": 70, "keys": 90, "heads": 4, "kv_heads": 2, "sinks": True},
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", ROWS)
@every_dtype
def test_a_row_does_not_depend_on_the_rest_of_the_batch(dtype, name, two_threads):
    """Alone, beside few others, beside many others, and beside others that are NaN."""
    case = replace(Case(dtype, batch=17, heads=2), **ROWS[name])
    data = {name: x.detach() for name, x in make_data(case).items()}
    whole = forward(case, data)
    for rows in (slice(0, 1), slice(16, 17), slice(7, 8), slice(3, 5), slice(2, 14)):
        part = forward(case, rows_of(data, rows))
        assert_same_bits(part, {name: x[rows] for name, x in whole.items()}, f" in {rows}")
    for name in ("query", "key", "value"):
        data[name][:10] = float("nan")
    part = forward(case, data)
    assert_same_bits({k: x[10:] for k, x in part.items()}, {k: x[10:] for k, x in whole.items()})


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_row_do_not_depend_on_the_rest_of_the_batch(dtype, name, two_threads):
    """Those of its query, its keys and its values."""
    case = replace(Case(dtype, batch=9, heads=2), **ROWS[name])
    data = make_data(case)
    incoming = torch.randn(9, case.heads, case.queries, case.width).to(dtype)
    names = ("query", "key", "value")

    def gradients(rows):
        part = {name: x.detach() for name, x in rows_of(data, rows).items()}
        leaves = [part[name].requires_grad_() for name in names]
        output = call_fastseq(case, part)["output"]
        return dict(zip(names, torch.autograd.grad(output, leaves, incoming[rows]), strict=True))

    whole = gradients(slice(None))
    for rows in (slice(0, 1), slice(8, 9), slice(3, 5)):
        assert_same_bits(gradients(rows), {name: x[rows] for name, x in whole.items()}, f" in {rows}")


@pytest.mark.parametrize("name", [name for name in ROWS if "grouped" not in name])
@every_dtype
def test_a_head_does_not_depend_on_the_other_heads(dtype, name, two_threads):
    case = replace(Case(dtype, batch=2), **{"heads": 7, **ROWS[name]})
    data = {name: x.detach() for name, x in make_data(case).items()}
    whole = forward(case, data)
    for heads in (slice(0, 1), slice(6, 7), slice(2, 5)):
        part = dict(data)
        for each in ("query", "key", "value"):
            part[each] = data[each][:, heads]
        if case.alibi:
            part["alibi_slopes"] = data["alibi_slopes"][heads]
        assert_same_bits(forward(case, part), {k: x[:, heads] for k, x in whole.items()}, f" in {heads}")


@pytest.mark.parametrize("causal", ["", "bottom_right"])
@every_dtype
def test_a_packed_sequence_does_not_depend_on_its_neighbours(dtype, causal, two_threads):
    case = Case(dtype, 5, 2, 0, 80, 140, packed=True, causal=causal)
    data = {name: x.detach() for name, x in make_data(case).items()}
    whole = forward(case, data)
    q, k = data["cu_seqlens_q"].tolist(), data["cu_seqlens_k"].tolist()
    for b in range(5):
        part = {"query": data["query"][q[b] : q[b + 1]]}
        part |= {name: data[name][k[b] : k[b + 1]] for name in ("key", "value")}
        part["cu_seqlens_q"] = torch.tensor([0, q[b + 1] - q[b]])
        part["cu_seqlens_k"] = torch.tensor([0, k[b + 1] - k[b]])
        alone = forward(case, part)
        assert_same_bits({"output": alone["output"]}, {"output": whole["output"][q[b] : q[b + 1]]})
        assert_same_bits({"lse": alone["lse"]}, {"lse": whole["lse"][:, q[b] : q[b + 1]]})


@pytest.mark.parametrize("queries", [9, 70])
@every_dtype
def test_inference_has_the_bits_of_training(dtype, queries, two_threads):
    """Of more rows than read keys where they lie, which the backward pass could not repeat."""
    case = Case(dtype, queries=queries, keys=300, causal="bottom_right")
    data = make_data(case)
    training = call_fastseq(case, data)["output"]
    with torch.no_grad():
        assert torch.equal(call_fastseq(case, data)["output"], training)
    with torch.inference_mode():
        assert torch.equal(call_fastseq(case, data)["output"], training)
