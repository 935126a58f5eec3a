"""What the runners for CPU and GPU share: choosing cases, comparing results, and the file of records."""

from __future__ import annotations

import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
RECURRENT, ATTENTION = "results.json", "attention.json"  # what a run leaves, on a CPU or a GPU


def choose(parser, cases, cells=None, pattern=None):
    """The cases of these cells whose name matches; ends the program if none is left."""
    if cells:
        cases = [case for case in cases if case.cell in cells]
    if pattern:
        try:
            matches = re.compile(pattern, re.IGNORECASE).search
        except re.error as error:
            parser.error(f"argument --case: {pattern!r} is no regular expression: {error}")
        cases = [case for case in cases if matches(case.name)]
    if not cases:
        parser.error("no case is left\ntry --list for the names, and a wider --case or --cells")
    return cases


def slug(text):
    """Fit for the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def difference(theirs, ours):
    """Largest difference of any pair of tensors, relative to the largest value in torch's; NaN if any is."""

    def apart(a, b):
        a, b = a.double(), b.double()
        return ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item()

    found = [apart(a, b) for a, b in zip(theirs, ours, strict=True)]
    return next((value for value in found if value != value), max(found))


def save(results, path):
    """Write by renaming, so that a stopped run leaves the whole file of the case before."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def read(path):
    return json.loads(path.read_text())
