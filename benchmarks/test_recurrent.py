"""Absolute times for tracking from commit to commit with pytest-benchmark; ratios to torch are run.py's.

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%
"""

import pytest

import grid

CASES = [
    grid.Case(group, cell, mode, shape, "bfloat16" if group == "bfloat16" else "float32")
    for cell in grid.CELLS
    for group, mode, shape in (
        ("table", "inference", grid.TABLE[0]),
        ("table", "training", grid.TABLE[0]),
        ("table", "inference", grid.TABLE[2]),
        ("table", "training", grid.TABLE[2]),
        ("table", "training", grid.TABLE[6]),
        ("bfloat16", "training", grid.TABLE[2]),
        ("cells", "inference", grid.Shape(1, 1, 16, 32)),
        ("cells", "inference", grid.Shape(1, 48, 128, 256)),
    )
] + [grid.Case("reset_before", "GRU", mode, grid.TABLE[2]) for mode in grid.MODES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(benchmark, case):
    _, ours = case.functions()
    benchmark.group = case.group
    benchmark.extra_info["flops"] = case.flops
    benchmark(ours)
