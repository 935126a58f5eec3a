"""Attention over a sequence that is split between processes gives what one process makes of the whole."""

import pytest
import torch
import torch.distributed as dist

import fastseq
from processes import World
from split_attention import Case, call, check, make_data, run_part

pytestmark = pytest.mark.slow  # it starts processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(3, tmp_path_factory.mktemp("world")) as world:
        yield world


TWO, THREE = (1, 2), (0, 1, 2)  # of two processes with other ranks than in the default group


def run(world, case):
    parts = world.run(run_part, case, TWO if case.size == 2 else THREE)
    return [part for part in parts if part is not None]


CAUSAL = {"is_causal": True}
CASES = {
    "full, two": Case((5, 5), (6, 6)),
    "full, three uneven": Case((5, 1, 3), (2, 7, 4)),
    "causal, two": Case((6, 6), (6, 6), CAUSAL),
    "causal, three uneven": Case((5, 1, 7), (5, 1, 7), CAUSAL),
    "causal, keys cut elsewhere": Case((5, 1, 7), (2, 10, 1), CAUSAL),
    "causal, more keys": Case((3, 4), (9, 5), CAUSAL),
    "bottom right, more keys": Case((3, 4, 2), (9, 5, 6), {"causal": "bottom_right"}),
    "bottom right, fewer keys": Case((9, 8), (5, 6), {"causal": "bottom_right"}),
    "window, three": Case((6, 6, 6), (6, 6, 6), {"window": (4, 2)}),
    "causal window within the neighbour": Case((6, 6, 6), (6, 6, 6), {"window": (3, None), **CAUSAL}),
    "window at the last key": Case((2, 3), (9, 9), {"window": (2, 0), "causal": "bottom_right"}),
    "nobody's part is empty for all": Case((4, 0, 3), (0, 5, 2), CAUSAL),
    "no keys at all": Case((4, 3), (0, 0)),
    "grouped heads": Case((5, 4), (6, 3), CAUSAL, kv_heads=2),
    "one key head, other values": Case((5, 4, 2), (6, 3, 2), kv_heads=1, value_size=5),
    "scale and soft cap": Case((5, 4), (6, 3), {"scale": -0.7, "softcap": 1.5}),
    "a scale of zero": Case((5, 4), (6, 3), {"scale": 0.0}),
    "key lengths": Case((5, 4, 3), (6, 3, 4), lengths=(13, 2)),
    "a length of nothing, causal": Case((5, 4), (5, 4), CAUSAL, lengths=(0, 7)),
    "bool mask": Case((5, 4, 2), (6, 3, 5), mask="bool"),
    "bool mask of keys, causal": Case((5, 4), (5, 4), CAUSAL, mask="bool", mask_dims="BK"),
    "trained mask": Case((5, 4, 2), (6, 3, 5), mask="float"),
    "trained mask of heads and keys, window": Case(
        (5, 4), (6, 3), {"window": (3, 2)}, mask="float", mask_dims="HK"
    ),
    "trained mask of queries": Case((5, 4), (6, 3), mask="float", mask_dims="Q"),
    "sinks": Case((5, 4, 2), (6, 3, 5), sinks=True),
    "sinks and no keys": Case((5, 4), (0, 0), sinks=True),
    "sinks, causal bottom right, soft cap": Case(
        (9, 8), (5, 6), {"causal": "bottom_right", "softcap": 2.0}, sinks=True
    ),
    "zigzag, causal": Case((4, 4), (4, 4), CAUSAL, split="zigzag"),
    "zigzag, causal, three uneven": Case((7, 6, 6), (7, 6, 6), CAUSAL, split="zigzag"),
    "zigzag, causal, few rows": Case((1, 1, 1), (1, 1, 1), CAUSAL, split="zigzag"),
    "zigzag, full": Case((6, 6), (4, 4), split="zigzag"),
    "zigzag, everything": Case(
        (6, 6, 6),
        (10, 10, 10),
        {"window": (9, None), "causal": "bottom_right", "softcap": 3.0},
        kv_heads=2,
        mask="float",
        sinks=True,
        split="zigzag",
    ),
    "zigzag, mask and lengths": Case(
        (6, 6), (6, 6), CAUSAL, mask="bool", mask_dims="QK", lengths=(5, 11), split="zigzag"
    ),
    "all queries everywhere": Case((5, 5), (6, 3), replicated=True),
    "all queries everywhere, decoding": Case(
        (1, 1, 1), (6, 3, 5), {"causal": "bottom_right"}, kv_heads=2, replicated=True
    ),
    "all queries everywhere, everything": Case(
        (4, 4, 4),
        (6, 3, 5),
        {"window": (6, None), "causal": "bottom_right"},
        mask="float",
        mask_dims="HQK",
        sinks=True,
        replicated=True,
    ),
    "all queries everywhere, zigzag keys": Case(
        (5, 5), (4, 4), CAUSAL, lengths=(3, 7), split="zigzag", replicated=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(world, name):
    check(CASES[name], run(world, CASES[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {"options": CAUSAL, "split": "zigzag"},
        {"options": CAUSAL, "kv_heads": 2, "mask": "float", "sinks": True},
        {"options": CAUSAL, "replicated": True},
    ],
    ids=["zigzag", "everything", "replicated"],
)
def test_results_are_as_accurate_as_one_process_makes_them(world, dtype, size, fields):
    rows = (72 // size,) * size
    case = Case(rows if not fields.get("replicated") else (72,) * size, rows, dtype=dtype, **fields)
    check(case, run(world, case))


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [24, 90])
@pytest.mark.parametrize(
    "fields",
    [
        {"options": CAUSAL},
        {"options": CAUSAL, "kv_heads": 1, "sinks": True},
        {"options": {"window": (20, 3)}, "mask": "float"},
        {"lengths": True},
    ],
    ids=str,
)
def test_blocks_of_one_process_are_merged_alike_on_cuda_kernels(group_of_one, device, rows, fields, dtype):
    """A zigzag of one process has two parts, of which the second one sees both."""
    lengths = (rows // 2 + 5, 5) if fields.get("lengths") else ()  # few keys of a part
    case = Case((rows,), (rows,), split="zigzag", dtype=dtype, **(fields | {"lengths": lengths}))
    function = fastseq.distributed.scaled_dot_product_attention
    data = {name: x.to(device.where) for name, x in make_data(case).items()}
    with device.using():
        ours = call(case, data, function, split="zigzag")
    check(case, [{name: x.cpu() for name, x in ours.items()}])
