"""examples/attention_map.py, run as its head says, with a model that is small."""

import re

import pytest
import torch

from test_commands import PNG, ROOT, run
from tolerances import DEMO_CURVES, DEMO_TABLE

pytest.importorskip("sklearn")

EXAMPLE = ROOT / "examples" / "attention_map.py"
SMALL = ("--threads=1", "--steps=12", "--batch-size=8", "--embedding-size=12", "--heads=2", "--layers=1")


@pytest.mark.slow
def test_example_trains_both_libraries_along_the_same_curve_and_draws(tmp_path):
    figure = tmp_path / "new" / "attention.png"
    code, output = run(EXAMPLE, *SMALL, "--figure", figure, cwd=tmp_path)
    assert code == 0, output
    assert figure.read_bytes().startswith(PNG)

    difference = re.search(r"largest difference at any step (\S+?), mean", output)
    assert difference, output
    torch.testing.assert_close(float(difference[1]), 0.0, **DEMO_CURVES)
    rows = re.findall(r"^(torch\.nn|fastseq) +([\d.,]+) +([\d.]+) +([\d.]+) +([\d.]+)%$", output, flags=re.M)
    assert [name for name, *_ in rows] == ["torch.nn", "fastseq"], output
    loss, right = zip(*([float(x) for x in row[3:]] for row in rows), strict=True)
    torch.testing.assert_close(*loss, **DEMO_TABLE)
    assert all(0 <= share <= 100 for share in right)
    assert re.search(r"speed-up +[\d.]+x", output)


@pytest.mark.slow
def test_example_says_which_heads_it_accepts(tmp_path):
    code, output = run(EXAMPLE, "--embedding-size=64", "--heads=12", cwd=tmp_path)
    assert code == 2
    for words in ("given 12 for --embedding-size 64", "accepted: a number that divides it", "try --heads 4"):
        assert words in output
    assert not (tmp_path / "out").exists()
