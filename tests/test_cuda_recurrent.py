"""The CUDA kernels of the recurrent layers, on the host twin and on a GPU, against the float64 reference."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

import test_cells
from devices import (
    AMPERE,
    ARITHMETIC,
    HOPPER,
    TIGHT_AMPERE,
    TIGHT_HOPPER,
    TINY_AMPERE,
    plans_of,
    two_products,
)
from fastseq import loops, ops
from harness import (
    Case,
    ProductsInTf32,
    assert_all_as_accurate_as_torch,
    call_module,
    call_reference,
    make_data,
    make_module,
    move,
    round_to_tf32,
    run_module,
    run_reference,
    run_torch,
    threads,
    with_gradients,
)
from reference import MODES
from test_bad_input import (
    BAD_CALLS,
    BAD_CELL_CALLS,
    MODULES,
    assert_rejected_like_torch,
    assert_three_lines,
    error_of,
    mistakes,
)
from test_bad_input import CELLS as CELL_CLASSES
from test_gradcheck import gradcheck_module
from tolerances import largest

# Blocks of a group; of 45 units in four blocks the last one has none, and in three the last is not full.
BLOCKS = {"cluster": (1, 2, 4), "grid": (1, 3), "stream": (1, 3), "steps": ()}
NETWORKS = [*MODES, "LSTM projected"]


def network(name, arithmetic, **sizes) -> Case:
    mode, _, projected = name.partition(" ")
    sizes = {"steps": 4, "batch": 19, "input_size": 5, "hidden_size": 45} | sizes
    return Case(mode, dtype=ARITHMETIC[arithmetic][0], proj_size=19 if projected else 0, **sizes)


def every(arithmetics=ARITHMETIC, blocks=BLOCKS, when=lambda name, arithmetic: True):
    """network, arithmetic and plan, in all combinations that there are and that are wanted."""
    return pytest.mark.parametrize(
        ("name", "arithmetic", "plan"),
        [
            (name, arithmetic, plan)
            for name, arithmetic in product(NETWORKS, arithmetics)
            if when(name, arithmetic)
            for plan in plans_of(network(name, arithmetic), arithmetic, blocks)
        ],
    )


# ------------------------------------------------------------------------------------------- against float64


def test_tf32_is_rounded_to_nearest_with_ties_away_from_zero():
    ulp = 2.0**-10
    for x, rounded in [(1, 1), (1 + ulp, 1 + ulp), (1 + ulp / 2, 1 + ulp), (1 + ulp / 4, 1), (2 - 2**-23, 2)]:
        assert round_to_tf32(torch.tensor([float(x), -x])).tolist() == [rounded, -rounded]


@every()
def test_every_kernel_matches_float64_reference(device, name, arithmetic, plan):
    """Both passes, both directions, rows of different lengths."""
    case = network(name, arithmetic, packed="unsorted", bidirectional=True)
    device.check(case, arithmetic, plan)


def test_without_a_forced_plan_modules_and_cells_run_on_the_kernels(device):
    """That the other tests in here test what they say."""
    for name in MODES:
        with device.using() as ran:
            device.run(network(name, "float32", bidirectional=True, num_layers=2))
            assert [plan["pass"] for plan in ran] == ["forward"] * 2 + ["backward"] * 2
        with device.using() as ran:
            run_cell(device, Case(name))
            assert {(plan["kernel"], plan["pass"]) for plan in ran} == {
                ("steps", "forward"),
                ("steps", "backward"),
            }


@pytest.mark.parametrize("packed", ["", "unsorted"])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_launch_for_both_directions_at_the_same_time(device, name, packed):
    """One kernel a step, two for a second product, whatever the directions."""
    case = network(name, "float64", bidirectional=True, packed=packed)
    with device.using("steps") as ran:
        device.run(case)
        parts = 2 if two_products(case) else 1
        launches = [p["pass"] for p in ran]
        assert launches == ["forward"] * parts * case.steps + ["backward"] * parts * case.steps


VARIANTS = [
    Case(batch=11, states=False),
    Case(batch=11, bias=False),
    Case(batch=11, bias=False, states=False, bidirectional=True),
    Case(batch=11, batch_first=True, bidirectional=True),
    Case(batched=False),
    Case(batched=False, batch_first=True, states=False, bidirectional=True),
    Case(batch=11, num_layers=3),
    Case(batch=11, num_layers=2, bidirectional=True, packed="sorted"),
    Case(batch=11, num_layers=2, bidirectional=True, packed="unsorted", batch_first=True),
    Case(batch=11, packed="unsorted", states=False, bias=False),
    Case(batch=11, steps=1),
    Case(steps=1, batch=1, states=False),
    Case(input_size=0, batch=11, bidirectional=True),
    Case(input_size=0, states=False, bias=False),
    Case(batch=1, hidden_size=1, input_size=1),
    Case(batch=70, hidden_size=8, steps=2),
    Case(batch=11, proj_size=1, bidirectional=True, num_layers=2),
    Case(batch=11, proj_size=5, packed="sorted", bidirectional=True, num_layers=2),
    Case(batch=11, proj_size=8, states=False),
    Case(batch=11, proj_size=13, bias=False, batch_first=True),
    Case(batched=False, proj_size=19),
]
FEW_BLOCKS = {"cluster": 2, "grid": 3, "stream": 2, "steps": 0}


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", FEW_BLOCKS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_feature_matches_float64_reference(device, variant, kernel, arithmetic):
    for mode in ["LSTM"] if variant.proj_size else MODES:
        case = replace(variant, mode=mode, dtype=ARITHMETIC[arithmetic][0])
        if case.hidden_size == 7:
            case = replace(case, hidden_size=20)
        blocks = FEW_BLOCKS[kernel] if case.hidden_size > 8 * FEW_BLOCKS[kernel] else 1
        device.check(case, arithmetic, f"{kernel}:{blocks}" if blocks else kernel)


@pytest.mark.parametrize("mode", MODES)
def test_batch_of_no_rows(device, mode):
    case = Case(mode, batch=0, num_layers=2, bidirectional=True)
    module = make_module(case)
    results = device.run(case, module)
    assert results["output"].shape == (5, 0, 14)
    for name, weight in module.named_parameters():
        assert results[f"grad of {name}"].shape == weight.shape
        assert not results[f"grad of {name}"].any()


# What a user may give to a cell: every mode, with and without states and biases, with and without a batch.
CELLS = [
    Case(batch=11, hidden_size=20),
    Case(states=False, batch=11, hidden_size=20),
    Case(bias=False, batch=33, hidden_size=45),
    Case(batched=False, states=False, bias=False),
    Case(batch=1, hidden_size=1, input_size=1),
    Case(input_size=0, batch=11),
]


def run_cell(device, case):
    cell, data = move(test_cells.make_cell(case), test_cells.make_data(case), device.where)
    return test_cells.run_cell(case, cell, data)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", CELLS, ids=str)
def test_cells_match_float64_reference(device, variant, mode, arithmetic):
    dtype, tf32 = ARITHMETIC[arithmetic]
    case = replace(variant, mode=mode, dtype=dtype)
    parameters = dict(test_cells.make_cell(case).named_parameters())
    data = test_cells.make_data(case)
    exact = test_cells.run_reference(case, parameters, data)
    # Without tensor cores of their own: torch multiplies, or a kernel in full precision.
    with ProductsInTf32() if tf32 and device.is_gpu else nullcontext():
        torchs = test_cells.run_reference(case, parameters, data, dtype)
    with device.using(tf32=tf32):
        assert_all_as_accurate_as_torch(run_cell(device, case), torchs, exact, dtype)


# ------------------------------------------------------------------------------ every way through the kernels


def registers_only(plan, p):
    return p["register_units"] == p["units"]


def rounds(plan):
    """In how many rounds the threads of a block go through its units and rows, two of them at a time."""
    return -(-plan["units"] * plan["rows"] // (2 * plan["threads"]))


def several_launches(plan, p):
    return plan["groups"] > plan["groups_at_once"]


# name: what a plan and one of its products show, then arithmetic, forced plan, facts, network and sizes.
WAYS = {
    "weights in registers": (registers_only, "bfloat16", "cluster:2", HOPPER, "LSTM"),
    "and in shared memory": (
        lambda plan, p: p["register_units"] and p["shared_units"] and not p["streamed_units"],
        *("float64", "cluster:2", HOPPER, "LSTM", 70),
    ),
    "and streamed": (
        lambda plan, p: p["register_units"] and p["shared_units"] and p["streamed_units"],
        *("float32", "stream:1", TIGHT_AMPERE, "LSTM"),
    ),
    "in registers and streamed": (
        lambda plan, p: p["register_units"] and not p["shared_units"] and p["streamed_units"],
        *("float64", "stream:1", TINY_AMPERE, "LSTM"),
    ),
    "two products in registers": (
        lambda plan, p: all(registers_only(plan, q) for q in plan["products"]),
        *("bfloat16", "grid:2", HOPPER, "GRU_RESET_BEFORE"),
    ),
    "two products in registers and in shared memory": (
        lambda plan, p: all(q["shared_units"] and not q["streamed_units"] for q in plan["products"]),
        *("float64", "grid:2", HOPPER, "GRU_RESET_BEFORE", 70),
    ),
    "two products in registers and in shared memory of a cluster": (
        lambda plan, p: all(q["shared_units"] and not q["streamed_units"] for q in plan["products"]),
        *("float32", "cluster:1", HOPPER, "GRU_RESET_BEFORE", 90),
    ),
    "two products streamed": (
        lambda plan, p: all(q["streamed_units"] for q in plan["products"]),
        *("float64", "stream:1", AMPERE, "GRU_RESET_BEFORE", 70),
    ),
    "two products in registers and streamed": (
        lambda plan, p: all(q["streamed_units"] and not q["shared_units"] for q in plan["products"]),
        *("float64", "stream:1", TINY_AMPERE, "LSTM projected"),
    ),
    "operand in several chunks": (
        lambda plan, p: p["chunks"] > 2,
        *("float64", "grid:3", TIGHT_HOPPER, "LSTM", 70),
    ),
    "several passes over one chunk": (
        lambda plan, p: p["passes"] > 1 and p["chunks"] == 1 and plan["kernel"] == "grid",
        *("float64", "grid:1", HOPPER, "LSTM"),
    ),
    "several passes over several chunks": (
        lambda plan, p: p["passes"] > 1 and p["chunks"] > 1 and plan["kernel"] == "grid",
        *("bfloat16", "grid:1", AMPERE, "LSTM", 70),
    ),
    "several passes over several chunks, streamed": (
        lambda plan, p: p["passes"] > 1 and p["chunks"] > 1 and p["streamed_units"],
        *("float64", "stream:1", TIGHT_AMPERE, "GRU_RESET_BEFORE", 70),
    ),
    "several passes, gathered in a cluster": (
        lambda plan, p: p["passes"] > 1 and plan["kernel"] == "cluster" and p["exchange"] == "operand",
        *("float64", "cluster:1", HOPPER, "LSTM"),
    ),
    "several passes, gathered in a cluster's backward pass": (
        lambda plan, p: p["passes"] > 1 and plan["pass"] == "backward" and p["exchange"] == "operand",
        *("float64", "cluster:1:operand", HOPPER, "LSTM", 70),
    ),
    "several passes, scattered": (
        lambda plan, p: p["passes"] > 1 and p["exchange"] == "sums",
        *("float32", "cluster:1:sums", HOPPER, "RNN_TANH", 70),
    ),
    "warps share k, scattered": (
        lambda plan, p: p["warps"][1] > 1 and plan["blocks"] > 1 and p["exchange"] == "sums",
        *("float64", "cluster:2:sums", HOPPER, "LSTM"),
    ),
    "warps share m and k, gathered by a grid": (
        lambda plan, p: min(p["warps"]) > 1 and plan["blocks"] > 1 and p["exchange"] == "operand",
        *("float64", "stream:3", TIGHT_HOPPER, "LSTM"),
    ),
    "two rounds of items": (lambda plan, p: rounds(plan) == 2, "float32", "cluster:1", HOPPER, "LSTM", 70),
    "several rounds of items": (
        lambda plan, p: rounds(plan) > 2,
        *("tf32", "cluster:1x4", HOPPER, "GRU", 70),
    ),
    "several rounds of items, reset before": (
        lambda plan, p: rounds(plan) > 2,
        *("bfloat16", "stream:1x2", HOPPER, "GRU_RESET_BEFORE", 90),
    ),
    "several rounds of items, projected": (
        lambda plan, p: rounds(plan) > 2,
        *("bfloat16", "cluster:1x2", HOPPER, "LSTM projected", 90),
    ),
    "several launches": (several_launches, "float32", "grid:2", AMPERE, "LSTM"),
    "several launches, two products": (several_launches, "float32", "grid:2", AMPERE, "GRU_RESET_BEFORE"),
    "several launches, streamed": (several_launches, "bfloat16", "stream:2", AMPERE, "LSTM projected"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_the_kernels_matches_float64_reference(device, way):
    """And is really taken, in one of the two passes at least."""
    shows, arithmetic, plan, facts, name, *hidden_size = WAYS[way]
    case = network(name, arithmetic, bidirectional=True, packed="sorted", steps=3)
    case = replace(case, hidden_size=hidden_size[0], batch=37) if hidden_size else case
    ran = device.check(case, arithmetic, plan, facts)
    if device.is_gpu and device.facts_like(facts) != facts:
        return  # it cannot be made to plan as that GPU does
    assert any(shows(plan, p) for plan in ran for p in plan["products"])


@st.composite
def cases(draw):
    """A network of any shape, arithmetic, facts and a kernel, or "" for the plan's own choice."""
    arithmetic = draw(st.sampled_from(list(ARITHMETIC)))
    mode = draw(st.sampled_from(MODES))
    least = 6 if arithmetic == "tf32" else 1  # torch's rounding of a few numbers may be little, by luck
    hidden_size = draw(st.integers(least, 100))
    case = Case(
        mode=mode,
        dtype=ARITHMETIC[arithmetic][0],
        steps=draw(st.integers(1, 6)),
        batch=draw(st.integers(least, 70)),
        input_size=draw(st.integers(1, 5)),
        hidden_size=hidden_size,
        num_layers=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.sampled_from([0, draw(st.integers(0, hidden_size - 1))])) if mode == "LSTM" else 0,
        packed=draw(st.sampled_from(["", "", "sorted", "unsorted"])),
        states=draw(st.booleans()),
    )
    facts = draw(st.sampled_from([HOPPER, TIGHT_HOPPER, AMPERE, TIGHT_AMPERE]))
    kernels = ["", "stream", "steps"] + ["cluster"] * 2 * (facts[0] >= 9)
    kernel = draw(st.sampled_from(kernels))
    if (kernel, facts, arithmetic) == ("cluster", TIGHT_HOPPER, "float64") and case.proj_size:
        kernel = ""  # the largest have no room there
    return case, arithmetic, kernel, facts


@settings(max_examples=200)
@given(drawn=cases())
def test_any_shape_matches_float64_reference(device, drawn):
    case, arithmetic, kernel, facts = drawn
    device.check(case, arithmetic, kernel, facts)


@settings(max_examples=100)
@given(drawn=cases())
def test_any_shape_with_room_for_a_grid_matches_float64_reference(device, drawn):
    case, arithmetic, _, facts = drawn
    try:
        device.check(case, arithmetic, "grid", facts)
    except RuntimeError as error:
        if "a forced plan" in str(error):  # too little shared memory: a few of the largest
            reject()
        raise


# ------------------------------------------------------------------------------------------------- gradients

SMALL = Case(dtype=torch.float64, steps=2, batch=2, input_size=1, hidden_size=9)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "plan", ["cluster:1:sums", "cluster:2:sums", "cluster:2:operand", "grid:2", "stream:2", "steps"]
)
def test_gradients_are_those_of_finite_differences(device, name, plan):
    mode, _, projected = name.partition(" ")
    case = replace(SMALL, mode=mode, proj_size=3 if projected else 0, batch=3, packed="unsorted")
    with device.using(plan) as ran:
        module, data = move(make_module(case), make_data(case), device.where)
        # Of the weights, whose gradients are products over all steps, the recurrent ones alone.
        for weight_name, weight in module.named_parameters():
            weight.requires_grad_("_hh" in weight_name or "_hr" in weight_name)
        assert gradcheck_module(case, module, data)
        assert {plan["pass"] for plan in ran} == {"forward", "backward"}


@pytest.mark.parametrize("plan", ["cluster:2", "stream:3", "steps"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_when_only_some_tensors_want_one(device, name, plan):
    """Each tensor alone: the gradient is the one that it gets when all want theirs."""
    case = network(name, "float64", bidirectional=True, batch=5)
    with device.using(plan):
        module, data = move(make_module(case), make_data(case), device.where)
        tensors = {**data, **dict(module.named_parameters())}
        everything = with_gradients(call_module(case, module, data), tensors, case.dtype)
        for wanted in tensors:
            for other, x in tensors.items():
                x.requires_grad_(other == wanted)
            alone = with_gradients(call_module(case, module, data), tensors, case.dtype)
            key = f"grad of {wanted}"
            assert [k for k in alone if k.startswith("grad of")] == [key]
            assert_all_as_accurate_as_torch(alone, everything, {k: everything[k] for k in alone}, case.dtype)


@pytest.mark.parametrize("plan", ["cluster:2", "stream:3", "steps"])
@pytest.mark.parametrize("packed", ["", "unsorted"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_that_are_not_used_count_as_zero_gradients(device, name, packed, plan):
    """Only output, only h_n or only c_n reaches the loss: autograd hands undefined gradients for the rest."""
    case = network(name, "float64", bidirectional=True, num_layers=2, packed=packed, batch=5)
    module, data = make_module(case), make_data(case)
    leaves = {**data, **dict(module.named_parameters())}
    moved_module, moved = move(module, data, device.where)
    moved_leaves = {**moved, **dict(moved_module.named_parameters())}
    for used in ("output", "h_n", "c_n") if case.mode == "LSTM" else ("output", "h_n"):
        exact = with_gradients({used: call_reference(case, leaves, data)[used]}, leaves, case.dtype)
        with device.using(plan):
            outputs = {used: call_module(case, moved_module, moved)[used]}
            ours = with_gradients(outputs, moved_leaves, case.dtype)
        assert_all_as_accurate_as_torch(ours, exact, exact, case.dtype)


# -------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("plan", ["cluster:2", "grid:1", "stream:1", "steps"])
@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_sixteen_bits_do_not_drift_over_many_steps(device, mode, arithmetic, plan):
    """Gates that keep nearly all of the state, over 512 steps: what adds up does so in float."""
    case = network(mode, arithmetic, steps=512, batch=3, input_size=4, hidden_size=16, states=False)
    module, data = make_module(case), make_data(case)
    with torch.no_grad():
        module.bias_ih_l0[16:32] = 6  # the forget gate of an LSTM, z of a GRU
    torchs = run_torch(case, dict(module.named_parameters()), data)
    exact = run_reference(case, dict(module.named_parameters()), data)
    with device.using(plan):
        ours = device.run(case, module, data)
    assert_all_as_accurate_as_torch(ours, torchs, exact, case.dtype)
    if mode == "LSTM":  # where torch's own c_n is ten times as far off
        error = largest(ours["c_n"].double() - exact["c_n"])
        assert error <= torch.finfo(case.dtype).eps * largest(exact["c_n"])


LONG = Case("RNN_TANH", steps=70_000, batch=1, input_size=2, hidden_size=3, states=False)


@cache
def long_results(dtype):
    """Those of torch.nn."""
    module = make_module(replace(LONG, dtype=dtype), nn)
    module.load_state_dict(make_module(LONG).state_dict())
    data = {"input": make_data(LONG)["input"].detach().to(dtype).requires_grad_()}
    with threads(1):
        return run_module(LONG, module, data)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "packed"), [("cluster:1", ""), ("stream:1", "sorted")])
def test_seventy_thousand_steps(device, plan, packed):
    """Padded and packed; the offsets of so many steps do not fit into the parameters of one launch."""
    with device.using(plan):
        ours = device.run(replace(LONG, packed=packed))
    torchs, exact = long_results(torch.float32), long_results(torch.float64)
    assert_all_as_accurate_as_torch(ours, torchs, exact, LONG.dtype)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.cuda_host
@pytest.mark.parametrize(
    "mistake", mistakes(MODULES, BAD_CALLS) + mistakes(CELL_CLASSES, BAD_CELL_CALLS), ids=str
)
def test_bad_call_is_rejected_as_on_the_cpu(twin, mistake):
    with twin.using() as ran:
        assert_rejected_like_torch(mistake)
        assert not ran


def packed_arguments(device):
    """Of torch.ops.fastseq.recurrent for a packed sequence of rows of 3 and 1 steps."""
    input, h0 = torch.randn(4, 3, device=device.where), torch.randn(1, 2, 5, device=device.where)
    weights = [torch.randn(shape, device=device.where) for shape in [(15, 3), (15, 5), (15,), (15,)]]
    return [input, torch.tensor([2, 1, 1]), None, None, h0, None, weights, "GRU", 1, True, False, "gates"]


BATCH_SIZES = {
    "elsewhere": lambda sizes: sizes.to("meta"),
    "increasing": lambda sizes: torch.tensor([2, 0, 2]),
    "below zero": lambda sizes: torch.tensor([2, 3, -1]),
    "too few rows": lambda sizes: torch.tensor([2, 1]),
    "too many rows": lambda sizes: torch.tensor([2, 2, 1]),
    "another batch": lambda sizes: torch.tensor([3, 1]),
    "huge": lambda sizes: torch.tensor([2, 2**62, -(2**62) + 2]),
    "none": lambda sizes: sizes[:0],
    "integers of 32 bits": lambda sizes: sizes.int(),
    "of two dimensions": lambda sizes: sizes[None],
}


@pytest.mark.parametrize("what", BATCH_SIZES)
def test_bad_batch_sizes(device, what):
    arguments = packed_arguments(device)
    with device.using() as ran:
        output, _, _, saved = ops.recurrent(*arguments)
        good = arguments[1]
        arguments[1] = BATCH_SIZES[what](good)
        if device.is_gpu and what == "elsewhere":
            arguments[1] = good.to("cuda")
        gradients = [torch.ones_like(output), None, None]
        wanted = [True, True, False] + [True] * 4
        ran.clear()
        for call in (
            lambda: ops.recurrent(*arguments),
            lambda: ops.recurrent_backward(
                *gradients, *arguments[:7], output, saved, *arguments[7:10], None, 0, wanted
            ),
        ):
            error = error_of(call)
            assert isinstance(error, RuntimeError)
            assert_three_lines(error)
            assert "batch_sizes" in str(error)
        assert not ran


@pytest.mark.parametrize("change", ["too few", "too many", "no plan", "a string"])
def test_loops_reject_arguments_that_they_cannot_read(device, change):
    class Spy:
        def __getattr__(self, name):
            return getattr(device.module.module, name)

        def loop_forward(self, plan, *arguments):
            if change == "too few":
                arguments = arguments[:-1]
            elif change == "too many":
                arguments += (1,)
            elif change == "no plan":
                plan = object()
            else:
                arguments = ("GRU", *arguments[1:])
            device.module.module.loop_forward(plan, *arguments)

    module = make_module(Case("GRU")).to(device.where)
    x = make_data(Case("GRU"))["input"].detach().to(device.where)
    with device.using():
        engine = loops.Engine(Spy(), lambda index: device.facts, device.stream)
        ops.KERNELS[device.where] = ops.loop_kernels(engine)
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            module(x)
