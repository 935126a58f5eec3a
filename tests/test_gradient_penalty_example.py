"""examples/gradient_penalty.py, run as its head says, with networks that are small."""

import re

import pytest
import torch

from test_commands import ROOT, run
from tolerances import SAME_FLOAT32

EXAMPLE = ROOT / "examples" / "gradient_penalty.py"


@pytest.mark.slow
def test_example_trains_a_critic_and_finds_one_eigenvalue_in_two_ways(tmp_path):
    arguments = ("--steps=30", "--batch-size=16", "--hidden-size=12", "--rounds=12")
    code, output = run(EXAMPLE, *arguments, cwd=tmp_path)
    assert code == 0, output
    slopes = [float(x) for x in re.findall(r"^step .* slope ([\d.]+)$", output, flags=re.M)]
    assert len(slopes) == 5, output
    assert abs(slopes[-1] - 1) < abs(slopes[0] - 1), "the penalty draws slopes to 1"
    values = re.findall(r"^largest eigenvalue, (\w+ over \w+): (-?[\d.]+) ", output, flags=re.M)
    assert [way for way, _ in values] == ["forward over reverse", "reverse over reverse"], output
    torch.testing.assert_close(*(float(value) for _, value in values), **SAME_FLOAT32)


@pytest.mark.slow
def test_example_says_which_numbers_it_accepts(tmp_path):
    code, output = run(EXAMPLE, "--steps=0", cwd=tmp_path)
    assert code == 2
    assert "given: 0; accepted: a number of at least 1" in output
