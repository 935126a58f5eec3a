"""The weights of attention in inference, and their mean over the heads, where nothing larger is made."""

import math
from dataclasses import replace

import pytest
import torch

import fastseq
from attention_harness import Case, call_fastseq, check, make_data
from harness import DTYPES, threads

OPTIONS = {
    "plain": {},
    "bool mask": {"mask": "bool"},
    "float mask of keys": {"mask": "float", "mask_dims": "BK"},
    "causal": {"causal": "top_left"},
    "causal from the end": {"causal": "bottom_right"},
    "window": {"causal": "bottom_right", "window": (40, 0)},
    "grouped queries": {"heads": 6, "kv_heads": 2},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "H"},
    "sinks": {"sinks": True},
    "key lengths": {"lengths": True, "batch": 3},
    "dropout": {"dropout": 0.3},
    "one head": {"heads": 1},
}
LENGTHS = [(1, 131), (130, 130), (70, 530), (300, 7)]

every_option = pytest.mark.parametrize("option", OPTIONS)
every_average = pytest.mark.parametrize("average", [False, True], ids=["each head", "mean"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def without_gradients(case):
    return {name: x.detach() for name, x in make_data(case).items()}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@every_average
@every_option
@every_dtype
def test_weights_in_inference_match_float64_reference(dtype, option, average, queries, keys):
    case = Case(dtype, 2, 3, 0, queries, keys, 24, returns=("weights",), average=average)
    case = replace(case, **OPTIONS[option])
    check(case, without_gradients(case))


@pytest.mark.smoke
@every_average
@every_option
@every_dtype
def test_weights_in_inference_match_on_every_instruction_set(dtype, option, average):
    case = Case(dtype, 2, 2, 0, 35, 70, 19, returns=("weights",), average=average)
    case = replace(case, **OPTIONS[option])
    check(case, without_gradients(case))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@every_average
@pytest.mark.parametrize("option", ["plain", "causal", "window", "key lengths", "bool mask"])
def test_every_weight_is_written(option, average):
    """Those of keys that a query does not see too, as 0: over several tiles, some of which nobody sees."""
    case = replace(Case(queries=300, keys=900, returns=("weights",), average=average), **OPTIONS[option])
    weights = call_fastseq(case, without_gradients(case))["weights"]
    assert weights.isfinite().all()
    assert (weights == 0).any() == (option != "plain")


@every_option
def test_mean_in_inference_is_that_of_training(option):
    """There torch takes the mean of each head's, which were rounded."""
    case = replace(Case(torch.float64, 2, 3, 0, 40, 300, 8, returns=("weights",)), **OPTIONS[option])
    data = make_data(case)
    training = call_fastseq(replace(case, average=True), data)["weights"]
    inference = call_fastseq(replace(case, average=True), without_gradients(case))["weights"]
    assert training.requires_grad
    torch.testing.assert_close(inference, training.detach(), atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_the_mean_lacks_the_dimension_of_heads(rank):
    query = torch.randn((2, 5, 4, 7, 8)[-rank:])
    arguments = {"return_weights": True, "average_weights": True}
    _, weights = fastseq.scaled_dot_product_attention(query, query, query, **arguments)
    assert weights.shape == ((2, 5) if rank == 5 else (5,) if rank == 4 else ()) + (7, 7)


def test_without_heads_the_mean_is_nan_as_torchs_is():
    query, key = torch.randn(2, 0, 3, 8), torch.randn(2, 1, 5, 8)
    arguments = {"enable_gqa": True, "return_weights": True, "average_weights": True}
    _, weights = fastseq.scaled_dot_product_attention(query, key, key, **arguments)
    assert weights.shape == (2, 3, 5)
    assert weights.isnan().all()


def test_average_alone_returns_no_weights():
    query = torch.randn(1, 2, 3, 4)
    result = fastseq.scaled_dot_product_attention(query, query, query, average_weights=True)
    assert torch.equal(result, fastseq.scaled_dot_product_attention(query, query, query))


def test_nothing_larger_than_the_mean_is_made():
    case = Case(heads=8, queries=50, keys=60, returns=("weights",), average=True)
    query, key, value = without_gradients(case).values()
    options = [None] * 7 + [1 / math.sqrt(8), 0.0, 0.0, -1, -1, False, True, True]
    weights = torch.ops.fastseq.attention(query, key, value, *options)[2]
    assert weights.shape == (2, 1, 50, 60)
    assert weights.untyped_storage().nbytes() == 2 * 50 * 60 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_mean_is_the_same_bits_whatever_the_threads_and_the_batch(dtype, count):
    case = Case(dtype, 3, 4, 0, 200, 530, 16, returns=("weights",), average=True)
    data = without_gradients(case)
    with threads(1):
        expected = call_fastseq(case, data)["weights"]
    with threads(count):
        assert torch.equal(call_fastseq(case, data)["weights"], expected)
        row = {name: x[1:2] for name, x in data.items()}
        assert torch.equal(call_fastseq(case, row)["weights"], expected[1:2])
