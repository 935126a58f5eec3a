"""The examples in the documentation run, and help(fastseq.LSTM) teaches."""

import argparse
import doctest
import importlib
import pkgutil
import pydoc
import re
import runpy
from pathlib import Path

import pytest
import torch

import fastseq

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODULES = [fastseq.RNN, fastseq.LSTM, fastseq.GRU, fastseq.RNNCell, fastseq.LSTMCell, fastseq.GRUCell]
FUNCTIONS = [
    getattr(fastseq.functional, name) for name in ("rnn", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell")
]
ATTENTION = [fastseq.MultiheadAttention, fastseq.scaled_dot_product_attention]
TOOLS = [fastseq.explain, fastseq.show_config, fastseq.convert, fastseq.revert, fastseq.patched]


def source_modules():
    for info in pkgutil.walk_packages(fastseq.__path__, "fastseq."):
        if not info.name.endswith(("__main__", "_C")):
            yield importlib.import_module(info.name)
    yield fastseq


@pytest.mark.parametrize("module", list(source_modules()), ids=lambda m: m.__name__)
def test_docstring_examples_run(module):
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    for test in finder.find(module, extraglobs={"fastseq": fastseq, "torch": torch}):
        output = []
        runner.run(test, out=output.append)
        assert not output, "".join(output)


@pytest.mark.parametrize("thing", [*MODULES, *FUNCTIONS, *ATTENTION, *TOOLS], ids=lambda x: x.__name__)
def test_public_docstring_has_a_runnable_example(thing):
    assert ">>> " in thing.__doc__


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_help_tells_arguments_results_errors_and_what_is_saved(module):
    text = check_help(module, "hidden_size", "weight_hh", "hx", "tanh")
    assert "batch_first" in text or "Cell" in module.__name__


@pytest.mark.parametrize("thing", ATTENTION, ids=lambda x: x.__name__)
def test_help_of_attention_tells_arguments_results_errors_equation_and_source(thing):
    check_help(thing, "attn_mask", "softmax", "Vaswani", "NaN")


def check_help(thing, *words):
    text = pydoc.render_doc(thing, renderer=pydoc.plaintext)
    for word in ("Args:", "Returns:", "Raises:", *words):
        assert word in text, f"help({thing.__name__}) lacks {word}"
    assert re.search(r"(?i)saved for the backward pass", text)
    return text


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "guide" / "pytorch.md"], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    assert blocks, "the page has an example"
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_readme_links_lead_to_files():
    targets = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    relative = [target.partition("#")[0] for target in targets if not re.match(r"https?:|mailto:|#", target)]
    assert relative
    assert not [target for target in relative if not (ROOT / target).exists()]


def test_readme_has_its_speed_table():
    """benchmarks/report.py writes it."""
    block = re.search(r"<!-- benchmark:begin -->(.*)<!-- benchmark:end -->", README.read_text(), flags=re.S)
    assert block
    assert block[1].strip()


def pretend_cuda(monkeypatch, built, gpu=True):
    """As if fastseq was compiled with nvcc, or not, and torch saw a GPU, or not."""
    architectures = ["sm_80", "sm_90a"] if built else []
    info = {
        "built": built,
        "reason": "" if built else "no nvcc",
        "architectures": architectures,
        "devices": 1,
    }
    monkeypatch.setattr(fastseq._C, "cuda_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))


@pytest.mark.parametrize(
    ("built", "gpu", "words"),
    [
        (False, True, "absent: no nvcc"),
        (True, False, "built for sm_80, sm_90a; 0 GPU(s) seen by torch, 1 by the driver"),
        (True, True, "built for sm_80, sm_90a; 1 GPU(s) seen by torch"),
    ],
)
def test_show_config_tells_the_state_of_cuda(monkeypatch, built, gpu, words):
    pretend_cuda(monkeypatch, built, gpu)
    assert words in fastseq.show_config()


@pytest.mark.parametrize(
    ("built", "gpu", "device", "why"),
    [
        (False, True, "cpu", "no nvcc"),
        (True, False, "cpu", "torch sees no GPU"),
        (True, True, "cuda", "both libraries can use it"),
    ],
)
def test_demo_chooses_a_device_that_has_kernels(monkeypatch, capsys, built, gpu, device, why):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    choose_device = runpy.run_path(str(ROOT / "examples" / "char_lm.py"))["choose_device"]
    pretend_cuda(monkeypatch, built, gpu)
    parser = argparse.ArgumentParser()
    assert choose_device(None, parser) == (torch.device(device), why)
    assert choose_device("cpu", parser)[0].type == "cpu"
    if device == "cuda":
        assert choose_device("cuda", parser)[0].type == "cuda"
    else:
        with pytest.raises(SystemExit):
            choose_device("cuda", parser)
        assert why in capsys.readouterr().err


def test_show_config_tells_what_matters():
    text, info = fastseq.show_config(), fastseq._C.cpu_info()
    for fact in (fastseq.__version__, torch.__version__, info["isa"], str(torch.get_num_threads())):
        assert fact in text
    cuda = fastseq._C.cuda_info()
    assert cuda["built"] or (cuda["reason"] and cuda["reason"] in text), "it says why CUDA is absent"
