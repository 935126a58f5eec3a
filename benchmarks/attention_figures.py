"""The figures of attention: speed-up per shape, and share of the machine's peak, for each dtype."""

from __future__ import annotations

from attention_grid import DTYPES, KINDS
from figures import Series, draw_share, draw_speedup
from summary import select

SERIES = Series(
    "kind",
    KINDS,
    "torch",
    "B sequences, H heads, S queries and keys, D features of a head; causal counts half the operations",
)


def draw(results, folder):
    """Draw every figure that the records allow; returns their paths."""
    paths = []
    for dtype in DTYPES:
        records = select(results["cases"], group="attention", dtype=dtype)
        if not records:
            continue
        for name, drawn in (("speedup", draw_speedup), ("share_of_peak", draw_share)):
            paths.append(folder / f"{name}_attention_{dtype}.png")
            drawn(records, f"attention in {dtype}", results["environment"], paths[-1], SERIES)
    return paths
