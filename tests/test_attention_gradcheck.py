"""torch.autograd.gradcheck of attention in float64: the analytic gradients against finite differences."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from attention_harness import ALL, Case, call_fastseq, make_data
from tolerances import GRADCHECK

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Case(torch.float64, 2, 2, 0, 3, 4, 2, 3)
OPTIONS = {
    "plain": {},
    "one query": {"queries": 1, "keys": 5},
    "one key": {"queries": 3, "keys": 1},
    "bool mask": {"mask": "bool"},
    "float mask": {"mask": "float"},
    "float mask of all": {"mask": "float", "mask_dims": ""},
    "float mask of keys": {"mask": "float", "mask_dims": "BK"},
    "float mask of queries": {"mask": "float", "mask_dims": "HQ"},
    "causal": {"causal": "top_left"},
    "causal from the end": {"causal": "bottom_right", "queries": 4, "keys": 3},
    "window": {"window": (1, 1)},
    "window from the end": {"causal": "bottom_right", "window": (1, 0)},
    "grouped queries": {"heads": 2, "kv_heads": 1},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": "H"},
    "alibi of batches": {"alibi": "BH", "causal": "bottom_right"},
    "sinks": {"sinks": True},
    "key lengths": {"lengths": True},
    "packed": {"packed": True},
    "packed from the end": {"packed": True, "causal": "bottom_right", "heads": 2, "kv_heads": 1},
    "dropout": {"dropout": 0.4},
    "scale": {"scale": -0.8},
    "layout": {"layout": "BSHD"},
    "everything": {
        "mask": "float",
        "mask_dims": "HQK",
        "causal": "bottom_right",
        "window": (2, 0),
        "heads": 2,
        "kv_heads": 1,
        "softcap": 1.0,
        "alibi": "H",
        "sinks": True,
        "lengths": True,
        "dropout": 0.3,
    },
}


def gradcheck_case(case: Case):
    data = make_data(case)
    names = [name for name, x in data.items() if x.requires_grad]

    def call(*tensors):
        outputs = call_fastseq(case, {**data, **dict(zip(names, tensors, strict=True))})
        # -inf of rows that see nothing has no finite difference; the gradient is 0, as of any constant
        return tuple(x.masked_fill(x == -torch.inf, 0) for x in outputs.values())

    tensors = [data[name] for name in names]
    if "attn_mask" in names:  # nor has -inf in the mask: there it is large and negative instead
        at = names.index("attn_mask")
        tensors[at] = tensors[at].detach().clamp(min=-30).requires_grad_()
    return gradcheck(call, tuple(tensors), **GRADCHECK)


@pytest.mark.smoke
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_of_the_output(option):
    assert gradcheck_case(replace(SMALL, **OPTIONS[option]))


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_of_lse(option):
    case = replace(SMALL, **OPTIONS[option])
    assert gradcheck_case(replace(case, returns=("lse",)))


@pytest.mark.parametrize("option", [option for option in OPTIONS if "packed" not in option])
def test_gradients_of_the_weights(option):
    case = replace(SMALL, **OPTIONS[option])
    assert gradcheck_case(replace(case, returns=ALL))


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_gradients_of_the_average_of_the_weights(option):
    case = replace(SMALL, **OPTIONS[option])
    assert gradcheck_case(replace(case, returns=("weights",), average=True))


@pytest.mark.parametrize("option", ["plain", "causal", "float mask", "everything"])
@pytest.mark.parametrize("shape", [(17, 19, 5), (2, 70, 3), (66, 3, 2)])
def test_gradients_over_more_than_one_tile(shape, option):
    """Along random directions, where every element would take too long."""
    queries, keys, size = shape
    sizes = {"batch": 1, "queries": queries, "keys": keys, "head_size": size, "value_size": size + 1}
    case = replace(SMALL, **{**OPTIONS[option], **sizes})
    data = make_data(case)
    names = [name for name, x in data.items() if x.requires_grad]
    tensors = [data[name].detach().clamp(min=-30).requires_grad_() for name in names]

    def call(*tensors):
        return call_fastseq(case, {**data, **dict(zip(names, tensors, strict=True))})["output"]

    assert gradcheck(call, tuple(tensors), fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask", "sinks"])
def test_gradients_when_only_one_tensor_wants_one(wanted, queries):
    """The gradient is the one that it gets when all want theirs; nothing else gets any."""
    case = replace(SMALL, queries=queries, mask="float", mask_dims="HK", sinks=True, returns=ALL)
    data = make_data(case)

    def gradients(leaves):
        loss = sum(
            x.masked_fill(x == -torch.inf, 0).square().sum() for x in call_fastseq(case, data).values()
        )
        return torch.autograd.grad(loss, leaves)

    names = [name for name, x in data.items() if x.requires_grad]
    everything = dict(zip(names, gradients([data[name] for name in names]), strict=True))
    for name in names:
        data[name].requires_grad_(name == wanted)
    (alone,) = gradients([data[wanted]])
    assert torch.equal(alone, everything[wanted])
