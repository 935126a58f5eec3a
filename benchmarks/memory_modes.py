"""What the memory modes of recurrent layers hold for the backward pass, and what they cost: on the CPU.

    python benchmarks/memory_modes.py               # T = 1000, B = 64, H = 512, LSTM and GRU; some minutes
    python benchmarks/memory_modes.py --steps 100 --out out/memory.json
    python benchmarks/memory_modes.py --cpu-time    # of one thread, for a machine that does other things too

Forward and backward pass with the gradients of input and parameters, the modes in turn in one process. Held
is what a layer saves beside its input and its parameters. Prints the table, and writes it between the markers
of docs/kernels/recurrent_cpu.md if asked with --write.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

import fastseq
from environment import ROOT, environment
from paired import in_turn
from readme import measured_on, replace_section, table
from timers import HostTimer, ProcessTimer

MODES = ("fast", "recompute", "checkpoint:32")
DOCS = ROOT / "docs" / "kernels" / "recurrent_cpu.md"


def bytes_held(module, input):
    """Of storages that are saved for the backward pass, but for those of the input and the parameters."""
    given = {x.untyped_storage().data_ptr() for x in (input, *module.parameters())}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(input)[0]
    assert output.requires_grad
    return sum(held.values())


def measure(cell, arguments):
    module = getattr(fastseq, cell)(arguments.hidden, arguments.hidden)
    input = torch.randn(arguments.steps, arguments.batch, arguments.hidden, requires_grad=True)
    grad = torch.randn(arguments.steps, arguments.batch, arguments.hidden)

    def train(memory):
        module.memory = memory
        torch.autograd.grad(module(input)[0], [input, *module.parameters()], grad)

    held = {}
    for memory in MODES:
        module.memory = memory
        held[memory] = bytes_held(module, input)
        train(memory)
    functions = {memory: lambda memory=memory: train(memory) for memory in MODES}
    timer = ProcessTimer() if arguments.cpu_time else HostTimer()
    rounds = in_turn(functions, None, arguments.budget, arguments.rounds, timer, looks=1)
    return [
        {
            "cell": cell,
            "memory": memory,
            "bytes": held[memory],
            "seconds": rounds.seconds[memory],
            "times": rounds.ratios(memory, "fast"),
            "others": rounds.others,
        }
        for memory in MODES
    ]


def rows_of(records):
    for cell in dict.fromkeys(record["cell"] for record in records):
        own = {record["memory"]: record for record in records if record["cell"] == cell}
        for memory, record in own.items():
            share = record["bytes"] / own["fast"]["bytes"]
            time = statistics.median(record["times"])
            yield [cell, f"`{memory}`", f"{record['bytes'] / 2**20:.1f} MB", f"{share:.0%}", f"{time:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512, help="of input and state")
    parser.add_argument("--budget", type=float, default=120, help="seconds for each cell")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and the processor's time of it")
    parser.add_argument("--out", type=Path, help="where to write every number as JSON")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.cpu_time:
        torch.set_num_threads(1)
    records = [record for cell in ("LSTM", "GRU") for record in measure(cell, arguments)]
    results = {"environment": environment(), "records": records}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    shape = f"T {arguments.steps}, B {arguments.batch}, I and H {arguments.hidden}, float32"
    lines = table(["", "memory", "held", "of fast", "times as long as fast"], list(rows_of(records)))
    busy = max(record["others"] or 0 for record in records)
    lines += ["", f"{shape}, forward and backward. Measured on {measured_on(results)};"]
    kind = "the processor's time of one thread" if arguments.cpu_time else "the time on the clock"
    lines += [f"{kind}, the modes in turn; other programs kept {busy:.1f} cores busy."]
    print("\n".join(lines))
    if arguments.write:
        DOCS.write_text(replace_section(DOCS.read_text(), "memory", "\n".join(lines), DOCS))


if __name__ == "__main__":
    main()
