"""Tangents and second derivatives of attention in float64 against finite differences, for every option."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from attention_harness import ALL, Case, call_fastseq, make_data
from test_attention_gradcheck import OPTIONS, SMALL
from tolerances import GRADCHECK

pytestmark = pytest.mark.usefixtures("one_thread")

# How keys are seen, or scored; with each other, in pairs.
PAIRED = ("float mask", "causal", "window", "grouped queries", "softcap", "alibi", "sinks", "dropout")
OF_TILES = {
    "plain": {},
    "causal": {"causal": "top_left", "softcap": 2.0},
    "everything": OPTIONS["everything"],
}


def function_of(case: Case):
    """Attention as a function of the tensors that have derivatives, and these."""
    data = make_data(case)
    names = [name for name, x in data.items() if x.requires_grad]

    def call(*tensors):
        outputs = call_fastseq(case, {**data, **dict(zip(names, tensors, strict=True))})
        # -inf of rows that see nothing has no finite difference; its derivative is 0, as of any constant
        return tuple(x.masked_fill(x == -torch.inf, 0) for x in outputs.values())

    # Nor has -inf in the mask: there it is large and negative instead.
    tensors = (data[name].detach().clamp(min=-30).requires_grad_() for name in names)
    return call, tuple(tensors)


def check_second_derivatives(case: Case):
    """Reverse over reverse mode and forward over reverse mode, along random directions."""
    call, tensors = function_of(case)
    return gradgradcheck(call, tensors, check_fwd_over_rev=True, fast_mode=True, **GRADCHECK)


def returned_by(option: str) -> list[tuple[str, ...]]:
    return [(), ("lse",)] + [ALL] * ("packed" not in option)


@pytest.mark.parametrize("option", OPTIONS)
def test_tangents(option):
    for returns in returned_by(option):
        call, tensors = function_of(replace(SMALL, **OPTIONS[option], returns=returns))
        assert gradcheck(call, tensors, check_forward_ad=True, check_backward_ad=False, **GRADCHECK)


@pytest.mark.smoke
@pytest.mark.parametrize("option", OPTIONS)
def test_second_derivatives(option):
    for returns in returned_by(option):
        assert check_second_derivatives(replace(SMALL, **OPTIONS[option], returns=returns))


@pytest.mark.parametrize("pair", [*combinations(PAIRED, 2)], ids="-".join)
def test_second_derivatives_of_pairs_of_options(pair):
    options = OPTIONS[pair[0]] | OPTIONS[pair[1]]
    assert check_second_derivatives(replace(SMALL, **options, returns=ALL))


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_every_element_of_the_second_derivatives(option):
    case = replace(SMALL, batch=1, **OPTIONS[option], returns=("lse",))
    call, tensors = function_of(case)
    assert gradgradcheck(call, tensors, **GRADCHECK)


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_derivatives_of_the_average_of_the_weights(option):
    case = replace(SMALL, **OPTIONS[option], returns=("weights",), average=True)
    call, tensors = function_of(case)
    assert gradcheck(call, tensors, check_forward_ad=True, fast_mode=True, **GRADCHECK)
    assert check_second_derivatives(case)


@pytest.mark.parametrize("option", OF_TILES)
@pytest.mark.parametrize("shape", [(17, 19, 5), (2, 300, 3), (140, 40, 2), (300, 270, 3)])
def test_derivatives_over_more_than_one_tile(shape, option):
    queries, keys, size = shape
    sizes = {"batch": 1, "queries": queries, "keys": keys, "head_size": size, "value_size": size + 1}
    case = replace(SMALL, **{**OF_TILES[option], **sizes})
    call, tensors = function_of(case)
    assert gradcheck(call, tensors, check_forward_ad=True, fast_mode=True, **GRADCHECK)
    assert check_second_derivatives(case)


@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask", "sinks"])
def test_derivatives_when_only_one_tensor_wants_them(wanted):
    case = replace(SMALL, mask="float", mask_dims="HK", sinks=True, returns=ALL)
    data = make_data(case)

    def call(x):
        given = {name: y.detach() for name, y in data.items()} | {wanted: x}
        return tuple(y.masked_fill(y == -torch.inf, 0) for y in call_fastseq(case, given).values())

    x = data[wanted].detach().clamp(min=-30).requires_grad_()
    assert gradcheck(call, (x,), check_forward_ad=True, check_backward_ad=False, **GRADCHECK)
    assert gradgradcheck(call, (x,), check_fwd_over_rev=True, **GRADCHECK)
