"""The examples in the documentation run, and help(fastseq.LSTM) teaches."""

import doctest
import importlib
import pkgutil
import pydoc
import re
from pathlib import Path

import pytest
import torch

import fastseq

README = Path(__file__).parents[1] / "README.md"
MODULES = [fastseq.RNN, fastseq.LSTM, fastseq.GRU, fastseq.RNNCell, fastseq.LSTMCell, fastseq.GRUCell]
FUNCTIONS = [
    getattr(fastseq.functional, name) for name in ("rnn", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell")
]


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


@pytest.mark.parametrize("thing", [*MODULES, *FUNCTIONS, fastseq.show_config], ids=lambda x: x.__name__)
def test_public_docstring_has_a_runnable_example(thing):
    assert ">>> " in thing.__doc__


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_help_tells_arguments_results_errors_and_what_is_saved(module):
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)
    for word in ("Args:", "Returns:", "Raises:", "hidden_size", "weight_hh", "hx", "tanh"):
        assert word in text, f"help({module.__name__}) lacks {word}"
    assert re.search(r"(?i)saved for the backward pass", text)
    assert "batch_first" in text or "Cell" in module.__name__


def test_readme_python_blocks_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert blocks, "the README has an example"
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


def test_show_config_tells_what_matters():
    text, info = fastseq.show_config(), fastseq._C.cpu_info()
    for fact in (fastseq.__version__, torch.__version__, info["isa"], str(torch.get_num_threads())):
        assert fact in text
    cuda = fastseq._C.cuda_info()
    assert cuda["built"] or (cuda["reason"] and cuda["reason"] in text), "it says why CUDA is absent"
