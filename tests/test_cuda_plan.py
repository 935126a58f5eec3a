"""The plan of the CUDA engine: a pure function of the problem and of a GPU's facts, tested without one."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import test_cells
from devices import ARITHMETIC, GPUS, ON_TENSOR_CORES
from fastseq import _C
from harness import Case, make_data, make_module
from reference import GATES, MODES
from test_bad_input import assert_three_lines, error_of

H200 = GPUS["H200"]
HIDDEN_SIZES = (64, 128, 256, 512, 768, 1024, 2048)
BATCHES = (1, 8, 16, 64, 256)
NETWORKS = {**{mode: (mode, 0) for mode in MODES}, "LSTM projected": ("LSTM", 4)}


def plan(mode="LSTM", arithmetic="float32", facts=H200, forced="", **sizes):
    """In words."""
    dtype, tf32 = ARITHMETIC[arithmetic]
    sizes = {"steps": 100, "batch": 16, "hidden_size": 256, "proj_size": 0, "directions": 1} | sizes
    return _C.loop_plan(
        _C.CELLS[mode]["code"],
        _C.DTYPES[str(dtype).removeprefix("torch.")],
        tf32,
        sizes["steps"],
        sizes["batch"],
        sizes["hidden_size"],
        sizes["proj_size"],
        sizes["directions"],
        sizes.get("packed", False),
        sizes.get("backward", False),
        facts,
        forced,
    ).describe()


def assert_sound(p, mode, arithmetic, facts, **sizes):
    """What every plan keeps, whatever it is."""
    assert 0 < p["microseconds"] < float("inf")
    if p["kernel"] == "steps":
        return
    major, _, multiprocessors, shared_bytes = facts[:4]
    hidden_size, proj_size = sizes["hidden_size"], sizes["proj_size"]
    products = 2 if mode == "GRU_RESET_BEFORE" or proj_size else 1
    assert 0 < p["shared_bytes"] <= shared_bytes
    assert p["threads"] % 32 == 0
    assert 32 <= p["threads"] <= 256
    assert p["columns"] in ((1, 2, 4) if arithmetic in ON_TENSOR_CORES else (1,))
    assert p["rows"] == p["columns"] * (4 if arithmetic == "float64" else 8)
    assert p["units"] % 8 == 0
    assert p["units"] * p["blocks"] >= hidden_size, "a unit that no block has"
    assert p["groups"] == sizes["directions"] * -(-sizes["batch"] // p["rows"])
    assert sizes["directions"] <= p["groups_at_once"] <= p["groups"], "directions run at the same time"
    assert p["workspace_bytes"] > 0
    if p["kernel"] == "cluster":
        assert major >= 9
        assert p["blocks"] in (1, 2, 4, 8, 16)
        assert p["groups_at_once"] == p["groups"], "the hardware places clusters one after another"
        assert p["blocks"] * sizes["directions"] <= multiprocessors, "directions run at the same time"
    else:
        assert p["blocks"] * p["groups_at_once"] <= multiprocessors, "blocks wait for others without room"
    assert len(p["products"]) == products
    may_scatter = p["kernel"] == "cluster" and sizes["backward"]
    for q in p["products"]:
        assert q["exchange"] == "operand" or (may_scatter and q["exchange"] == "sums")
        assert q["warps"][0] * q["warps"][1] * 32 <= p["threads"]
        assert q["register_units"] + q["shared_units"] + q["streamed_units"] == q["units"], "weights left out"
        assert min(q["register_units"], q["shared_units"], q["streamed_units"]) >= 0
        assert q["units"] % q["passes"] == 0
        assert 1 <= q["chunks"] <= q["units"] // q["passes"]
        assert q["register_units"] > 0
        if p["kernel"] != "stream":
            assert q["streamed_units"] == 0, f"the {p['kernel']} kernel streams nothing"
        if p["kernel"] == "cluster":
            assert q["chunks"] == 1
    # The tiles of all blocks, which lie in the workspace, hold every weight.
    bytes_of = torch.finfo(ARITHMETIC[arithmetic][0]).bits // 8
    width = proj_size or hidden_size
    weights = GATES[mode] * hidden_size * width + proj_size * hidden_size
    assert p["workspace_bytes"] >= sizes["directions"] * weights * bytes_of


@pytest.mark.parametrize("gpu_name", GPUS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_shape_has_a_sound_plan_on_every_gpu(name, arithmetic, gpu_name):
    mode, part = NETWORKS[name]
    for batch, hidden_size, backward, directions in product(BATCHES, HIDDEN_SIZES, (False, True), (1, 2)):
        sizes = {
            "batch": batch,
            "hidden_size": hidden_size,
            "proj_size": hidden_size // part if part else 0,
            "directions": directions,
            "backward": backward,
        }
        p = plan(mode, arithmetic, GPUS[gpu_name], **sizes)
        assert_sound(p, mode, arithmetic, GPUS[gpu_name], **sizes)


@given(
    name=st.sampled_from(list(NETWORKS)),
    arithmetic=st.sampled_from(list(ARITHMETIC)),
    facts=st.sampled_from(list(GPUS.values())),
    steps=st.sampled_from([1, 2, 100, 70_000]),
    batch=st.one_of(st.integers(1, 100), st.sampled_from([1000, 70_000])),
    hidden_size=st.one_of(st.integers(2, 300), st.integers(2, 3000)),
    directions=st.integers(1, 2),
    packed=st.booleans(),
    backward=st.booleans(),
    proj=st.floats(0, 1),
)
def test_any_shape_has_a_sound_plan_and_the_same_one_again(name, arithmetic, facts, proj, **sizes):
    mode, projected = NETWORKS[name]
    most = sizes["hidden_size"] - 1
    sizes["proj_size"] = max(1, round(proj * most)) if projected else 0
    first = plan(mode, arithmetic, facts, **sizes)
    plan(mode, arithmetic, GPUS["RTX"], batch=1)  # something else in between
    torch.randn(3) @ torch.randn(3)
    assert plan(mode, arithmetic, facts, **sizes) == first
    assert_sound(first, mode, arithmetic, facts, **sizes)


# Two products share a block's shared memory, and the largest layers need a hundred blocks for that.
LARGE = [(name, gpu_name) for name in NETWORKS for gpu_name in GPUS]
LARGE = [(name, gpu) for name, gpu in LARGE if name in ("RNN_TANH", "LSTM", "GRU") or gpu != "RTX"]


@pytest.mark.parametrize(("name", "gpu_name"), LARGE)
@pytest.mark.parametrize("arithmetic", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("hidden_size", [8192, 20_000])
def test_very_large_layers_are_streamed_or_made_in_steps(name, hidden_size, arithmetic, gpu_name):
    mode, part = NETWORKS[name]
    for backward in (False, True):
        sizes = {"hidden_size": hidden_size, "proj_size": 512 if part else 0, "backward": backward}
        sizes |= {"batch": 1, "directions": 2}
        p = plan(mode, arithmetic, GPUS[gpu_name], **sizes)
        assert p["kernel"] in ("stream", "steps")
        sizes["directions"] = 1  # where two have no room at the same time, steps take them
        p = plan(mode, arithmetic, GPUS[gpu_name], forced="stream", **sizes)
        assert_sound(p, mode, arithmetic, GPUS[gpu_name], **sizes)
        assert all(q["streamed_units"] > 0 for q in p["products"])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("hidden_size", [64, 128, 256, 512])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_layers_that_fit_a_cluster_run_in_one_on_hopper(mode, hidden_size, backward):
    for arithmetic, batch in product(["bfloat16", "float16"], (1, 8, 16, 64)):
        p = plan(mode, arithmetic, batch=batch, hidden_size=hidden_size, backward=backward)
        assert p["kernel"] == "cluster", (arithmetic, batch)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", MODES)
def test_clusters_exchange_what_takes_less_time(mode, arithmetic):
    """In the backward pass; forward there is nothing to choose."""
    chosen = set()
    for hidden_size in (64, 128, 256):
        sizes = {"mode": mode, "arithmetic": arithmetic, "hidden_size": hidden_size}
        both = [plan(**sizes, backward=True, forced=f"cluster:8:{what}") for what in ("sums", "operand")]
        best = plan(**sizes, backward=True, forced="cluster:8")
        assert best == min(both, key=lambda p: p["microseconds"])
        chosen.add(best["products"][0]["exchange"])
        assert plan(**sizes, forced="cluster:8:sums") == plan(**sizes, forced="cluster:8:operand")
    if arithmetic == "bfloat16":  # h of a row in floats, against 16 bits of each gate
        assert ("operand" in chosen) == (mode in ("RNN_TANH", "RNN_RELU", "GRU_RESET_BEFORE"))


@pytest.mark.parametrize("name", NETWORKS)
def test_more_shared_memory_never_streams_more(name):
    mode, part = NETWORKS[name]
    for arithmetic, hidden_size, backward in product(ARITHMETIC, HIDDEN_SIZES[1:], (False, True)):
        sizes = {"hidden_size": hidden_size, "proj_size": hidden_size // part if part else 0}
        streamed = float("inf")
        for shared_bytes in (101376, 166912, 232448):
            facts = (9, 0, 132, shared_bytes, H200[4])
            p = plan(mode, arithmetic, facts, **sizes, backward=backward, forced="stream:16")
            now = sum(q["streamed_units"] / q["units"] for q in p["products"])
            assert now <= streamed, (arithmetic, hidden_size, backward, shared_bytes)
            streamed = now


def test_more_multiprocessors_never_take_longer():
    for arithmetic, hidden_size, batch in product(ARITHMETIC, HIDDEN_SIZES, BATCHES):
        microseconds = float("inf")
        for multiprocessors in (16, 46, 108, 132):
            facts = (8, 0, multiprocessors, *GPUS["A100"][3:])
            p = plan("LSTM", arithmetic, facts, hidden_size=hidden_size, batch=batch)
            assert p["microseconds"] <= microseconds
            microseconds = p["microseconds"]


def with_clusters(counts, facts=H200):
    """Facts of a GPU that has been asked how many clusters of 2, 4, 8 and 16 blocks run at the same time."""
    return (*facts, 16, *counts)


def test_as_many_clusters_run_at_once_as_the_gpu_says():
    """One group more takes another turn; the plan then has smaller clusters, or other tiles."""
    sizes = {"arithmetic": "bfloat16", "steps": 2**20, "hidden_size": 512, "forced": "cluster:16x1"}
    for count in (4, 7, 8):
        facts = with_clusters((66, 32, 16, count))
        one, full, over = (plan(**sizes, facts=facts, batch=8 * n) for n in (1, count, count + 1))
        assert one["microseconds"] == full["microseconds"]
        assert over["microseconds"] > 1.9 * full["microseconds"]
        free = plan(**sizes | {"forced": ""}, facts=facts, batch=8 * (count + 1))
        assert free["microseconds"] < over["microseconds"]


def test_clusters_that_were_not_counted_have_a_guess():
    for blocks, backward, batch in product((1, 8, 16), (False, True), BATCHES):
        sizes = {"arithmetic": "bfloat16", "hidden_size": 32 * blocks, "batch": batch, "backward": backward}
        guessed = plan(**sizes, forced=f"cluster:{blocks}x1")
        for counts in ((), (0, 0, 0, 0), (60, 28)):
            assert plan(**sizes, forced=f"cluster:{blocks}x1", facts=with_clusters(counts)) == guessed


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_more_clusters_at_once_never_take_longer(name, backward):
    mode, part = NETWORKS[name]
    for arithmetic, hidden_size, batch in product(ARITHMETIC, HIDDEN_SIZES, (16, 64, 256)):
        sizes = {"hidden_size": hidden_size, "proj_size": hidden_size // part if part else 0, "batch": batch}
        microseconds = float("inf")
        for counts in ((1, 1, 1, 1), (8, 4, 2, 1), (60, 28, 14, 6), (60, 28, 14, 7), (66, 32, 16, 8)):
            p = plan(mode, arithmetic, with_clusters(counts), **sizes, backward=backward)
            assert p["microseconds"] <= microseconds, (arithmetic, hidden_size, batch, counts)
            microseconds = p["microseconds"]


def test_both_directions_need_clusters_that_run_at_once():
    facts = with_clusters((66, 32, 16, 1))
    sizes = {"arithmetic": "bfloat16", "hidden_size": 256, "directions": 2}
    with pytest.raises(RuntimeError):
        plan(**sizes, facts=facts, forced="cluster:16")
    assert plan(**sizes, facts=facts, forced="cluster")["blocks"] < 16


# ---- forced plans ----


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 8, 16])
@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["cluster", "grid", "stream"])
def test_forced_plan_is_the_plan(kernel, columns, blocks, backward):
    sizes = {"hidden_size": 128, "batch": 5, "directions": 1, "proj_size": 0, "backward": backward}
    for forced in (kernel, f"{kernel}:{blocks}", f"{kernel}:{blocks}x{columns}"):
        p = plan("LSTM", "bfloat16", forced=forced, **sizes)
        assert p["kernel"] == kernel
        assert ":" not in forced or p["blocks"] == blocks
        assert "x" not in forced or p["columns"] == columns
        assert_sound(p, "LSTM", "bfloat16", H200, **sizes)


MALFORMED = ["2", "best", "grid:", "grid:0", "grid:-1", "grid:x2", "grid:2x", "grid:2x0", "grid:2x2x2"]
MALFORMED += ["grid,2", "Grid", " grid", "grid ", "grid:2 ", "grid:two", "grid:2.5", "stream:2x4,", "steps:2"]
MALFORMED += ["grid:sums", "cluster:", "cluster:2:", "cluster:parts", "cluster:sums:2", "cluster:2:sums:"]
IMPOSSIBLE = {  # what does not fit, and the arguments of the plan
    "cluster before Hopper": {"facts": GPUS["A100"], "forced": "cluster"},
    "blocks that are no power of two": {"forced": "cluster:3"},
    "more blocks than a cluster may have": {"forced": "cluster:32"},
    "more blocks than multiprocessors": {"forced": "grid:133"},
    "more blocks than units": {"forced": "grid:33"},
    "more columns than there are": {"arithmetic": "bfloat16", "forced": "grid:8x8"},
    "columns of tensor cores in float64": {"arithmetic": "float64", "forced": "stream:8x2"},
    "weights that do not fit a cluster": {"hidden_size": 4096, "forced": "cluster"},
    "more columns than there are for two products": {
        "mode": "GRU_RESET_BEFORE",
        "arithmetic": "bfloat16",
        "forced": "grid:8x4",
    },
}


@pytest.mark.parametrize("forced", MALFORMED)
def test_malformed_forced_plan_is_an_error(forced):
    with pytest.raises(RuntimeError) as error:
        plan(forced=forced)
    assert "FASTSEQ_CUDA_PLAN" in str(error.value)
    assert forced in str(error.value)
    assert_three_lines(error.value)


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_forced_plan_is_an_error(what):
    with pytest.raises(RuntimeError) as error:
        plan(**IMPOSSIBLE[what])
    assert_three_lines(error.value)
    assert "FASTSEQ_CUDA_PLAN" in str(error.value)
    assert plan(**IMPOSSIBLE[what] | {"forced": ""}), "without it there is a plan"


def test_what_fits_no_persistent_kernel_is_made_in_steps():
    tiny = (9, 0, 132, 1024, 0)
    assert plan(facts=tiny)["kernel"] == "steps"
    for kernel in ("cluster", "grid", "stream"):
        with pytest.raises(RuntimeError) as error:
            plan(facts=tiny, forced=kernel)
        assert_three_lines(error.value)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_persistent_kernels_are_for_more_than_a_step(mode):
    """They are prepared once, which takes longer than one product and one small kernel."""
    assert plan(mode, steps=1)["kernel"] == "steps"
    assert plan(mode, steps=1000)["kernel"] != "steps"


@pytest.mark.parametrize("mode", MODES)
def test_packing_needs_room_in_the_workspace_alone(mode):
    """The offsets of the steps' rows."""
    for backward in (False, True):
        padded = plan(mode, steps=1000, backward=backward, forced="stream:4")
        packed = plan(mode, steps=1000, backward=backward, forced="stream:4", packed=True)
        assert packed.pop("workspace_bytes") >= padded.pop("workspace_bytes") + 1001 * 8
        assert packed == padded


@pytest.mark.parametrize("plan", ["grid:", "best", "cluster:0", "stream:2x", "grid:2x2x2", "grid:999"])
def test_bad_forced_plan_is_an_error_of_the_next_call(device, plan):
    """Forward and backward; the call after it is as good as ever. Cells have no plan."""
    module = make_module(Case("GRU")).to(device.where)
    cell = test_cells.make_cell(Case("GRU")).to(device.where)
    x = make_data(Case("GRU"))["input"].detach().to(device.where)
    with device.using():
        output, step = module(x)[0], cell(x[0]).detach()
        expected = output.detach().clone()
    with device.using(plan):
        assert torch.equal(cell(x[0]), step)
        for call in (lambda: module(x), output.sum().backward):
            error = error_of(call)
            assert isinstance(error, RuntimeError)
            assert_three_lines(error)
            assert "FASTSEQ_CUDA_PLAN" in str(error)
    with device.using():
        assert torch.equal(module(x)[0], expected)
