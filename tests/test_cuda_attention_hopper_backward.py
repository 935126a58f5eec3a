"""The backward kernels of attention for compute capability 9.0, on the host twin and on such a GPU: which
calls the plan gives to them, what they compute, and that no wait can be left out."""

import math
from dataclasses import replace

import pytest
import torch

import cuda_host
import fastseq
from attention_harness import (
    LAYOUTS,
    Case,
    assert_right,
    make_data,
    run_fastseq,
    run_reference,
    run_torch,
    worst_of_torch,
)
from devices import GPUS, HOPPER
from fastseq import _C
from fastseq.cuda_attention import Problem
from harness import as_leaves, assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.bfloat16, torch.float16]
SIZES = [64, 96, 128, 192, 256]
FEW_KEYS = 16
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_size = pytest.mark.parametrize("size", SIZES)
every_poison = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
CASE = Case(torch.bfloat16, 2, 2, 0, 150, 170)


def plan(facts=HOPPER, forced="", **changed):
    """In words, of a backward pass that these kernels can do unless something is changed."""
    problem = Problem(
        dtype=_C.DTYPES["bfloat16"],
        tf32=False,
        packed=False,
        backward=True,
        batch=2,
        heads=4,
        kv_heads=4,
        queries=300,
        keys=300,
        head_size=128,
        value_size=128,
        options=False,
        only_mask=True,
        tma=True,
        weights=False,
        of_mask=False,
        mask_has_batch=False,
        mask_has_head=False,
        mask_has_query=False,
        mask_has_key=False,
        one_pass=False,
    )
    return cuda_host.load().cuda_attention_plan(problem._replace(**changed), facts, forced).describe()


def tile(size, which, what="own"):
    return plan(head_size=size, value_size=size)["passes"][which][what]


@pytest.fixture
def hopper(device):
    if device.is_gpu and device.facts[:2] != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")
    return device


def run(device, case, data, kernel="hopper"):
    """Results and gradients, by this backward kernel."""
    device.module.ran.clear()
    results = run_fastseq(case, as_leaves(data, where=device.where) if device.is_gpu else data)
    ran = [plan["kernel"] for plan in device.module.ran if plan["pass"] == "backward"]
    assert set(ran) == ({kernel} if kernel else set())
    return results


def check(device, case, data=None, kernel="hopper"):
    """Against the float64 reference; as attention_harness.check."""
    data = data or make_data(case)
    ours = run(device, case, data, kernel)
    exact, scores = run_reference(case, data)
    try:
        assert_right(case, data, ours, run_torch(case, data), exact, scores)
    except AssertionError:
        torchs = worst_of_torch(case, data, exact)
        assert_right(case, data, ours, torchs, exact, scores, " (torch at its worst)")


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.cuda_host
@pytest.mark.parametrize("mask", [False, True])
@every_size
def test_tiles_fit_into_shared_memory(size, mask):
    chosen = plan(GPUS["H200"], head_size=size, value_size=size, options=mask)
    assert chosen["kernel"] == "hopper"
    for name in ("grad_queries", "grad_keys"):
        tiles = chosen["passes"][name]
        assert tiles["threads"] == 384
        assert tiles["shared_bytes"] <= 227 * 1024
        assert tiles["other"] % 16 == 0


@pytest.mark.cuda_host
@pytest.mark.parametrize("packed", [False, True])
def test_each_tile_of_queries_and_keys_has_a_block(packed):
    chosen = plan(packed=packed, kv_heads=2, queries=1000, keys=700)["passes"]
    queries, keys = chosen["grad_queries"], chosen["grad_keys"]
    if packed:
        assert queries["blocks"] == 4 * (1000 // queries["own"] + 2)
        assert keys["blocks"] == 2 * (700 // keys["own"] + 2)
    else:
        assert queries["blocks"] == 2 * 4 * -(-1000 // queries["own"])
        assert keys["blocks"] == 2 * 2 * -(-700 // keys["own"])


CANNOT = {
    "compute capability 8.0": {"facts": GPUS["A100"]},
    "compute capability 8.9": {"facts": GPUS["RTX"]},
    "compute capability 12.0": {"facts": (12, 0, 12, 232448, 62914560)},
    "elements of more than 16 bits": {"dtype": _C.DTYPES["float32"]},
    "tensors whose rows do not begin at multiples of 16 bytes": {"tma": False},
    "options other than masks": {"only_mask": False, "options": True},
    "no queries or keys": {"queries": 0},
    "heads without features": {"value_size": 0},
}
LITTLE_MEMORY = (9, 0, 12, 100000, 62914560)


@pytest.mark.cuda_host
@pytest.mark.parametrize("changed", [*CANNOT.values(), {"keys": FEW_KEYS}, {"facts": LITTLE_MEMORY}], ids=str)
def test_others_are_left_to_the_general_kernels(changed):
    assert plan(**changed)["kernel"] == "two_passes"


@pytest.mark.cuda_host
@pytest.mark.parametrize("forced", ["tiles", "tiles:3", "decode", "decode:3", "hopper"])
def test_only_tiles_forces_the_general_kernels(forced):
    """Whatever else may be forced is the forward pass's."""
    kernel = "two_passes" if forced.startswith("tiles") else "hopper"
    chosen, free = plan(forced=forced), plan(facts=HOPPER if kernel == "hopper" else GPUS["A100"])
    assert chosen.pop("not_hopper") == ("" if kernel == "hopper" else "another kernel is forced")
    assert chosen.items() <= free.items()
    assert chosen["kernel"] == kernel


@pytest.mark.cuda_host
def test_few_keys_are_taken_if_they_are_forced():
    assert plan(forced="hopper", keys=FEW_KEYS)["kernel"] == "hopper"


@pytest.mark.cuda_host
@pytest.mark.parametrize("reason", CANNOT)
def test_forced_where_they_cannot_they_are_an_error(reason):
    with pytest.raises(RuntimeError, match=rf"hopper, forced, with {reason}\naccepted: .*\ntry: .*tiles"):
        plan(forced="hopper", **CANNOT[reason])
    with pytest.raises(RuntimeError, match=r"tiles of .* bytes\naccepted: tiles of up to 100000 bytes"):
        plan(LITTLE_MEMORY, "hopper")


OTHERS = {
    "soft cap": {"softcap": 3.0},
    "slopes": {"alibi": "H"},
    "dropout": {"dropout": 0.3},
    "few keys": {"keys": FEW_KEYS},
    "odd rows": {"head_size": 60},
    "not aligned": {"layout": "off by one element"},
    "weights with gradients": {"returns": ("weights",)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_calls_that_are_left_to_the_general_kernels(hopper, name):
    case = replace(CASE, **{"head_size": 64, "keys": 90, **OTHERS[name]})
    run(hopper, case, make_data(case), "two_passes")


@pytest.mark.parametrize(("forced", "kernel"), [("tiles", "two_passes"), ("hopper", "hopper")])
def test_the_forced_kernel_runs(hopper, forced, kernel):
    case = replace(CASE, head_size=64)
    with hopper.using(attention=forced):
        check(hopper, case, kernel=kernel)


@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "SBHD", "HSBD", "every other row, head and batch"])
def test_any_order_of_batch_heads_and_rows(hopper, layout):
    check(hopper, replace(CASE, head_size=64, queries=70, layout=layout))
    assert layout in LAYOUTS


INCOMING = {
    "of a sum": lambda x: torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape),
    "of a mean over the queries": lambda x: x[:, :, :1].expand(x.shape),
    "of one of two heads": lambda x: x[:, 1:].expand(x.shape),
    "not aligned": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
}


@pytest.mark.parametrize("how", INCOMING)
def test_gradients_of_outputs_that_do_not_fit_are_copied(hopper, how):
    data = as_leaves(make_data(replace(CASE, head_size=64)), where=hopper.where)
    output = fastseq.scaled_dot_product_attention(**data)
    incoming = INCOMING[how](torch.randn_like(output))
    results = []
    for x in (incoming, incoming.clone(memory_format=torch.contiguous_format)):
        hopper.module.ran.clear()
        grads = torch.autograd.grad(output, list(data.values()), x, retain_graph=True)
        assert [plan["kernel"] for plan in hopper.module.ran] == ["hopper"]
        results.append(dict(zip(data, grads, strict=True)))
    assert_same_bits(*results)


# ------------------------------------------------------------------------------------------------- results

OPTIONS = {
    "plain": {},
    "causal": {"causal": "top_left"},
    "causal from the end": {"causal": "bottom_right"},
    "more queries than keys": {"causal": "bottom_right", "queries": 290, "keys": 140},
    "window": {"window": (40, 7)},
    "window before": {"window": (130, 0)},
    "grouped": {"heads": 4, "kv_heads": 2, "causal": "top_left"},
    "one key head": {"heads": 3, "kv_heads": 1},
    "lengths": {"batch": 3, "lengths": True},
    "packed": {"batch": 4, "packed": True},
    "packed, causal, grouped": {
        "batch": 4,
        "packed": True,
        "causal": "bottom_right",
        "heads": 4,
        "kv_heads": 2,
    },
    "tiny scale": {"scale": 1e-7},
    "negative scale": {"scale": -0.2, "causal": "top_left"},
    "sinks": {"sinks": True, "returns": ("lse",), "causal": "top_left"},
    "bool mask": {"mask": "bool"},
    "bool mask of keys": {"mask": "bool", "mask_dims": "BK", "causal": "top_left"},
    "float mask": {"mask": "float"},
    "float mask of odd rows": {"mask": "float", "queries": 260, "keys": 261},
    "float mask of heads": {"mask": "float", "mask_dims": "HQK", "heads": 4, "kv_heads": 2, "sinks": True},
    "float32 mask": {"mask": "float32", "lengths": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@every_size
@every_dtype
def test_gradients_match_the_float64_reference(hopper, dtype, size, name):
    check(hopper, replace(CASE, dtype=dtype, head_size=size, **OPTIONS[name]))


@every_size
@pytest.mark.parametrize("causal", ["", "top_left", "bottom_right"])
def test_sizes_around_the_edges_of_tiles(hopper, size, causal):
    queries, keys = (tile(size, name) for name in ("grad_queries", "grad_keys"))
    others = [tile(size, name, "other") for name in ("grad_queries", "grad_keys")]
    for sq in (1, 17, queries - 1, queries, queries + 1, 2 * others[1], 2 * others[1] + 1):
        for sk in (17, keys - 1, keys, keys + 1, 2 * others[0] + 1):
            check(hopper, Case(torch.bfloat16, 1, 1, 0, sq, sk, size, causal=causal))


@pytest.mark.parametrize(("size", "value"), [(8, 8), (40, 72), (72, 40), (104, 136), (200, 8), (248, 256)])
@every_dtype
def test_heads_of_other_sizes(hopper, dtype, size, value):
    check(hopper, replace(CASE, dtype=dtype, head_size=size, value_size=value, queries=70, causal="top_left"))


@every_size
def test_many_tiles(hopper, size):
    check(hopper, Case(torch.float16, 1, 2, 1, 700, 650, size, causal="bottom_right"))


@pytest.mark.parametrize("how", ["lengths", "packed"])
@every_dtype
def test_few_keys_among_many(hopper, dtype, how):
    """Sequences of up to 16 keys, whose sums of gradients come from these themselves."""
    case = Case(dtype, 6, 2, 0, 40, 60, 64, sinks=True, returns=("lse",), **{how: True})
    data = make_data(case)
    if how == "lengths":
        data["key_lengths"] = torch.tensor([60, 1, 2, 16, 17, 0])
    check(hopper, case, data)


@pytest.mark.parametrize("size", [64, 128, 192])
@every_dtype
def test_few_visible_keys_are_like_few_keys(hopper, dtype, size):
    """The first 128 of 290 queries see up to 16 of 178 keys: as of 128 queries and 16 keys, bit by bit."""
    data = make_data(Case(dtype, 1, 2, 0, 290, 178, size))
    incoming = torch.randn(1, 2, 290, size).to(hopper.where, dtype)
    grads = []
    for queries, lengths in ((290, None), (128, torch.tensor([16]))):
        x = {name: x[:, :, :queries] if name == "query" else x for name, x in data.items()}
        x = as_leaves(x, where=hopper.where)
        lengths = None if lengths is None else lengths.to(hopper.where)
        output = fastseq.scaled_dot_product_attention(**x, causal="bottom_right", key_lengths=lengths)
        grads.append(torch.autograd.grad(output, x["query"], incoming[:, :, :queries])[0][:, :, :128].cpu())
    assert grads[0].any()
    assert_same_bits(*({"query": x} for x in grads))


@pytest.mark.parametrize(("queries", "keys"), [(150, 170), (290, 178)])
@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_single_gradients(hopper, wanted, queries, keys):
    """Also where the pass of the queries, of which nothing is wanted, makes what that of the keys needs."""
    case = replace(CASE, head_size=64, causal="bottom_right", queries=queries, keys=keys)
    data = make_data(case)
    everything = run(hopper, case, data)
    alone = {name: x.detach().requires_grad_(name == wanted) for name, x in data.items()}
    assert_same_bits(run(hopper, case, alone), {k: everything[k] for k in ("output", f"grad of {wanted}")})


@pytest.mark.parametrize("size", [64, 256])
def test_keys_behind_a_length_have_zero_gradients(hopper, size):
    case = replace(CASE, head_size=size, lengths=True, keys=300)
    data = make_data(case)
    data["key_lengths"] = torch.tensor([20, 0])
    results = run(hopper, case, data)
    for name in ("grad of key", "grad of value"):
        assert results[name][0, :, :20].any()
        assert not results[name][0, :, 20:].any()
        assert not results[name][1].any()
    assert not results["grad of query"][1].any()


BITS = {
    "causal": {"causal": "bottom_right", "heads": 4, "kv_heads": 2},
    "mask": {"mask": "bool", "mask_dims": "QK"},
    "packed": {"packed": True, "batch": 3},
}


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("size", [64, 128, 192])
def test_same_bits_in_every_schedule(hopper, size, name):
    case = replace(CASE, head_size=size, **BITS[name])
    data = make_data(case)
    first = run(hopper, case, data)
    for order, seed in cuda_host.SCHEDULES * (not hopper.is_gpu):
        cuda_host.set_schedule(order, seed)
        assert_same_bits(run(hopper, case, data), first)
    assert_same_bits(run(hopper, case, data), first)


# ------------------------------------------------------------------------------------------------ one pass


@pytest.fixture
def one_pass(hopper, monkeypatch):
    ask = fastseq.scaled_dot_product_attention
    monkeypatch.setattr(
        fastseq, "scaled_dot_product_attention", lambda *args, **kw: ask(*args, deterministic=False, **kw)
    )
    return hopper


@pytest.mark.cuda_host
@pytest.mark.parametrize("mask", [False, True])
@every_size
def test_one_pass_is_for_heads_that_leave_it_registers(size, mask):
    chosen = plan(GPUS["H200"], head_size=size, value_size=size, options=mask, one_pass=True)
    if size <= 128 and not mask:
        assert chosen["kernel"] == "hopper_one_pass"
        assert set(chosen["passes"]) == {"grad_keys"}
        assert chosen["passes"]["grad_keys"]["shared_bytes"] <= 227 * 1024
    else:
        assert chosen == plan(GPUS["H200"], head_size=size, value_size=size, options=mask)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "mask" not in name and "scale" not in name])
@pytest.mark.parametrize("size", [64, 96, 128])
@every_dtype
def test_one_pass_matches_the_float64_reference(one_pass, dtype, size, name):
    check(one_pass, replace(CASE, dtype=dtype, head_size=size, **OPTIONS[name]), kernel="hopper_one_pass")


@pytest.mark.parametrize("layout", ["BSHD", "SBHD"])
@pytest.mark.parametrize(("size", "value"), [(8, 8), (40, 72), (104, 48), (72, 120)])
def test_one_pass_of_other_sizes_and_layouts(one_pass, size, value, layout):
    case = Case(
        torch.bfloat16, 2, 3, 1, 200, 290, size, value_size=value, layout=layout, causal="bottom_right"
    )
    check(one_pass, case, kernel="hopper_one_pass")


def test_one_pass_is_not_for_heads_of_an_odd_size(hopper):
    """It adds to memory in pairs. Rows of such a head may begin where TMA can read them."""
    data = [
        torch.randn(1, 2, 70, 72, dtype=torch.bfloat16, device=hopper.where)[..., :size].requires_grad_()
        for size in (65, 65, 64)
    ]
    grads = []
    for deterministic in (False, True):
        with hopper.using() as ran:
            output = fastseq.scaled_dot_product_attention(*data, deterministic=deterministic)
            grads.append(torch.autograd.grad(output.square().sum(), data))
            assert [plan["kernel"] for plan in ran if plan["pass"] == "backward"] == ["hopper"]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("size", [64, 96, 128])
def test_one_pass_is_right_in_every_schedule(one_pass, size):
    """Of keys and values the same bits; what is added up in another order is checked."""
    case = Case(torch.bfloat16, 1, 2, 1, 300, 290, size, causal="bottom_right")
    data = make_data(case)
    first = run(one_pass, case, data, "hopper_one_pass")
    for order, seed in cuda_host.SCHEDULES * (not one_pass.is_gpu):
        cuda_host.set_schedule(order, seed)
        check(one_pass, case, data, "hopper_one_pass")
        results = run(one_pass, case, data, "hopper_one_pass")
        for name in ("grad of key", "grad of value"):
            assert_same_bits({name: results[name]}, {name: first[name]})


# ---------------------------------------------------------------------------------------- what is hidden


def poisoned(data, places, poison):
    """Copies of the data with `poison` in the given places, and with 0 there."""
    for number in (poison, 0.0):
        copies = {name: x.detach().clone() for name, x in data.items()}
        for name, place in places.items():
            copies[name][place] = number
        yield {name: x.requires_grad_(data[name].requires_grad) for name, x in copies.items()}


@pytest.mark.parametrize("how", ["bool", "float", "window", "lengths", "causal"])
@pytest.mark.parametrize("size", [64, 128, 192])
@every_poison
def test_keys_and_values_that_nobody_sees_reach_nothing(hopper, poison, size, how):
    case, unseen = replace(CASE, head_size=size, queries=90), slice(120, None)
    if how == "window":
        case, unseen = replace(case, window=(0, 3)), slice(93, None)
    elif how == "causal":
        case, unseen = replace(case, causal="top_left"), slice(90, None)
    elif how == "lengths":
        case = replace(case, lengths=True)
    else:
        case, unseen = replace(case, mask=how), slice(33, 37)
    data = make_data(case)
    if how == "lengths":
        data["key_lengths"] = torch.tensor([120, 13])
    elif how in ("bool", "float"):
        data["attn_mask"] = data["attn_mask"].detach().clone()
        data["attn_mask"][..., unseen] = False if how == "bool" else -math.inf
    places = {"key": (slice(None), slice(None), unseen), "value": (slice(None), slice(None), unseen)}
    results, expected = (run(hopper, case, x) for x in poisoned(data, places, poison))
    assert all(x.isfinite().all() for x in results.values())
    assert_same_bits(results, expected)


@pytest.mark.parametrize("how", ["lengths", "causal"])
@pytest.mark.parametrize("size", [64, 96, 128])
@every_poison
def test_one_pass_keeps_out_keys_and_values_that_nobody_sees(one_pass, poison, size, how):
    """Gradients of queries among finite keys, and beside some that are not, differ by their order at most."""
    case = replace(CASE, head_size=size, queries=100, causal="top_left" if how == "causal" else "")
    case, data = replace(case, lengths=how == "lengths"), make_data(replace(case, lengths=how == "lengths"))
    unseen = slice(100, None)
    if how == "lengths":
        data["key_lengths"] = torch.tensor([100, 90])
    places = {"key": (slice(None), slice(None), unseen), "value": (slice(None), slice(None), unseen)}
    results, expected = (run(one_pass, case, x, "hopper_one_pass") for x in poisoned(data, places, poison))
    of_query = [x.pop("grad of query").float() for x in (results, expected)]
    assert_same_bits(results, expected)
    assert (of_query[0] - of_query[1]).abs().max() <= 2**-7 * of_query[1].abs().max()


@pytest.mark.parametrize("which", ["query", "grad"])
@pytest.mark.parametrize("size", [64, 128, 192])
@every_poison
def test_a_query_reaches_only_the_keys_that_it_sees(hopper, poison, size, which):
    """Among them the one of its own place, whose gradient is NaN; and the other queries not at all."""
    case = replace(CASE, head_size=size, causal="top_left", keys=150)
    data = make_data(case)
    for place in (0, 63, 130):
        results = []
        for number in (poison, 0.0):
            x = as_leaves({name: y.clone() for name, y in data.items()}, where=hopper.where)
            with torch.no_grad():
                if which == "query":
                    x["query"][:, :, place] = number
            output = fastseq.scaled_dot_product_attention(**x, causal="top_left")
            incoming = torch.ones_like(output)
            if which == "grad":
                incoming[:, :, place] = number
            gradients = torch.autograd.grad(output, list(x.values()), incoming)
            results.append(dict(zip(x, (g.cpu() for g in gradients), strict=True)))
        assert not results[0]["key"][:, :, place].isfinite().any()
        others = [i for i in range(150) if i != place]
        for name in ("query", "key", "value"):
            kept = others if name == "query" else slice(place + 1, None)
            assert_same_bits(*({name: x[name][:, :, kept]} for x in results))


@every_poison
@pytest.mark.parametrize("causal", ["", "bottom_right"])
def test_a_packed_sequence_does_not_reach_its_neighbours(hopper, causal, poison):
    case = Case(torch.bfloat16, 3, 2, 0, 40, 66, 64, packed=True, causal=causal)
    data = make_data(case)
    q, k = (data[f"cu_seqlens_{name}"].tolist() for name in "qk")
    for b in (1, 2) if q[1] < q[2] else (0, 1):
        places = {"query": slice(q[b], q[b + 1])}
        places |= {name: slice(k[b], k[b + 1]) for name in ("key", "value")}
        results, expected = (run(hopper, case, x) for x in poisoned(data, places, poison))
        for name, x in results.items():
            row = name.removeprefix("grad of ").replace("output", "query")
            others = torch.ones(x.size(0), dtype=torch.bool)
            others[places[row]] = False
            assert_same_bits({name: x[others]}, {name: expected[name][others]})


def test_an_infinity_that_is_seen_is_added_with_its_sign(hopper):
    """In a tile in which others hide it: as the sum of the products has it."""
    case = replace(CASE, batch=1, heads=1, head_size=64, queries=40, keys=40, causal="top_left")
    data = make_data(case)
    incoming = torch.ones(1, 1, 40, 64, dtype=case.dtype)
    incoming[0, 0, 20, 3], incoming[0, 0, 30, 5] = math.inf, -math.inf
    incoming[0, 0, 20, 7], incoming[0, 0, 30, 7] = math.inf, -math.inf
    x = as_leaves(data, where=hopper.where)
    output = fastseq.scaled_dot_product_attention(**x, causal="top_left")
    (grad,) = torch.autograd.grad(output, x["value"], incoming.to(hopper.where))
    grad = grad.cpu()[0, 0]
    assert (grad[:21, 3] == math.inf).all()
    assert (grad[:31, 5] == -math.inf).all()
    assert grad[:21, 7].isnan().all()
    assert (grad[21:31, 7] == -math.inf).all()
    clean = [i for i in range(64) if i not in (3, 5, 7)]
    assert grad[:, clean].isfinite().all()
    assert grad[31:].isfinite().all()


# -------------------------------------------------------------------- waits that cannot be left out


def gradients_without(output, leaves, incoming, what, turn):
    """In each schedule; None after an error."""
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        try:
            with cuda_host.leaving_out(what, turn):
                grads = torch.autograd.grad(output, leaves, incoming, retain_graph=True)
            yield b"".join(x.view(torch.int16).numpy().tobytes() for x in grads)
        except RuntimeError:
            yield None


@pytest.mark.parametrize(("what", "turns"), [("barrier_wait", 6), ("wgmma_wait", 11)])
@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_no_wait_can_be_left_out(twin, wanted, what, turns):
    """Of the first so many of each thread: gradients change with the schedule, or it is an error."""
    case = Case(torch.bfloat16, 1, 1, 0, 520, 520, 64)
    data = make_data(case)
    output = run_forward(data)
    incoming = torch.ones_like(output)
    leaves = [data[wanted]]
    right = set(gradients_without(output, leaves, incoming, "", 0))
    assert len(right) == 1
    for turn in range(turns):
        got = set(gradients_without(output, leaves, incoming, what, turn))
        assert got != right, f"without {what} number {turn}"


@pytest.mark.parametrize(("what", "turns"), [("barrier_wait", 6), ("wgmma_wait", 11)])
def test_no_wait_of_the_one_pass_can_be_left_out(twin, what, turns):
    """Gradients of keys and values change, or those of queries by more than their order can make."""
    case = Case(torch.bfloat16, 1, 1, 0, 520, 520, 64)
    data = make_data(case)
    output = fastseq.scaled_dot_product_attention(**data, deterministic=False)
    leaves = [data["query"], data["key"], data["value"]]
    right = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    most = 2**-7 * right[0].abs().max()

    def is_right(turn):
        try:
            with cuda_host.leaving_out(what, turn):
                got = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
        except RuntimeError:
            return False
        return (got[0] - right[0]).abs().max() <= most and all(map(torch.equal, got[1:], right[1:]))

    for turn in range(turns):
        found = False
        for order, seed in cuda_host.SCHEDULES:
            cuda_host.set_schedule(order, seed)
            found = found or not is_right(turn)
        assert found, f"without {what} number {turn}"


def run_forward(data):
    return fastseq.scaled_dot_product_attention(**data)
