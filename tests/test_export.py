"""torch.export over the modules: dynamic batch and time, decomposed, saved, and run by another process."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastseq

BATCH, TIME = Dim("batch", min=1, max=1024), Dim("time", min=2, max=4096)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 4), nn.Linear(5, 11)
        self.lstm = fastseq.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = fastseq.GRU(12, 5, batch_first=True)

    def forward(self, tokens):
        return self.linear(self.gru(self.lstm(self.embedding(tokens))[0])[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = fastseq.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False, is_causal=True)[0]


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = fastseq.LSTMCell(4, 6)

    def forward(self, x):
        return self.cell(x)


def tokens(batch, time):
    return torch.randint(11, (batch, time))


# Model, its input, its dynamic dimensions, and how many operators it is.
MODELS = {
    "language model": (LanguageModel, tokens, {0: BATCH, 1: TIME}, 3),
    "RNN": (lambda: fastseq.RNN(4, 6), lambda b, t: torch.randn(t, b, 4), {0: TIME, 1: BATCH}, 1),
    "attention": (Attention, lambda b, t: torch.randn(b, t, 8), {0: BATCH, 1: TIME}, 1),
    "step": (Step, lambda b, t: torch.randn(b, 4), {0: BATCH}, 1),
}


def assert_same_bits(exported, model, x):
    for a, b in zip(tree_leaves(exported.module()(x)), tree_leaves(model(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_program_is_one_operator_a_layer_and_takes_any_batch_and_time(name, strict, tmp_path):
    make, data, dynamic, operators = MODELS[name]
    model = make()
    exported = export(model, (data(3, 7),), dynamic_shapes=(dynamic,), strict=strict)
    torch.export.save(exported, tmp_path / "model.pt2")
    programs = exported, exported.run_decompositions(), torch.export.load(tmp_path / "model.pt2")
    for program in programs:
        assert sum("fastseq" in str(node.target) for node in program.graph.nodes) == operators
        for batch, time in ((3, 7), (5, 50), (1, 2)):
            assert_same_bits(program, model, data(batch, time))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fastseq.LSTM(4, 6)

    def forward(self, data, sizes, h):
        return self.lstm(PackedSequence(data, sizes), (h, h))[0].data


def test_packed_sequences_are_exported():
    model, h = Packed(), torch.randn(1, 3, 6)
    packed = [pack_padded_sequence(torch.randn(t, 3, 4), torch.tensor([t, t - 1, 2])) for t in (5, 9)]
    arguments = [(x.data, x.batch_sizes, h) for x in packed]
    dynamic = ({0: Dim.AUTO}, {0: Dim.AUTO}, None)
    exported = export(model, arguments[0], dynamic_shapes=dynamic)
    for given in arguments:
        assert torch.equal(exported.module()(*given), model(*given))


LOAD = """
import sys, torch, fastseq
model, x, expected = sys.argv[1:]
output = torch.export.load(model).module()(torch.load(x))
assert torch.equal(output, torch.load(expected))
"""


@pytest.mark.slow
def test_saved_program_runs_in_another_process(tmp_path):
    model, x = LanguageModel(), tokens(5, 50)
    exported = export(model, (tokens(3, 7),), dynamic_shapes=({0: BATCH, 1: TIME},))
    files = [str(tmp_path / name) for name in ("model.pt2", "x.pt", "expected.pt")]
    torch.export.save(exported, files[0])
    torch.save(x, files[1])
    torch.save(model(x).detach(), files[2])
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_traces_of_torch_jit_are_eagers_bits(name):
    module, shapes = getattr(fastseq, name)(4, 6), ((5, 3, 4), (7, 2, 4))
    example, x = (torch.randn(shape[-2:] if "Cell" in name else shape) for shape in shapes)
    with torch.no_grad():
        traced = torch.jit.trace(module, example)
        for a, b in zip(tree_leaves(traced(x)), tree_leaves(module(x)), strict=True):
            assert torch.equal(a, b)
