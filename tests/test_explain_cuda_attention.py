"""fastseq.explain of attention on CUDA: the kernels and their tiles, and why not those of Hopper GPUs."""

import pytest
import torch

import fastseq
from devices import GPUS, HOPPER
from fastseq.plan_words import _NOT_HOPPER

pytestmark = pytest.mark.cuda_host


@pytest.mark.parametrize("facts", [HOPPER, GPUS["A100"]], ids=str)
def test_explain_tells_the_kernels_and_their_tiles(twin, facts):
    x = torch.randn(2, 4, 100, 64, requires_grad=True)
    with twin.using(facts=facts):
        (call,) = fastseq.explain(fastseq.scaled_dot_product_attention, x, x, x)
    assert call.plan.kernel == "tiles"
    assert call.plan.architecture == f"compute capability {facts[0]}.{facts[1]}"
    assert any("three tf32 products" in reason for reason in call.plan.reasons)
    assert call.backward.kernel == "two_passes"
    assert len(call.backward.words) == 3
    assert "rows by" in str(call)


def test_explain_tells_parts_of_the_keys(twin):
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 2000, 64)
    (call,) = fastseq.explain(fastseq.scaled_dot_product_attention, q, k, k)
    assert call.plan.kernel == "decode"
    assert "keys in 8 parts of 256" in str(call)


# ---- why not the kernels of Hopper GPUs ----

# With the shared memory of an A100.
SMALL = (9, 0, *GPUS["A100"][2:])
HALF = {"queries": 150, "keys": 300, "dtype": torch.bfloat16}
# What is in the way of the forward pass, and of the backward pass that is foretold; "" if nothing.
OBSTACLES = {
    "nothing": (HALF, "", ""),
    "an older GPU": (HALF | {"facts": GPUS["A100"]}, "compute capability 8.0", "compute capability 8.0"),
    "float32": (HALF | {"dtype": torch.float32}, *["elements of more than 16 bits"] * 2),
    "a soft cap": (HALF | {"softcap": 3.0}, *["options other than masks"] * 2),
    "weights": (HALF | {"return_weights": True}, "", "options other than masks"),
    "no keys": (HALF | {"keys": 0}, *["no queries or keys"] * 2),
    "rows of 18 bytes": (
        HALF | {"size": 9},
        *["tensors whose rows do not begin at multiples of 16 bytes"] * 2,
    ),
    "little shared memory": (HALF | {"facts": SMALL, "size": 256}, *["the shared memory of a block"] * 2),
    "a step of decoding": (HALF | {"queries": 1}, "few rows of a key head", ""),
    "keys in parts": (HALF | {"queries": 20, "keys": 700}, "few rows of a key head", ""),
    "a kernel that is forced": (HALF | {"forced": "tiles"}, *["another kernel is forced"] * 2),
    "few keys": (HALF | {"keys": 16}, "", "few keys"),
}


def attend(dtype, queries, keys, size=64, value_size=None, backward=False, **options):
    value_size = size if value_size is None else value_size
    shapes = [(1, 2, queries, size), (1, 2, keys, size), (1, 2, keys, value_size)]
    given = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    result = fastseq.scaled_dot_product_attention(*given, **options)
    output = result[0] if isinstance(result, tuple) else result
    if backward:
        output.backward(torch.randn_like(output))


def explained(twin, facts=None, forced="", **how):
    """The calls, whose kernels are those that ran."""
    with twin.using(facts=facts or HOPPER, attention=forced) as ran:
        calls = fastseq.explain(lambda: attend(**how))
    assert [call.plan.kernel for call in calls] == [plan["kernel"] for plan in ran]
    return calls


def obstacle(plan):
    """Of the reasons, and as the plan has it."""
    (*_, said) = [""] + [reason for reason in plan.reasons if reason.startswith("not hopper: ")]
    assert said.removeprefix("not hopper: ").partition("; ")[0] == plan.partition["not_hopper"]
    assert (plan.kernel == "hopper") == (said == "")
    return plan.partition["not_hopper"]


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_is_in_the_way_of_the_kernels_of_hopper_gpus_is_told(twin, what):
    how, forward, backward = OBSTACLES[what]
    (call,) = explained(twin, **how)
    assert obstacle(call.plan) == forward
    assert obstacle(call.backward) == backward


def test_every_obstacle_has_words_that_say_what_would_change_it():
    met = {obstacle for _, *both in OBSTACLES.values() for obstacle in both if obstacle}
    assert {obstacle for obstacle in met if not obstacle.startswith("compute capability")} == set(_NOT_HOPPER)


# A GPU, the size of heads, and the kernels of the backward pass: deterministic, and not.
ORDERS = [
    (HOPPER, 64, "hopper", "hopper_one_pass"),
    (HOPPER, 256, "hopper", "hopper"),
    (GPUS["A100"], 64, "two_passes", "one_pass"),
]


@pytest.mark.parametrize(("facts", "size", "in_order", "in_any_order"), ORDERS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_one_pass_is_told_once_it_is_known(twin, deterministic, facts, size, in_order, in_any_order):
    how = HALF | {"size": size, "facts": facts}
    forward, backward = explained(twin, **how, backward=True, deterministic=deterministic)
    assert forward.backward.kernel == in_order
    told = any(f"with False it is {in_any_order}" in reason for reason in forward.backward.reasons)
    assert told == (in_order != in_any_order)
    assert not any("foretold" in reason for reason in forward.plan.reasons + backward.plan.reasons)
    assert backward.plan.kernel == (in_order if deterministic else in_any_order)


def test_weights_without_a_gradient_are_nothing_to_the_backward_pass(twin):
    forward, backward = explained(twin, **HALF, backward=True, return_weights=True)
    assert obstacle(forward.backward) == "options other than masks"
    assert obstacle(backward.plan) == ""
