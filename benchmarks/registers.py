"""Registers, spills and memory of the kernels, from what `ptxas -v` printed during a build.

    python benchmarks/registers.py build.log

One line per kernel and architecture, those that spill first. A build that compiles nothing prints nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
COLUMNS = ("registers", "stack", "spill stores", "spill loads", "static smem")


def kernels(log):
    """{(mangled name, architecture): {column: number}}"""
    found, current = {}, None
    for line in log.splitlines():
        if match := ENTRY.search(line):
            current = found[match.groups()] = dict.fromkeys(COLUMNS, 0)
        elif current is None:
            continue
        elif match := STACK.search(line):
            current["stack"], current["spill stores"], current["spill loads"] = map(int, match.groups())
        elif match := USED.search(line):
            current["registers"], current["static smem"] = int(match[1]), int(match[2] or 0)
            current = None
    return found


def demangled(names):
    """As C++ writes them, where c++filt is there to tell."""
    names = list(names)
    if not names or not shutil.which("c++filt"):
        return dict(zip(names, names, strict=True))
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return (
        dict(zip(names, run.stdout.splitlines(), strict=True))
        if run.returncode == 0
        else {n: n for n in names}
    )


def lines(log):
    found = kernels(log)
    if not found:
        yield "no kernel was compiled in this build (one that is up to date prints nothing: rm -rf build)"
        return
    names = demangled(dict.fromkeys(name for name, _ in found))
    spilling = sum(numbers["spill stores"] > 0 for numbers in found.values())
    most = max(numbers["registers"] for numbers in found.values())
    yield f"{len(found)} kernels, {spilling} with spills, at most {most} registers"
    yield "".join(f"{column:>13}" for column in COLUMNS) + "  sm       kernel"
    worst_first = sorted(found.items(), key=lambda item: (-item[1]["spill stores"], -item[1]["registers"]))
    for (name, architecture), numbers in worst_first:
        row = "".join(f"{numbers[column]:>13}" for column in COLUMNS)
        yield f"{row}  {architecture.removeprefix('sm_'):<7}  {names[name]}"


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]).read_text(errors="replace"))))
