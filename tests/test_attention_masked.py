"""What is masked does not take part: rows without keys, and NaN and Inf where nobody may look."""

import math
from dataclasses import replace

import pytest
import torch

import fastseq
from attention_harness import ALL, Case, call_fastseq, check, make_data, run_fastseq
from attention_reference import attention
from harness import DTYPES, assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_poison = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
BASE = Case(torch.float32, 2, 3, 0, 70, 75, returns=ALL)


def without_keys(how: str, dtype, queries: int):
    """A case, its data, and which of its rows [B, Sq] see nothing."""
    case = replace(BASE, dtype=dtype, queries=queries)
    nothing = torch.zeros(2, queries, dtype=torch.bool)
    if how in ("bool", "float"):
        case = replace(case, mask=how)
        data = make_data(case)
        rows = slice(5, 8) if queries > 8 else slice(0, 1)
        data["attn_mask"] = data["attn_mask"].detach().clone()
        data["attn_mask"][1, :, rows] = False if how == "bool" else -math.inf
        data["attn_mask"].requires_grad_(how == "float")
        nothing[1, rows] = True
        if queries > 2:
            nothing[:, queries // 2] = True
    elif how == "more queries than keys":
        case = replace(case, keys=queries - 5, causal="bottom_right")
        data = make_data(case)
        nothing[:, :5] = True
    elif how == "window beyond the keys":
        case = replace(case, keys=queries - 20, window=(3, 0))
        data = make_data(case)
        nothing[:, queries - 20 + 3 :] = True
    else:
        case = replace(case, lengths=True)
        data = make_data(case)
        nothing[data["key_lengths"] == 0] = True
    return case, data, nothing


WAYS = ["bool", "float", "more queries than keys", "window beyond the keys", "key lengths"]


@pytest.mark.smoke
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("how", WAYS)
@every_dtype
def test_rows_that_see_nothing_are_zero(dtype, how, sinks):
    """Output and weights, and the gradients of their queries; lse is -inf, or the sink."""
    case, data, nothing = without_keys(how, dtype, 70)
    assert nothing.any()
    assert not nothing.all()
    if sinks:
        case = replace(case, sinks=True)
        data["sinks"] = make_data(case)["sinks"]
    results = run_fastseq(case, data)
    for name, x in results.items():
        if name in ("output", "weights", "grad of query"):
            assert not x.transpose(1, 2)[nothing].any(), name
        if name != "lse":
            assert x.isfinite().all(), name
    lse = results["lse"].transpose(1, 2)[nothing]
    if sinks:
        torch.testing.assert_close(lse, data["sinks"].detach().expand_as(lse))
    else:
        assert (lse == -math.inf).all()
        assert results["lse"].transpose(1, 2)[~nothing].isfinite().all()
    check(case, data)
    check(replace(case, returns=()), data)


@pytest.mark.parametrize("how", ["bool", "float", "key lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_query_that_sees_nothing_is_zero(dtype, how):
    case, data, nothing = without_keys(how, dtype, 1)
    assert nothing.any()
    results = run_fastseq(case, data)
    assert not results["output"].transpose(1, 2)[nothing].any()
    assert not results["grad of query"].transpose(1, 2)[nothing].any()
    assert all(x.isfinite().all() for name, x in results.items() if name != "lse")
    check(case, data)


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("mask", ["bool", "float"])
@every_dtype
def test_nothing_visible_at_all_gives_zeros_everywhere(dtype, mask, queries):
    case = replace(BASE, dtype=dtype, queries=queries, mask=mask)
    data = make_data(case)
    data["attn_mask"] = torch.full_like(data["attn_mask"], False if mask == "bool" else -math.inf)
    data["attn_mask"].requires_grad_(mask == "float")
    results = run_fastseq(case, data)
    assert (results.pop("lse") == -math.inf).all()
    for name, x in results.items():
        assert not x.any(), name


@pytest.mark.parametrize("queries", [1, 70])
def test_gradient_of_a_mask_is_zero_where_it_masks(queries):
    case = replace(BASE, queries=queries, mask="float")
    data = make_data(case)
    masked = data["attn_mask"] == -math.inf
    assert masked.any()
    gradient = run_fastseq(case, data)["grad of attn_mask"]
    assert not gradient[masked].any()
    assert gradient[~masked].any()


def poisoned(data, places: dict, poison: float):
    """Copies of the data with `poison` in the given places, and with 0 there."""
    results = []
    for number in (poison, 0.0):
        copies = {name: x.detach().clone() for name, x in data.items()}
        for name, place in places.items():
            copies[name][place] = number
        results.append({name: x.requires_grad_(data[name].requires_grad) for name, x in copies.items()})
    return results


@pytest.mark.smoke
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("how", ["bool", "float", "window", "key lengths", "causal"])
@every_poison
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_that_nobody_sees_reach_nothing(dtype, poison, how, queries):
    """The bits of all results and gradients are those with 0 in their place, and their gradients are 0."""
    case, unseen = replace(BASE, dtype=dtype, queries=queries), slice(40, None)
    if how == "window":
        case, unseen = replace(case, window=(0, 3), keys=100), slice(queries + 3, None)
    elif how == "causal":
        case, unseen = replace(case, causal="top_left", keys=100), slice(queries, None)
    elif how == "key lengths":
        case = replace(case, lengths=True)
    else:
        case, unseen = replace(case, mask=how), slice(33, 37)
    data = make_data(case)
    if how == "key lengths":
        data["key_lengths"] = torch.tensor([40, 13])
    elif how in ("bool", "float"):
        data["attn_mask"] = data["attn_mask"].detach().clone()
        data["attn_mask"][..., unseen] = False if how == "bool" else -math.inf
        data["attn_mask"].requires_grad_(how == "float")
    places = {"key": (slice(None), slice(None), unseen), "value": (slice(None), slice(None), unseen)}
    results, expected = (run_fastseq(case, x) for x in poisoned(data, places, poison))
    assert all(x.isfinite().all() for name, x in results.items() if name != "lse")
    assert_same_bits(results, expected)
    for name, place in places.items():
        assert not results[f"grad of {name}"][place].any()


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@every_poison
@every_dtype
def test_last_key_reaches_only_the_queries_that_see_it(dtype, poison, causal, which):
    """The others' outputs, and under their loss the gradients of their queries, are those of clean data."""
    case = replace(BASE, dtype=dtype, causal=causal, returns=())
    offset = case.keys - case.queries if causal == "bottom_right" else 0
    for first in (1, 37, 64, 66):  # the key that is NaN; queries see it from first - offset on
        blind = max(0, first - offset)
        data = make_data(case)
        results = []
        for x in poisoned(data, {which: (slice(None), slice(None), first)}, poison):
            output = call_fastseq(case, x)["output"]
            incoming = torch.ones_like(output)
            incoming[:, :, blind:] = 0
            (gradient,) = torch.autograd.grad(output, x["query"], incoming)
            results.append({"output": output[:, :, :blind], "gradient": gradient[:, :, :blind]})
        assert_same_bits(*results)
        seeing = call_fastseq(case, poisoned(data, {which: (..., first, slice(None))}, math.nan)[0])["output"]
        assert seeing[:, :, blind:].isnan().all(), "a NaN that is seen is not hidden"


@pytest.mark.parametrize("which", ["query", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_query_reaches_only_the_keys_that_it_sees(dtype, which):
    """NaN in the first query, or in its incoming gradient, leaves the gradients of later keys alone."""
    case = replace(BASE, dtype=dtype, causal="top_left", returns=())
    data = make_data(case)
    for last in (0, 30, 63):
        results = []
        for number in (math.nan, 0.0):
            x = {name: y.detach().clone().requires_grad_() for name, y in data.items()}
            if which == "query":
                with torch.no_grad():
                    x["query"][:, :, : last + 1] = number
            output = call_fastseq(case, x)["output"]
            incoming = torch.ones_like(output)
            if which == "grad":
                incoming[:, :, : last + 1] = number
            gradients = torch.autograd.grad(output, list(x.values()), incoming)
            results.append({name: g[:, :, last + 1 :] for name, g in zip(x, gradients, strict=True)})
        assert_same_bits(*results)


@every_poison
def test_query_that_sees_nothing_reaches_nothing(poison):
    case, data, nothing = without_keys("bool", torch.float32, 70)
    places = {"query": (1, slice(None), slice(5, 8))}
    assert nothing[1, 5:8].all()
    results, expected = (run_fastseq(case, x) for x in poisoned(data, places, poison))
    assert_same_bits(results, expected)
    assert not results["grad of query"][places["query"]].any()


@every_poison
@pytest.mark.parametrize("causal", ["", "bottom_right"])
def test_a_packed_sequence_does_not_reach_its_neighbours(causal, poison):
    case = Case(torch.float32, 3, 2, 0, 40, 66, packed=True, causal=causal, returns=("lse",))
    data = make_data(case)
    q, k = (data[f"cu_seqlens_{name}"].tolist() for name in "qk")
    for b in range(3):
        if q[b] == q[b + 1] or k[b] == k[b + 1]:
            continue
        places = {"query": slice(q[b], q[b + 1])}
        places |= {name: slice(k[b], k[b + 1]) for name in ("key", "value")}
        results, expected = (run_fastseq(case, x) for x in poisoned(data, places, poison))
        for name, x in results.items():
            row = name.removeprefix("grad of ").replace("output", "query").replace("lse", "query")
            others = torch.ones(x.size(1 if name == "lse" else 0), dtype=torch.bool)
            others[places[row]] = False
            part = (slice(None), others) if name == "lse" else others
            assert_same_bits({name: x[part]}, {name: expected[name][part]})


def test_sequences_and_heads_do_not_reach_each_other():
    case = replace(BASE, heads=4, kv_heads=2, returns=ALL)
    data = make_data(case)
    places = {"query": (0, 0), "key": (0, 0), "value": (0, 0)}
    results, expected = (run_fastseq(case, x) for x in poisoned(data, places, math.nan))
    assert results["output"][0, 0].isnan().all()
    for name, x in results.items():
        assert_same_bits({name: x[1]}, {name: expected[name][1]})
        second = slice(1, None) if name in ("grad of key", "grad of value") else slice(2, None)
        assert_same_bits({name: x[0, second]}, {name: expected[name][0, second]})


def test_reference_itself_keeps_nan_out():
    """Or what is compared with it could not tell."""
    case = replace(BASE, dtype=torch.float64, lengths=True)
    data = make_data(case)
    with torch.no_grad():
        data["key"][0, :, int(data["key_lengths"][0]) :] = math.nan
        data["value"][0, :, int(data["key_lengths"][0]) :] = math.nan
        data["query"][data["key_lengths"] == 0] = math.nan
    result = attention(**data)
    gradients = torch.autograd.grad(result.output.sum(), [data["query"], data["key"], data["value"]])
    assert result.output.isfinite().all()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.smoke
@every_dtype
def test_hidden_products_reach_nothing_under_a_soft_cap(dtype):
    """Products that nobody sees are not computed; what lies there instead comes of an earlier call."""
    poison = torch.full((1, 2, 530, 64), math.nan, dtype=dtype, requires_grad=True)
    torch.autograd.grad(fastseq.scaled_dot_product_attention(poison, poison, poison).sum(), poison)
    query, key, value = (torch.randn(1, 2, 530, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(530, 530, dtype=torch.bool).tril()}):
        output = fastseq.scaled_dot_product_attention(query, key, value, softcap=20.0, **options)
        for grad in torch.autograd.grad(output.sum(), (query, key, value)):
            assert grad.isfinite().all()


def test_gradient_of_sinks_does_not_see_rows_without_keys_or_sinks_without_weight():
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([-math.inf, 0.5], requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3] = False
    grad_output = torch.randn(1, 2, 5, 8)
    grad_output[:, :, 3] = math.nan
    output = fastseq.scaled_dot_product_attention(query, key, value, mask, sinks=sinks)
    for grad in torch.autograd.grad(output, (query, key, value, sinks), grad_output):
        assert grad.isfinite().all()


def test_keys_that_no_query_head_reads_get_zero_gradients():
    query = torch.randn(2, 0, 3, 4, requires_grad=True)
    key, value = (torch.randn(2, 1, 5, 4, requires_grad=True) for _ in range(2))
    output = fastseq.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    for grad in torch.autograd.grad(output.sum(), (key, value)):
        assert torch.equal(grad, torch.zeros(2, 1, 5, 4))


LARGE = [-1e20, -1e30, -1e38, 1e20, 1e38, torch.finfo(torch.float32).min]
LARGE = [(size, dtype) for size in LARGE for dtype in (torch.float32, torch.bfloat16, torch.float64)]
LARGE += [(size, torch.float32) for size in (-1e9, -3e15)] + [(torch.finfo(torch.float64).min, torch.float64)]


@pytest.mark.smoke
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize(("size", "dtype"), LARGE, ids=str)
def test_rows_whose_scores_are_all_as_large_attend_to_all_alike(dtype, size, queries):
    """Under a mask of large finite numbers a row may have nothing else. What its scores were is lost,
    as in torch, and the mean of the values is left."""
    keys, eps = 300, torch.finfo(dtype).eps
    data = make_data(Case(dtype, 1, 2, 0, queries, keys, 16))
    mask = torch.full((queries, keys), max(size, torch.finfo(dtype).min), dtype=dtype)
    output, lse, weights = fastseq.scaled_dot_product_attention(
        **data, attn_mask=mask, return_lse=True, return_weights=True
    )
    incoming = torch.randn_like(output)
    output.backward(incoming)
    mean = data["value"].double().mean(2, keepdim=True).expand(output.shape)
    torch.testing.assert_close(output.double(), mean, atol=4 * eps, rtol=0)
    torch.testing.assert_close(
        weights.double(), torch.full_like(weights, 1 / keys).double(), atol=eps, rtol=0
    )
    torch.testing.assert_close(lse.double(), mask[:, 0].double().expand(lse.shape), rtol=4 * eps, atol=0)
    of_values = (incoming.double().sum(2, keepdim=True) / keys).expand(data["value"].shape)
    torch.testing.assert_close(data["value"].grad.double(), of_values, atol=4 * eps, rtol=4 * eps)
    assert data["query"].grad.isfinite().all()
    assert data["key"].grad.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(call_fastseq(BASE, {**data, "attn_mask": mask})["output"], output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_scores_of_any_size_attend_to_all_alike(dtype):
    """Without a mask."""
    value = torch.randn(1, 1, 40, 8, dtype=dtype)
    for exponent in range(0, 18):
        query = torch.full((1, 1, 3, 8), 1.7 * 10**exponent, dtype=dtype)
        for sign in (-1, 1):
            output = fastseq.scaled_dot_product_attention(
                query, sign * query[:, :, :1].expand(1, 1, 40, 8), value
            )
            torch.testing.assert_close(output, value.mean(2, keepdim=True).expand(1, 1, 3, 8))


def test_padding_by_large_finite_numbers_reaches_no_other_sequence():
    """The gradients of the parameters were NaN where one sequence of the batch was padding alone."""
    module = fastseq.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 7, 16)
    padding = torch.tensor([[0.0], [-1e30]]).expand(2, 7)
    output, _ = module(x, x, x, key_padding_mask=padding)
    output[0].sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x[:1], x[:1], x[:1])[0].sum().backward()
    for gradient, p in zip(gradients, module.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)
