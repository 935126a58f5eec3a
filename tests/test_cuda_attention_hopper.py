"""The kernel of attention for Hopper GPUs, csrc/cuda/attention_hopper.h, forward: on the host twin, and on a
GPU of compute capability 9.0. The gradients that come with it are the general kernels', from what it saves.
"""

import math
from dataclasses import replace

import pytest
import torch

import cuda_host
from attention_harness import Case, as_leaves, call_fastseq, check, make_data
from devices import GPUS
from fastseq import _C
from harness import assert_same_bits, with_gradients

DTYPES = [torch.bfloat16, torch.float16]
SIZES = [64, 96, 128, 192, 256]  # of heads
HOPPER = GPUS["H200"]

pytestmark = pytest.mark.usefixtures("one_thread")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_size = pytest.mark.parametrize("size", SIZES)


def plan_of(forced="", gpu=HOPPER, **changes):
    """In words; of a call of bfloat16 tensors whose only option may be a mask."""
    problem = {
        "dtype": _C.DTYPES["bfloat16"],
        "tf32": False,
        "packed": False,
        "backward": False,
        "batch": 2,
        "heads": 16,
        "kv_heads": 16,
        "queries": 2048,
        "keys": 2048,
        "head_size": 128,
        "value_size": 128,
        "options": False,
        "only_mask": True,
        "tma": True,
        "weights": False,
        "of_mask": False,
        **dict.fromkeys(["mask_has_batch", "mask_has_head", "mask_has_query", "mask_has_key"], False),
        "one_pass": False,
        "dual": False,
    }
    assert changes.keys() <= problem.keys()
    return _C.cuda_attention_plan(tuple((problem | changes).values()), gpu, forced).describe()


def tile_of(size, masked=False):
    """Rows and keys."""
    forward = plan_of(head_size=size, value_size=size, options=masked)["passes"]["forward"]
    return forward["own"], forward["other"]


class Hopper:
    def __init__(self, device):
        self.device = device

    def run(self, case, data):
        """Results and gradients, on the CPU."""
        moved = {name: x.detach().to(self.device.where) for name, x in data.items()}
        for name, x in data.items():
            moved[name].requires_grad_(x.requires_grad)
        with self.device.using(attention="hopper") as ran:
            results = with_gradients(call_fastseq(case, moved), moved, case.dtype)
            kernels = {plan["kernel"] for plan in ran if plan["pass"] == "forward"}
        assert kernels == {"hopper"}
        return {name: x.cpu() for name, x in results.items()}

    def forward(self, case, data, facts=None, pairs=0):
        moved = {name: x.detach().to(self.device.where) for name, x in data.items()}
        with torch.no_grad(), self.device.using(attention="hopper", facts=facts) as ran:
            results = call_fastseq(replace(case, returns=("lse",)), moved)
            assert [(plan["kernel"], plan["pairs"]) for plan in ran] == [("hopper", pairs)]
        return {name: x.cpu() for name, x in results.items()}

    def check(self, case, data=None):
        check(replace(case, returns=("lse",)), data, self.run)


@pytest.fixture
def hopper(device, monkeypatch):
    if device.facts[:2] != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")
    monkeypatch.setenv("FASTSEQ_CUDA_ATTENTION_PLAN", "hopper")
    return Hopper(device)


@pytest.fixture
def on_twin(twin, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CUDA_ATTENTION_PLAN", "hopper")
    return Hopper(twin)


# ------------------------------------------------------------------------------------------------- results

# Queries and keys, in tiles of rows and of keys and a few more.
EDGES = [
    ((0, 1), (0, 1)),
    ((0, 1), (2, 1)),
    ((0, 17), (0, 9)),
    ((1, -1), (1, -1)),
    ((1, 0), (1, 0)),
    ((1, 1), (1, 1)),
    ((1, 40), (0, 33)),
    ((0, 70), (4, 5)),
    ((2, 3), (3, 0)),
]


@pytest.mark.parametrize("causal", ["", "top_left", "bottom_right"])
@pytest.mark.parametrize("edge", EDGES, ids=str)
@every_size
@every_dtype
def test_matches_float64_reference_at_the_edges_of_tiles(hopper, dtype, size, edge, causal):
    queries, keys = (n * tile + more for tile, (n, more) in zip(tile_of(size), edge, strict=True))
    hopper.check(Case(dtype, 1, 2, 0, queries, keys, size, causal=causal))


OPTIONS = {
    "grouped queries": {"heads": 4, "kv_heads": 2},
    "six heads of a key head": {"heads": 6, "kv_heads": 1},
    "grouped queries, causal": {"heads": 6, "kv_heads": 2, "causal": "bottom_right"},
    "few queries of many heads": {"batch": 2, "heads": 16, "kv_heads": 2, "queries": 3},
    "lengths": {"batch": 3, "lengths": True},
    "lengths, causal from the end": {"batch": 3, "lengths": True, "causal": "bottom_right"},
    "packed": {"batch": 3, "packed": True},
    "packed, causal": {"batch": 4, "packed": True, "causal": "top_left"},
    "packed, grouped, causal from the end": {
        "batch": 3,
        "packed": True,
        "causal": "bottom_right",
        "heads": 4,
        "kv_heads": 1,
    },
    "window": {"window": (70, 30)},
    "narrow window": {"window": (2, 0), "queries": 300, "keys": 300},
    "wide window": {"window": (200, 200), "queries": 90, "keys": 500, "causal": "bottom_right"},
    "sinks": {"sinks": True},
    "sinks, causal, lengths": {"sinks": True, "causal": "top_left", "lengths": True, "batch": 3},
    "small scale": {"scale": 1e-7},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.2},
    "large scale": {"scale": 20.0},
    "bool mask": {"mask": "bool"},
    "bool mask of keys": {"mask": "bool", "mask_dims": "BK"},
    "bool mask, causal": {"mask": "bool", "mask_dims": "QK", "causal": "top_left"},
    "bias": {"mask": "float"},
    "bias of heads": {"mask": "float", "mask_dims": "HQK", "heads": 4, "kv_heads": 2},
    "bias of queries": {"mask": "float32", "mask_dims": "BQ"},
    "float32 bias, sinks, lengths": {"mask": "float32", "sinks": True, "lengths": True, "batch": 3},
    "other order in memory": {"layout": "BSHD"},
    "every other row": {"layout": "every other row, head and batch"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", [64, 128, 256])
@every_dtype
def test_options_match_float64_reference(hopper, dtype, size, option):
    case = Case(dtype, 1, 2, 0, 150, 290, size)
    hopper.check(replace(case, **OPTIONS[option]))


@pytest.mark.parametrize("size", [(8, 8), (40, 40), (72, 72), (104, 104), (136, 136), (200, 200), (248, 248)])
@pytest.mark.parametrize("mask", ["", "bool"])
def test_other_head_sizes_match_float64_reference(hopper, size, mask):
    hopper.check(Case(torch.bfloat16, 1, 2, 0, 70, 150, *size, mask=mask))


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (192, 128), (8, 256), (96, 40)])
@every_dtype
def test_values_may_have_another_size(hopper, dtype, size):
    hopper.check(Case(dtype, 1, 2, 0, 150, 150, *size, causal="top_left"))


@pytest.mark.parametrize("size", [1, 37, 63])
@every_dtype
def test_odd_number_of_features_of_values(hopper, dtype, size):
    """Whose rows begin at odd elements of output: each feature has the bits that it has among others."""
    case = Case(dtype, 1, 2, 0, 90, 150, 64)
    data = make_data(case)
    expected = hopper.forward(case, data)
    expected["output"] = expected["output"][..., :size]
    narrow = {**data, "value": data["value"].detach()[..., :size]}
    assert_same_bits(hopper.forward(case, narrow), expected)


# --------------------------------------------------------------------------------------- what is not seen

POISONS = [math.nan, math.inf, -math.inf]
HIDDEN = {  # a case, and which keys nobody sees
    "lengths": ({"batch": 2, "lengths": True}, None),
    "window": ({"window": (3, 0), "queries": 20}, slice(30, 290)),
    "bool mask": ({"mask": "bool", "mask_dims": "K"}, None),
    "bias": ({"mask": "float", "mask_dims": "K"}, None),
}


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("size", [64, 128, 192])
def test_what_nobody_sees_may_be_anything(hopper, size, how, which, poison):
    changes, hidden = HIDDEN[how]
    case = replace(Case(torch.float16, 1, 2, 0, 140, 290, size), **changes)
    data = make_data(case)
    clean = hopper.forward(case, data)
    x = data[which].detach().clone()
    if how == "lengths":
        for b, length in enumerate(data["key_lengths"]):
            x[b, :, length:] = poison
    elif hidden is None:
        mask = data["attn_mask"].detach().flatten()
        x[:, :, ~mask if mask.dtype is torch.bool else mask == -math.inf] = poison
    else:
        x[:, :, hidden] = poison
    assert not x.isfinite().all()
    assert_same_bits(hopper.forward(case, {**data, which: x}), clean)


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@every_dtype
def test_value_reaches_only_the_queries_that_see_it(hopper, dtype, size, poison):
    """One feature of it; the other queries' bits are those of clean data."""
    case = Case(dtype, 1, 2, 0, 300, 300, size, causal="top_left")
    data = make_data(case)
    clean = hopper.forward(case, data)["output"]
    for first in (0, 63, 64, 127, 128, 200, 299):
        value = data["value"].detach().clone()
        value[:, :, first, size - 3] = poison
        output = hopper.forward(case, {**data, "value": value})["output"]
        assert torch.equal(output[:, :, :first], clean[:, :, :first])
        seen = output[:, :, first:]
        expected = torch.full_like(seen[..., -3], poison)
        assert torch.equal(seen[..., -3].nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
        others = [i for i in range(size) if i != size - 3]
        assert seen[..., others].isfinite().all()


def value_of_one_warpgroup(hopper, size):
    """Output of clean data, and where one value is NaN that the second 64 queries see, with all of its tile,
    and few of the first; and the first query that does."""
    keys = tile_of(size)[1]
    case = Case(torch.bfloat16, 1, 1, 0, 128, keys + 64, size, causal="bottom_right")
    data = make_data(case)
    clean = hopper.forward(case, data)["output"]
    data["value"] = data["value"].detach().clone()
    data["value"][:, :, keys - 5, 3] = math.nan
    return clean, hopper.forward(case, data)["output"], 64 - 5


@pytest.mark.parametrize("size", [64, 128, 256])
def test_value_reaches_the_warpgroup_that_sees_all_of_its_tile(hopper, size):
    """While it is hidden from a part of another one, which makes the values finite for itself."""
    clean, output, first = value_of_one_warpgroup(hopper, size)
    assert output[:, :, first:, 3].isnan().all()
    output[:, :, first:, 3] = clean[:, :, first:, 3]
    assert_same_bits({"output": output}, {"output": clean})


def test_value_reaches_that_warpgroup_in_every_schedule(on_twin):
    _, expected, _ = value_of_one_warpgroup(on_twin, 128)
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        _, output, _ = value_of_one_warpgroup(on_twin, 128)
        assert torch.equal(output.view(torch.int16), expected.view(torch.int16)), (order, seed)


def test_packed_sequences_do_not_see_each_other(hopper):
    case = Case(torch.bfloat16, 4, 2, 0, 150, 200, 64, packed=True, causal="bottom_right")
    data = make_data(case)
    clean = hopper.forward(case, data)["output"]
    starts, queries = data["cu_seqlens_k"].tolist(), data["cu_seqlens_q"].tolist()
    for i in range(4):
        poisoned = {name: data[name].detach().clone() for name in ("key", "value")}
        for x in poisoned.values():
            x[starts[i] : starts[i + 1]] = math.nan
        output = hopper.forward(case, {**data, **poisoned})["output"]
        own = slice(queries[i], queries[i + 1])
        output[own] = clean[own]
        assert torch.equal(output, clean)


@pytest.mark.parametrize("size", [1e3, 1e30, -1e30])
@pytest.mark.parametrize("mask", ["", "bool"])
def test_equal_huge_scores_attend_alike(hopper, size, mask):
    """All of a row's scores are the same, and so its output is the mean of what it sees."""
    case = Case(torch.bfloat16, 1, 2, 0, 130, 300, 64, mask=mask, scale=abs(size))
    data = make_data(case)
    data["query"] = torch.zeros_like(data["query"]).index_fill_(3, torch.tensor([0]), math.copysign(1, size))
    data["key"] = torch.ones_like(data["key"])
    seen = torch.ones(1, 2, 130, 300, dtype=torch.bool)
    if mask:
        data["attn_mask"][..., 0] = True
        data["attn_mask"][..., 130 // 2, :] = False
        seen = data["attn_mask"]
    result = hopper.forward(case, data)
    count = seen.sum(-1, keepdim=True)
    mean = (seen.double() @ data["value"].detach().double()) / count.clamp(min=1)
    assert (result["output"] - mean).abs().max() < 4e-3
    assert torch.equal(result["lse"] == -math.inf, count[..., 0] == 0)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [10, 18, 19, 20, 21, 30])
def test_scores_around_the_bound_of_one_multiply_add(hopper, exponent, sign, descending):
    """Weights that differ by little, of scores whose size is around 2^exponent in units of powers of two."""
    case = Case(torch.bfloat16, 1, 1, 0, 128, 300, 64, scale=math.log(2), sinks=exponent < 20)
    data = make_data(case)
    steps = torch.arange(300.0) // 60  # 5 scores, of which each tile has a few
    size = sign * 2.0**exponent + 2.0 ** max(exponent - 22, -2) * (steps.flip(0) if descending else steps)
    # As sums of products that are exact: each number is three of 8 bits.
    key, rest = torch.zeros(300, 64, dtype=torch.bfloat16), size.double()
    for i in range(4):
        key[:, i] = rest.to(torch.bfloat16)
        rest = rest - key[:, i].double()
    assert not rest.any()
    data["query"] = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16).index_fill_(3, torch.arange(4), 1)
    data["key"] = key.view(1, 1, 300, 64)
    if case.sinks:
        data["sinks"] = torch.tensor([size.max().item() * math.log(2)])
    result = hopper.forward(case, data)
    scores = size.double() * math.log(2)
    sinks = data["sinks"].double() if case.sinks else torch.full((1,), -math.inf, dtype=torch.float64)
    weights = torch.cat([scores, sinks]).softmax(0)[:300]
    expected = weights @ data["value"][0, 0].detach().double()
    error = (result["output"][0, 0] - expected).abs().max()
    # A float of this size times log 2 is off by so much, which is what a sink's weight may be off by.
    assert error < 2e-3 + (2.0 ** (exponent - 23) if case.sinks else 0)
    lse = torch.cat([scores, sinks]).logsumexp(0)
    assert (result["lse"] - lse).abs().max() < abs(lse) * 2e-7 + 1e-6


def test_rows_that_see_nothing_are_zero(hopper):
    case = Case(torch.float16, 2, 2, 0, 200, 140, 128, causal="bottom_right", returns=("lse",))
    result = hopper.run(case, make_data(case))
    assert not result["output"][:, :, :60].any()
    assert (result["lse"][:, :, :60] == -math.inf).all()
    assert not result["grad of query"][:, :, :60].any()
    assert all(x.isfinite().all() for name, x in result.items() if name != "lse")


# --------------------------------------------------------------------------------------------------- bits

BITS = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "window": {"window": (100, 50)},
    "mask": {"mask": "bool"},
    "packed": {"batch": 3, "packed": True, "causal": "top_left"},
    "lengths, grouped": {"batch": 2, "lengths": True, "heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("option", BITS)
@every_size
def test_same_bits_in_every_schedule(on_twin, size, option):
    case = replace(Case(torch.bfloat16, 1, 2, 0, 300, 410, size), **BITS[option])
    data = make_data(case)
    expected = on_twin.forward(case, data)
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        assert_same_bits(on_twin.forward(case, data), expected, f" with threads in order {order} {seed}")


@pytest.mark.parametrize("option", BITS)
def test_same_bits_from_run_to_run_and_whatever_the_batch(hopper, option):
    case = replace(Case(torch.float16, 1, 2, 0, 300, 410, 128), **BITS[option])
    data = make_data(case)
    expected = hopper.forward(case, data)
    for _ in range(3):
        assert_same_bits(hopper.forward(case, data), expected)
    if case.packed or case.lengths:
        return
    wider = {name: torch.cat([x.detach()] * 2) for name, x in as_leaves(data).items()}
    both = hopper.forward(replace(case, batch=2), wider)
    assert_same_bits({name: x[1:] for name, x in both.items()}, expected)


@pytest.mark.parametrize(
    ("heads", "queries", "at_once", "pairs"),
    [(5, 300, 2, 8), (5, 300, 1, 10), (4, 500, 3, 8), (12, 100, 3, 8)],
)
def test_same_bits_in_pairs_of_tiles(hopper, heads, queries, at_once, pairs):
    """Of 3, 4 and 1 tiles of rows, in sections that are full and not, on two multiprocessors."""
    case = Case(torch.bfloat16, 1, heads, 0, queries, 300, 128, causal="top_left")
    data = make_data(case)
    expected = hopper.forward(case, data)
    of_a_head = 300 * 2 * 2 * 128  # bytes of keys and values, of which half of the cache has so many
    facts = (*HOPPER[:2], 2, HOPPER[3], 2 * of_a_head * at_once)
    assert_same_bits(hopper.forward(case, data, facts, pairs), expected)
    windowed = replace(case, window=(150, 0), causal="")
    expected = hopper.forward(windowed, data)
    assert_same_bits(hopper.forward(windowed, data, facts, pairs), expected)


def results_without(hopper, case, data, what, turn):
    """In each schedule; None after an error."""
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        try:
            cuda_host.load().leave_out(what, turn)
            result = hopper.forward(case, data)["output"]
        except RuntimeError:
            yield None
            continue
        finally:
            cuda_host.load().leave_out("", 0)
        yield result.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(
    ("what", "turns", "changes"),
    [
        ("sync_block", 1, {}),
        ("barrier_wait", 9, {}),
        ("wgmma_wait", 8, {}),
        ("barrier_wait", 9, {"causal": "bottom_right"}),
        ("wgmma_wait", 8, {"mask": "bool"}),
        ("named_sync", 1, {"keys": 70}),  # the vote on what is not finite in the one tile
    ],
)
def test_no_wait_can_be_left_out(on_twin, what, turns, changes):
    """Of the first so many of each thread: bits change with the schedule, or it is an error."""
    case = replace(Case(torch.bfloat16, 1, 1, 0, 128, 512, 128), **changes)
    assert_no_wait_can_be_left_out(on_twin, case, make_data(case), what, range(turns))


@pytest.mark.parametrize(("what", "turn"), [("named_sync", 1), ("barrier_wait", 3)])
def test_no_wait_about_what_is_not_finite_can_be_left_out(on_twin, what, turn):
    """The two that follow the vote: until all have read the values, and made them finite. One such value
    is hidden, another one seen."""
    case = Case(torch.bfloat16, 1, 1, 0, 128, 70, 128, lengths=True)
    data = make_data(case)
    data["key_lengths"] = torch.tensor([69])
    data["value"] = data["value"].detach().clone()
    data["value"][:, :, 69, 5], data["value"][:, :, 3, 77] = math.nan, math.inf
    assert_no_wait_can_be_left_out(on_twin, case, data, what, [turn])


def assert_no_wait_can_be_left_out(hopper, case, data, what, turns):
    expected, *others = results_without(hopper, case, data, "", 0)
    assert expected is not None
    assert {*others} == {expected}
    for turn in turns:
        without = {*results_without(hopper, case, data, what, turn)}
        assert without != {expected}, f"without {what} number {turn}"


# --------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", range(8, 257, 8))
def test_plan_fits_the_gpu(size, masked):
    plan = plan_of(head_size=size, value_size=size, options=masked)
    assert plan["kernel"] == "hopper"
    assert plan["features"] >= size
    forward = plan["passes"]["forward"]
    rows, keys = forward["own"], forward["other"]
    columns = -(-plan["features"] // 64) * 64
    assert 227 * 1024 >= forward["shared_bytes"] > 2 * columns * (rows + 4 * keys)
    assert forward["threads"] == 128 + 2 * rows
    # Registers of a thread: S, P and O, and 40 at least for all the rest.
    assert keys // 2 + keys // 4 * (not masked) + plan["features"] // 2 <= (240 if rows == 128 else 160) - 32
    assert forward["blocks"] == 132
    assert plan["workspace_bytes"] == 0


NOT_HOPPER = {
    "another GPU": {"gpu": GPUS["A100"]},
    "a newer GPU": {"gpu": (10, 0, 148, 232448, 132644864)},
    "little shared memory": {"gpu": (9, 0, 132, 101376, 62914560)},
    "float32": {"dtype": _C.DTYPES["float32"]},
    "tf32": {"dtype": _C.DTYPES["float32"], "tf32": True},
    "softcap, slopes or dropout": {"options": True, "only_mask": False},
    "rows that TMA cannot take": {"tma": False},
    "no keys": {"keys": 0},
    "no queries": {"queries": 0},
    "few rows": {"queries": 16},
    "few rows and many keys": {"queries": 100, "keys": 20000, "heads": 4, "kv_heads": 4},
}


def test_plan_does_not_depend_on_the_batch_and_the_number_of_heads():
    """A row's bits would, too."""
    for queries, keys in ((17, 256), (17, 257), (100, 20000), (128, 300), (129, 300), (2048, 2048)):
        sizes = [{"batch": b, "heads": h, "kv_heads": h} for b in (1, 64) for h in (1, 40)]
        assert len({plan_of(queries=queries, keys=keys, **each)["kernel"] for each in sizes}) == 1


@pytest.mark.parametrize("why", NOT_HOPPER)
def test_plan_leaves_the_rest_to_the_general_kernel(why):
    changes = NOT_HOPPER[why]
    assert plan_of(**changes)["kernel"] in ("tiles", "decode")


@pytest.mark.parametrize(
    "why", ["another GPU", "float32", "softcap, slopes or dropout", "rows that TMA cannot take"]
)
def test_forced_plan_that_does_not_fit_is_an_error(why):
    with pytest.raises(RuntimeError, match=r"given: the kernel hopper, forced, with .*\naccepted: .*\ntry: "):
        plan_of("hopper", **NOT_HOPPER[why])


def test_plan_can_be_forced_either_way():
    assert plan_of("tiles")["kernel"] == "tiles"
    assert plan_of("hopper", queries=1)["kernel"] == "hopper"
    with pytest.raises(RuntimeError, match="parts of the keys"):
        plan_of("hopper:2")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "pack"), [(16, 16, 128, 1), (16, 4, 128, 4), (6, 1, 128, 2), (6, 1, 64, 6)]
)
def test_heads_that_share_keys_share_tiles(heads, kv_heads, size, pack):
    plan = plan_of(heads=heads, kv_heads=kv_heads, head_size=size, value_size=size)
    assert plan["pack"] == pack
    assert plan["passes"]["forward"]["own"] % pack == 0


def test_keys_and_values_that_are_worked_on_fit_the_second_level_cache():
    plan = plan_of(batch=16, queries=16384, keys=16384)
    assert 1 < plan["units_at_once"] * 16384 * 2 * 256 <= HOPPER[4] / 2
    assert plan_of(keys=10**7)["units_at_once"] == 1
    assert plan_of(keys=1024)["units_at_once"] == 32  # all there are


def loads_of_blocks(plan, queries, units):
    """Tiles of keys that each block of the kernel goes over under causality, and 2 for what a tile of rows
    costs beside them: the order of for_items() and rows_of_item() in attention_hopper_items.h."""
    forward = plan["passes"]["forward"]
    slots = -(-queries // forward["own"])
    cost = [2 + -(-min((slot + 1) * forward["own"], queries) // forward["other"]) for slot in range(slots)]
    tiles, at_once = units * slots, plan["units_at_once"]
    alone, pairs = [], []
    for begin in range(0, units, at_once):
        count = min(at_once, units - begin)
        section = [cost[slots - 1 - i // count] for i in range(count * slots)]
        alone += section
        pairs += [
            section[i] + section[-1 - i] * (2 * i + 1 < len(section)) for i in range(-(-len(section) // 2))
        ]
    assert len(alone) == tiles
    assert plan["pairs"] in (0, len(pairs))
    items, blocks = pairs if plan["pairs"] else alone, forward["blocks"]
    loads = [0] * blocks
    for i, load in enumerate(items):
        turn, place = divmod(i, blocks)
        loads[place if turn % 2 == 0 else blocks - 1 - place] += load
    return loads, max(cost)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("queries", [512, 1024, 2048, 4096, 8192, 16384, 32768])
def test_no_multiprocessor_has_much_more_to_do_than_another(size, queries):
    """Under causality, of so many heads of all sequences: a tenth, and half of a tile where these are few."""
    for heads in (3, 5, 8, 16, 32, 61, 64, 128, 256, 1000):
        plan = plan_of(
            batch=1,
            heads=heads,
            kv_heads=heads,
            head_size=size,
            value_size=size,
            queries=queries,
            keys=queries,
        )
        loads, heaviest = loads_of_blocks(plan, queries, heads)
        assert max(loads) <= max(1.1 * sum(loads) / HOPPER[2] + heaviest / 2, heaviest), (heads, plan)


def test_tiles_are_paired_where_units_do_not_all_fit_the_second_level_cache():
    long = {"batch": 1, "queries": 16384, "keys": 16384}
    assert plan_of(**long)["pairs"] == 16 * 128 // 2
    assert plan_of(queries=512, keys=512)["pairs"] == 0  # heaviest first does it, and ends more evenly
    few = plan_of(**long, heads=5, kv_heads=5)  # 320 pairs would take three turns of 132
    assert few["pairs"] == 0
    assert few["units_at_once"] == 5
    assert plan_of(**long, packed=True)["pairs"] == 0  # nobody knows what weighs how much


LAYOUTS_OF_TMA = {
    "BHSD": True,
    "BSHD": True,
    "every other row, head and batch": True,
    "off by one element": False,
    "part of wider rows": False,
}


@pytest.mark.parametrize("layout", LAYOUTS_OF_TMA)
@pytest.mark.cuda_host
def test_explain_says_whether_tensors_fit_tma(twin, layout):
    case = Case(torch.bfloat16, 1, 2, 0, 150, 150, 64, layout=layout)
    with twin.using() as ran:
        call_fastseq(case, make_data(case))
        (plan,) = ran
    assert plan["tma"] == LAYOUTS_OF_TMA[layout]
    assert plan["kernel"] == ("hopper" if plan["tma"] else "tiles")


@pytest.mark.cuda_host
def test_keys_that_are_the_same_for_all_heads_are_left_to_the_general_kernel(twin):
    case = Case(torch.bfloat16, 1, 2, 0, 150, 150, 64)
    data = {name: x.detach() for name, x in make_data(case).items()}
    data["key"] = data["key"][:, :1].expand(-1, 2, -1, -1)
    with twin.using() as ran:
        output = call_fastseq(case, data)["output"]
        assert [plan["kernel"] for plan in ran] == ["tiles"]
        dense = {**data, "key": data["key"].contiguous()}
        again = call_fastseq(case, dense)["output"]
        assert [plan["kernel"] for plan in ran] == ["tiles", "hopper"]
    assert (output - again).abs().max() < 0.02
