"""What the CPU's engine promises of dual numbers beyond the ladder of test_dual_operators.py: the same on
every instruction set, and the same bits however the work is cut, and with tangents or without."""

from dataclasses import replace

import pytest
import torch

from harness import DTYPES, assert_same_bits, threads
from sequence_options import Options
from test_dual_operators import CASES, LAYERS, RESULTS, SMALL, Layer, check
from tolerances import SAME_FLOAT64


@pytest.mark.smoke
@pytest.mark.parametrize("case", [c for c in CASES if c.batch == 37 or c.proj_size], ids=str)
def test_every_instruction_set_matches_the_equations(case):
    check(Layer(case))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_same_bits_whatever_the_thread_count_and_from_run_to_run(mode, proj_size, dtype):
    case = replace(SMALL, mode=mode, proj_size=proj_size, batch=37, hidden_size=65, input_size=33)
    layer = Layer(replace(case, bidirectional=True, dtype=dtype), Options(lengths=True))
    with threads(1):
        first = layer.run()
        assert_same_bits(first, layer.run())
    for count in (2, 3):
        with threads(count):
            assert_same_bits(first, layer.run(), f" with {count} threads")


@pytest.mark.parametrize("plan", ["2x1x1", "1x2x1", "1x1x2"])
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_every_partition_gives_the_same_bits(mode, proj_size, plan, two_threads, monkeypatch):
    case = replace(SMALL, mode=mode, proj_size=proj_size, hidden_size=45, bidirectional=True)
    layer = Layer(case, Options(resets=True))
    monkeypatch.setenv("FASTSEQ_PLAN", "1x1x1")
    first = layer.run()
    monkeypatch.setenv("FASTSEQ_PLAN", plan)
    assert_same_bits(first, layer.run())


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_chunks_of_few_rows_give_what_one_chunk_does(mode, proj_size, rows, monkeypatch):
    layer = Layer(replace(SMALL, mode=mode, proj_size=proj_size, bidirectional=True, dtype=torch.float64))
    whole = layer.run()
    monkeypatch.setenv("FASTSEQ_PLAN", f"1x1x1x{rows}")
    for name, x in layer.run().items():
        torch.testing.assert_close(x, whole[name], **SAME_FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
def test_numbers_have_the_bits_of_the_operator_without_tangents(mode, proj_size, dtype):
    case = replace(SMALL, mode=mode, proj_size=proj_size, hidden_size=300, bidirectional=True, dtype=dtype)
    layer = Layer(case)
    ours, plain = layer.run(), layer.run_plainly()
    assert_same_bits(
        {name: ours[name] for name in RESULTS if name in ours},
        {name: x for name, x in plain.items() if name in RESULTS},
    )
