"""Absolute times of attention for tracking from commit to commit, as test_recurrent.py has them."""

import pytest

import attention_grid as grid

CASES = [
    *grid.product("attention", grid.KINDS, grid.TABLE[1:2]),
    *grid.product("decoding", ("full",), (grid.DECODING,), modes=("inference",)),
    *grid.product("masks", grid.MASKS, grid.MASKED[:1], dtypes=("float32",)),
    *grid.product("options", grid.OPTIONS, grid.MASKED[:1], dtypes=("float32",)),
    *grid.product("modules", grid.MODULES, grid.MODULE[:1], dtypes=("float32",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(benchmark, case):
    _, ours = case.functions()
    benchmark.group = case.group
    benchmark.extra_info["flops"] = case.flops
    benchmark(ours)
