"""Tables for README.md, and the places in it that are written by a command."""

from __future__ import annotations

import summary


class ReportError(Exception):
    pass


def table(header, rows):
    """A markdown table; the first column is text, the others numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def ratio(records, **wanted):
    chosen = summary.select(records, **wanted)
    return times(summary.geometric_mean(chosen)) if chosen else ""


def times(value):
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


def measured_on(results):
    """Of a run on a CPU."""
    environment = results["environment"]
    cpu = f"{environment['cpu']} ({environment['isa']}), {environment['threads']} threads"
    versions = f"torch {environment['torch']}, Python {environment['python']}"
    return f"{cpu}; {versions}; {environment['date'][:10]}, commit {(environment['commit'] or 'none')[:7]}"


def replace_section(text, name, new, path):
    """The text with `new` between the markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(
            f"given {path} without a place for the table\n"
            f"accepted: one line {begin} and, below it, one line {end}\n"
            "try adding the two lines where the table should stand"
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"
