"""The average error of attention, over many draws of the data, is about torch's own.

The largest error of one tensor, which the other tests look at, may be twice torch's by luck; the average of
thousands may not. So this finds what is systematically less exact, such as weights that are computed from
rounded numbers in the backward pass.
"""

import math
from dataclasses import replace

import pytest
import torch

from attention_harness import (
    ALL,
    Case,
    kept_weights,
    make_data,
    run_fastseq,
    run_reference,
    run_torch,
)
from tolerances import ROOT_MEAN_SQUARE_ERROR

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS = 8
CASES = {
    "plain": Case(queries=60, keys=70, head_size=24),
    "64": Case(queries=40, keys=100, head_size=64),
    "causal": Case(queries=100, keys=100, head_size=64, causal="top_left"),
    "large scores": Case(queries=60, keys=70, head_size=24, scale=-1.7),
    "few queries": Case(queries=5, keys=100, head_size=32),
    "few queries, large scores": Case(queries=3, keys=131, head_size=24, scale=1.7),
    "one query": Case(batch=8, queries=1, keys=200, head_size=64),
    "one query, large scores": Case(batch=8, queries=1, keys=131, head_size=24, scale=1.7),
    "one query, softcap": Case(batch=8, queries=1, keys=70, scale=2.0, softcap=50.0),
    "softcap": Case(queries=40, keys=70, scale=2.0, softcap=5.0),
    "mask": Case(queries=40, keys=70, mask="float"),
    "mask of keys": Case(queries=40, keys=70, mask="float", mask_dims="K"),
    "sinks": Case(queries=40, keys=70, sinks=True, head_size=33),
    "alibi": Case(queries=40, keys=70, alibi="H", causal="bottom_right"),
    "grouped": Case(heads=8, kv_heads=2, queries=40, keys=70, head_size=20),
    "lse and weights": Case(queries=40, keys=70, head_size=16, returns=ALL),
    "dropout": Case(queries=40, keys=70, head_size=16, dropout=0.3),
    "long keys": Case(batch=1, queries=20, keys=2000, head_size=16),
}


def squares(case: Case):
    """Sums over the draws, by result: of squared errors of ours and of torch's, of squares, and the count."""
    sums = {}
    for seed in range(DRAWS):
        data = make_data(case, seed)
        keep = kept_weights(case, data)
        exact, _ = run_reference(case, data, keep)
        ours, torchs = run_fastseq(case, data), run_torch(case, data, keep)
        for name, x in exact.items():
            finite = x.isfinite()
            errors = [(y[name].double() - x)[finite] for y in (ours, torchs)]
            row = [*(e.square().sum().item() for e in errors), x[finite].square().sum().item()]
            sums[name] = [a + b for a, b in zip(sums.get(name, (0, 0, 0)), row, strict=True)]
    return sums


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_root_mean_square_error_is_about_torchs(dtype, name):
    case = replace(CASES[name], dtype=dtype)
    times, units = ROOT_MEAN_SQUARE_ERROR["times"], ROOT_MEAN_SQUARE_ERROR["units"]
    for result, (ours, torchs, size) in squares(case).items():
        precision = torch.finfo(case.accumulation if result == "lse" else dtype).eps
        ours, torchs = (math.sqrt(x / size) / precision for x in (ours, torchs))
        assert ours <= times * torchs + units, f"{result}: {ours:.3g} units, torch's own {torchs:.3g}"
