"""The shapes on which other implementations of attention were wrong, one by one."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastseq
from attention_harness import ALL, Case, call_fastseq, check, make_data, run_fastseq
from attention_reference import attention
from harness import DTYPES
from tolerances import assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("one_thread")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("length", [64, 192, 320])
@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lengths_that_leave_64_of_128_with_a_mask(dtype, mask, length):
    """Gave NaN."""
    case = Case(dtype, 1, 2, 0, length, length, 64, mask=mask)
    assert all(x.isfinite().all() for x in run_fastseq(case, make_data(case)).values())
    check(case)


@pytest.mark.parametrize("dims", ["QK", "K", "BHQK"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_mask_beside_16_bit_query_is_not_read_as_16_bit(dtype, dims):
    """Was. A value like 1/3 has low bits that would be numbers of their own."""
    case = Case(dtype, 2, 2, 0, 66, 66, 16, mask="float32", mask_dims=dims)
    data = make_data(case)
    data["attn_mask"] = (data["attn_mask"].detach() / 3).requires_grad_()
    check(case, data)
    check(replace(case, queries=1), {**data, "query": data["query"][:, :, :1], "attn_mask": first_row(data)})


def first_row(data):
    return data["attn_mask"].detach()[:, :, :1].clone().requires_grad_()


@pytest.mark.parametrize("keys", [1, 5, 64, 300])
@pytest.mark.parametrize("heads", [(2, 0), (8, 2)])
@every_dtype
def test_gradients_of_keys_and_values_under_one_query(dtype, heads, keys):
    """Were NaN."""
    case = Case(dtype, 2, *heads, 1, keys, 16)
    results = run_fastseq(case, make_data(case))
    assert all(x.isfinite().all() for x in results.values())
    assert results["grad of value"].any()
    check(case)
    check(replace(case, lengths=True, batch=3))


@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (40, 40)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_torchs_causal_biases_are_alignments(bias, queries, keys):
    """They are tensors, of memory that nobody has written."""
    case = Case(torch.float32, 2, 4, 0, queries, keys, 8)
    data = make_data(case)
    output = fastseq.scaled_dot_product_attention(**data, attn_mask=bias(queries, keys))
    alignment = "top_left" if bias is causal_upper_left else "bottom_right"
    assert torch.equal(output, fastseq.scaled_dot_product_attention(**data, causal=alignment))
    if queries <= keys:
        theirs = torch.nn.functional.scaled_dot_product_attention(**data, attn_mask=bias(queries, keys))
        torch.testing.assert_close(output, theirs)


@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (1, 8), (8, 1), (100, 228), (228, 100)])
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_causal_where_queries_and_keys_differ_in_number(causal, queries, keys):
    """Both alignments were called causal, by different libraries. Equal scores show who is seen."""
    case = Case(torch.float64, 1, 1, 0, queries, keys, causal=causal, returns=ALL)
    data = make_data(case)
    data["query"] = torch.zeros_like(data["query"])
    results = call_fastseq(case, data)
    offset = keys - queries if causal == "bottom_right" else 0
    for i, row in enumerate(results["weights"][0, 0]):
        count = min(max(i + offset + 1, 0), keys)
        expected = torch.zeros(keys, dtype=torch.float64)
        expected[:count] = 1 / max(count, 1)
        torch.testing.assert_close(row, expected)
    check(case)


@pytest.mark.parametrize("head_size", [1, 2, 5, 7, 9, 12, 20, 33, 63, 65, 100, 127, 129, 255])
@every_dtype
def test_head_sizes_that_are_no_multiple_of_8(dtype, head_size):
    """Were refused, or padded by a copy."""
    check(Case(dtype, 1, 2, 0, 20, 40, head_size, causal="bottom_right"))
    check(Case(dtype, 2, 2, 0, 1, 40, head_size, layout="BSHD"))


@pytest.mark.parametrize("dims", ["", "B", "H", "Q", "K", "HQK", "QK", "BQK"])
@every_dtype
def test_gradient_of_a_bias_that_is_broadcast(dtype, dims):
    """Was missing, or of the first row alone."""
    case = Case(dtype, 3, 2, 0, 33, 40, mask="float", mask_dims=dims)
    data = make_data(case)
    results = run_fastseq(case, data)
    assert results["grad of attn_mask"].shape == data["attn_mask"].shape
    check(case, data)


LONG = 70_000  # more than 16 bits count


@pytest.mark.parametrize("extent", ["batch", "heads", "queries", "keys", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_65535_of_everything(dtype, extent):
    case = Case(dtype, 1, 1, 0, 2, 3, 2)
    if extent == "packed":
        lengths = torch.ones(LONG, dtype=torch.int64)
        starts = torch.arange(LONG + 1)
        g = torch.Generator().manual_seed(1)
        data = {
            name: torch.randn(len(lengths), 1, 2, generator=g).to(dtype).requires_grad_()
            for name in ("query", "key", "value")
        }
        output = fastseq.scaled_dot_product_attention(**data, cu_seqlens_q=starts, cu_seqlens_k=starts)
        exact = data["value"].detach().double()
        assert_as_accurate_as_torch(output.detach(), data["value"].detach(), exact, dtype, "one key each")
        (gradient,) = torch.autograd.grad(output.sum(), data["value"])
        ones = torch.ones_like(gradient)
        assert_as_accurate_as_torch(gradient, ones, ones.double(), dtype, "gradient of one key each")
        return
    check(replace(case, **{extent: LONG, "returns": ("lse",)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window_in_a_sequence_longer_than_65535(dtype):
    """The rows in the middle and at the end are those of a call with their keys alone."""
    case = Case(dtype, 1, 1, 0, LONG, LONG, 8, causal="top_left", window=(100, 0))
    data = {name: x.detach() for name, x in make_data(case).items()}
    whole = call_fastseq(case, data)["output"]
    for end in (300, LONG // 2, 65_536 + 50, LONG):
        part = {name: x[:, :, end - 300 : end] for name, x in data.items()}
        alone = call_fastseq(case, part)["output"]
        exact = attention(
            **{n: x.double() for n, x in part.items()}, causal="top_left", window=(100, 0)
        ).output
        results = [whole[:, :, end - 200 : end], alone[:, :, 100:], exact[:, :, 100:]]
        assert_as_accurate_as_torch(*results, dtype, f"rows before {end}")


def test_strides_beyond_32_bits(tmp_path):
    """Heads that lie 3 * 2^30 elements apart, in a file with holes that takes no room."""
    path = tmp_path / "sparse"
    step = 3 * 2**30
    with open(path, "wb") as file:
        file.truncate((2 * step + 200) * 4)
    mapped = torch.from_file(str(path), shared=True, size=2 * step + 200)
    values = torch.randn(1, 3, 9, 8)
    x = mapped.as_strided((1, 3, 9, 8), (1, step, 8, 1))
    x.copy_(values)
    assert torch.equal(
        fastseq.scaled_dot_product_attention(x, x, x),
        fastseq.scaled_dot_product_attention(values, values, values),
    )
    mask = mapped[: 2 * step + 81].as_strided((1, 3, 9, 9), (1, step, 9, 1))
    scores = torch.randn(1, 3, 9, 9)
    mask.copy_(scores)
    assert torch.equal(
        fastseq.scaled_dot_product_attention(values, values, values, mask),
        fastseq.scaled_dot_product_attention(values, values, values, scores),
    )
