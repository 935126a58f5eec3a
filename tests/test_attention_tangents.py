"""Tangents and second derivatives of attention against a float64 reference, and how exact they are."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from attention_harness import (
    ALL,
    Case,
    as_leaves,
    call_fastseq,
    call_reference,
    kept_weights,
    make_data,
    nudged,
)
from attention_harness import LAYOUTS as ALL_LAYOUTS
from harness import DTYPES, assert_same_bits, threads
from tolerances import assert_as_accurate_as_torch, largest

pytestmark = pytest.mark.usefixtures("one_thread")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BASE = Case(torch.float32, 2, 4, 0, 37, 75, 16, 24)
OPTIONS = {
    "plain": {},
    "bool mask": {"mask": "bool"},
    "float mask": {"mask": "float"},
    "float mask of keys": {"mask": "float", "mask_dims": "BK"},
    "float mask of heads": {"mask": "float32", "mask_dims": "HQK"},
    "causal": {"causal": "top_left"},
    "causal from the end": {"causal": "bottom_right", "queries": 80},
    "window": {"causal": "bottom_right", "window": (20, 3)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "BH"},
    "sinks": {"sinks": True},
    "key lengths": {"lengths": True},
    "grouped queries": {"kv_heads": 2},
    "one query": {"queries": 1},
    "no keys": {"keys": 0},
    "packed": {"packed": True},
    "packed from the end": {"packed": True, "causal": "bottom_right", "sinks": True, "kv_heads": 1},
    "dropout": {"dropout": 0.3},
    "everything": {
        "mask": "float",
        "mask_dims": "HQK",
        "causal": "bottom_right",
        "window": (30, 0),
        "kv_heads": 2,
        "softcap": 2.0,
        "alibi": "H",
        "sinks": True,
        "lengths": True,
        "dropout": 0.2,
    },
}


SIZES = [(300, 270, 64, 64), (5, 1030, 33, 7), (129, 65, 64, 128), (1, 1, 1, 1)]


def like(x, g, dtype):
    """Random numbers, of the dtype's precision whatever the dtype of x."""
    dtype = dtype if x.is_floating_point() else x.dtype
    return torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype).to(x.dtype)


def tangents_of(call, data, dtype, seed=5):
    """Of the results, along random tangents of all tensors that have derivatives."""
    g = torch.Generator().manual_seed(seed)
    tangents = {name: like(x, g, dtype) for name, x in data.items() if x.requires_grad}
    data = {name: x.detach() for name, x in data.items()}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(data[name], t) for name, t in tangents.items()}
        results = {name: forward_ad.unpack_dual(y) for name, y in call({**data, **duals}).items()}
        return {f"tangent of {name}": y.tangent for name, y in results.items()}


def second_derivatives_of(call, data, dtype, seed=6):
    """The gradients, under random gradients of the results, of random sums of all gradients."""
    g = torch.Generator().manual_seed(seed)
    results = call(data)
    incoming = {f"grad of {name}": like(y.detach(), g, dtype) for name, y in results.items()}
    for x in incoming.values():
        x.requires_grad_()
    leaves = {name: x for name, x in data.items() if x.requires_grad}
    grads = torch.autograd.grad(
        list(results.values()), list(leaves.values()), list(incoming.values()), create_graph=True
    )
    along = [like(x.detach(), g, dtype) for x in grads]
    wanted = leaves | incoming
    found = torch.autograd.grad(grads, list(wanted.values()), along)
    return {f"second derivative for {name}": x for name, x in zip(wanted, found, strict=True)}


def derivatives_of(call, data, dtype):
    return tangents_of(call, data, dtype) | second_derivatives_of(call, as_leaves(data), dtype)


def run_fastseq(case, data):
    return derivatives_of(lambda given: call_fastseq(case, given), data, case.dtype)


def run_reference(case, data, keep, dtype):
    def call(given):
        results, _ = call_reference(case, given, keep)
        return {name: results[name] for name in ("output", *case.returns)}

    with threads(1):
        return derivatives_of(call, as_leaves(data, dtype), case.dtype)


def worst_of_torch(case, data, exact):
    """`exact`, as far off as torch is at its worst on data like these, in proportion to each result."""
    worst = dict.fromkeys(exact, 0.0)
    for seed in range(8):
        its = nudged(data, seed)
        keep = kept_weights(case, its)
        right, theirs = (
            run_reference(case, its, keep, torch.float64),
            run_reference(case, its, keep, case.dtype),
        )
        for name, x in right.items():
            error = largest(theirs[name].double() - x)
            worst[name] = max(worst[name], error / largest(x) if largest(x) else 0.0)
    return {name: x + worst[name] * largest(x) for name, x in exact.items()}


def check(case, data=None):
    data = data or make_data(case)
    keep = kept_weights(case, data)
    exact = run_reference(case, data, keep, torch.float64)
    ours = run_fastseq(case, data)
    assert ours.keys() == exact.keys()

    def compare(torchs, what):
        for name, x in exact.items():
            # Sums of terms that cancel, and of float64 the reference is as far off as we are.
            size = 8 * largest(x) if case.dtype is torch.float64 else 0.0
            units = max(case.dtype, ours[name].dtype, key=lambda d: torch.finfo(d).eps)
            dtype = ours[name].dtype
            assert_as_accurate_as_torch(ours[name], torchs[name], x, dtype, name + what, units, size)

    try:
        compare(run_reference(case, data, keep, case.dtype), "")
    except AssertionError:
        compare(worst_of_torch(case, data, exact), " (torch at its worst)")


@pytest.mark.parametrize("option", OPTIONS)
@every_dtype
def test_derivatives_match_float64_reference(dtype, option):
    case = replace(BASE, **({"dtype": dtype} | OPTIONS[option]))
    if dtype is torch.float64:  # so that the reference gets the same tangent of the mask
        case = replace(case, mask=case.mask.replace("float32", "float"))
    check(replace(case, returns=("lse",)))
    if not case.packed:
        check(replace(case, returns=ALL))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "sizes", [(300, 270, 64, 64), (5, 1030, 33, 7), (129, 65, 64, 128), (1, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("option", ["plain", "causal", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_match_float64_reference(dtype, option, sizes):
    queries, keys, head_size, value_size = sizes
    case = replace(BASE, **OPTIONS[option], dtype=dtype, batch=1 if keys > 500 else 2)
    check(replace(case, queries=queries, keys=keys, head_size=head_size, value_size=value_size))


@pytest.mark.parametrize("layout", [name for name in ALL_LAYOUTS if name != "BHSD"])
def test_derivatives_are_the_same_bits_in_every_layout(layout):
    case = replace(BASE, mask="float", returns=("lse",))
    assert_same_bits(
        run_fastseq(replace(case, layout=layout), make_data(replace(case, layout=layout))),
        run_fastseq(case, make_data(case)),
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("option", ["plain", "float mask of keys", "everything"])
def test_derivatives_are_the_same_bits_every_time(option, count):
    case = replace(BASE, **OPTIONS[option], returns=ALL)
    data = make_data(case)
    torch.set_num_threads(count)
    first = run_fastseq(case, data)
    for _ in range(3):
        assert_same_bits(run_fastseq(case, data), first)


# ------------------------------------------------------------------------------------------ what nobody sees


def poisoned(data, tangents, hidden, poison):
    """Both with `poison` wherever `hidden`, by name, says."""
    spoil = {}
    for given in (data, tangents):
        changed = dict(given)
        for name, where in hidden.items():
            if name in given:
                x = given[name].detach().clone()
                x[where.expand(x.shape)] = poison
                changed[name] = x
        spoil[id(given)] = changed
    return spoil[id(data)], spoil[id(tangents)]


def all_derivatives(case, data, tangents, incoming, changes):
    """By the function itself: tangents, and second derivatives along these tangents."""
    data = {name: x.detach().requires_grad_(name in tangents) for name, x in data.items()}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(data[name].detach(), t) for name, t in tangents.items()}
        results = call_fastseq(case, {**data, **duals})
        found = {f"tangent of {n}": forward_ad.unpack_dual(y).tangent for n, y in results.items()}
    results = call_fastseq(case, data)
    incoming = {name: incoming[name].detach().requires_grad_() for name in results}
    leaves = [data[name] for name in tangents]
    grads = torch.autograd.grad(list(results.values()), leaves, list(incoming.values()), create_graph=True)
    second = torch.autograd.grad(grads, [*leaves, *incoming.values()], [changes[name] for name in tangents])
    names = [*tangents, *(f"grad of {name}" for name in incoming)]
    return found | {f"second for {name}": x for name, x in zip(names, second, strict=True)}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("how", ["key lengths", "bool mask", "float mask", "window"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_hidden_reaches_no_derivative(dtype, how, poison):
    """Keys that nobody sees, queries that see nothing, and all that belongs to them."""
    case = replace(BASE, dtype=dtype, returns=ALL, value_size=16)
    keys, rows = torch.zeros(2, 75, dtype=torch.bool), torch.zeros(2, 37, dtype=torch.bool)
    data = make_data(case)
    if how == "key lengths":
        data["key_lengths"] = torch.tensor([75, 40])
        keys[1, 40:] = True
    elif how == "window":
        case = replace(case, window=(10, 0), causal="top_left")
        keys[:, 37:] = True
    else:
        keys[:, 5:9], rows[1, 20:22] = True, True
        hidden = keys[:, None, None, :] | rows[:, None, :, None]
        if how == "bool mask":
            data["attn_mask"] = ~hidden
        else:
            data["attn_mask"] = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -math.inf)
            data["attn_mask"].requires_grad_()
    g = torch.Generator().manual_seed(7)
    tangents = {name: like(x.detach(), g, dtype) for name, x in data.items() if x.requires_grad}
    changes = {name: like(x.detach(), g, dtype) for name, x in data.items() if x.requires_grad}
    results = call_fastseq(case, data)
    incoming = {name: like(y.detach(), g, dtype) for name, y in results.items()}
    clean = all_derivatives(case, data, tangents, incoming, changes)

    of_keys, of_rows = keys[:, None, :, None], rows[:, None, :, None]
    where = {"key": of_keys, "value": of_keys, "query": of_rows}
    only_tangents = {"attn_mask": (keys[:, None, None, :] | of_rows)} if how == "float mask" else {}
    data, tangents = poisoned(data, tangents, where, poison)
    _, tangents = poisoned({}, tangents, only_tangents, poison)
    _, changes = poisoned({}, changes, where | only_tangents, poison)
    if how != "window":
        _, incoming = poisoned({}, incoming, {"output": of_rows}, poison)
        incoming["lse"] = incoming["lse"].masked_fill(rows[:, None, :], poison)
    for name, x in all_derivatives(case, data, tangents, incoming, changes).items():
        assert torch.equal(x, clean[name]), name
        assert x.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_visible_value_reaches_only_those_who_see_it(dtype):
    case = replace(BASE, dtype=dtype, queries=75, causal="top_left")
    data = make_data(case)
    call = lambda given: call_fastseq(case, given)  # noqa: E731
    clean = tangents_of(call, data, dtype)["tangent of output"]
    data["value"] = data["value"].detach().clone()
    data["value"][0, 1, 50, 3] = math.nan
    data["value"].requires_grad_()
    found = tangents_of(call, data, dtype)["tangent of output"]
    assert found[0, 1, 50:, 3].isnan().all()
    assert found[0, 1, 50:, :3].isfinite().all()
    found[0, 1, 50:] = clean[0, 1, 50:]
    assert torch.equal(found, clean)
