"""What fastseq.explain tells of lengths, resets, bounds of gradients and memory modes."""

import pytest
import torch

import fastseq


def train(module, **rows):
    def call(input):
        module(input, **rows)[0].sum().backward()

    return fastseq.explain(call, torch.randn(50, 3, 8))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_options_are_named_where_a_call_has_them(name):
    module = getattr(fastseq, name)(8, 16, grad_clip=0.5, truncate=20)
    rows = {"lengths": torch.tensor([3, 50, 20]), "resets": torch.zeros(50, 3, dtype=torch.bool)}
    forward, backward = train(module, **rows)
    assert forward.options == backward.options == ("lengths", "resets", "grad_clip 0.5", "truncate 20")
    assert "lengths, resets, grad_clip 0.5, truncate 20" in backward.title
    assert train(getattr(fastseq, name)(8, 16))[0].options == ()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_what_each_memory_mode_saves(name):
    module, a_state = getattr(fastseq, name)(8, 16), 50 * 3 * 16 * 4
    given = {"input": 50 * 3 * 8 * 4, "weights": sum(p.nbytes for p in module.parameters())}
    c = name == "LSTM"
    for memory, kept in (
        ("fast", {"output": a_state, "gates": (5 if c else 4) * a_state}),
        ("recompute", {"output": a_state} | ({"states": a_state} if c else {})),
        ("checkpoint:20", {"h": 3 * 3 * 16 * 4} | ({"c": 3 * 3 * 16 * 4} if c else {})),
    ):
        module.memory = memory
        forward, backward = train(module)
        assert forward.saved == given | kept
        for call in (forward, backward):
            assert call.options == (() if memory == "fast" else (f"memory {memory}",))
    assert backward.operator == "recurrent_windows_backward"
    assert "3 windows of at most 20 steps" in str(backward)
    assert "3 windows of at most 20 steps" in str(forward)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint:20"])
def test_the_plan_of_a_window_is_that_of_its_steps(memory, monkeypatch):
    monkeypatch.setattr(fastseq.windows, "WINDOW_BYTES", 1)
    monkeypatch.setattr(fastseq.windows, "WINDOW_PART", 5)
    forward, backward = train(fastseq.LSTM(8, 16, memory=memory))
    steps = 10 if memory == "recompute" else 20
    assert f"windows of at most {steps} steps" in str(backward)
    assert forward.backward.partition == backward.plan.partition
