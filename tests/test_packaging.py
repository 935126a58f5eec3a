"""A wheel, built as `pip install .` builds it, in an environment with nothing else of ours."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fastseq

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "__pycache__",
    ".venv",
    "venv",
    "tests",
    ".pytest_cache",
    "out",
)


def run(*command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTSEQ", "LD_PRELOAD"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources; without build isolation only where there is no network.

    Without CUDA, whose kernels take minutes; the module that `make build` left is asked about them instead.
    """
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", folder]
    code, log = run(*command, cwd=folder / "source", FASTSEQ_CUDA="off")
    if code and re.search(
        r"No matching distribution|Could not find a version|Connection|Temporary failure", log
    ):
        command.append("--no-build-isolation")
        code, log = run(*command, cwd=folder / "source", FASTSEQ_CUDA="off")
    assert code == 0, log[-4000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """The interpreter of a new virtual environment that holds the wheel and borrows torch."""
    folder = tmp_path_factory.mktemp("clean")
    code, log = run(sys.executable, "-m", "venv", "venv", cwd=folder)
    assert code == 0, log
    python = folder / "venv" / "bin" / "python"
    code, log = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    assert code == 0, log
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "borrowed_torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    compiled = [name for name in names if name.endswith(".so")]
    assert len(compiled) == 1
    assert compiled[0].startswith("fastseq/_C.")
    assert {"fastseq/__init__.py", "fastseq/py.typed", "fastseq/_C.pyi", "fastseq/modules/lstm.py"} <= set(
        names
    )
    assert {name.split("/")[0] for name in names} == {"fastseq", f"fastseq-{fastseq.__version__}.dist-info"}
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name
    assert "torch" not in wheel.name


@pytest.mark.slow
def test_installed_wheel_works_from_another_directory(clean_python, tmp_path):
    script = (
        "import fastseq, torch\n"
        "m = fastseq.LSTM(4, 5, bidirectional=True)\n"
        "m(torch.randn(3, 2, 4))[0].sum().backward()\n"
        "assert m.weight_hh_l0.grad.any()\n"
        "print(fastseq.__version__, fastseq.__file__, fastseq._C.__file__)\n"
    )
    code, output = run(clean_python, "-c", script, cwd=tmp_path)
    assert code == 0, output
    version, *files = output.split()
    assert version == fastseq.__version__
    assert all(Path(file).is_relative_to(clean_python.parents[1]) for file in files)


@pytest.mark.slow
def test_module_can_be_run_and_prints_the_configuration(clean_python, tmp_path):
    code, output = run(clean_python, "-m", "fastseq", cwd=tmp_path)
    assert code == 0, output
    for word in (fastseq.__version__, torch.__version__, fastseq._C.cpu_info()["isa"]):
        assert word in output
    assert re.search("(?i)cuda", output)
    assert re.search("(?i)threads", output)


def check_libraries(library):
    """No torch and no CUDA runtime; libgomp.so.1, by the name by which torch has loaded its own."""
    code, output = run("readelf", "-d", library, cwd=library.parent)
    assert code == 0, output
    needed = re.findall(r"NEEDED.*\[(.*)\]", output)
    assert "libgomp.so.1" in needed
    assert not [n for n in needed if re.match(r"lib(torch|c10|cudart|cuda|iomp|omp)", n)], needed
    assert not re.search("RPATH|RUNPATH", output), "no path of the build machine"


@pytest.mark.slow
def test_compiled_module_links_no_torch_and_torchs_openmp_library(wheel, tmp_path):
    name = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))
    check_libraries(Path(zipfile.ZipFile(wheel).extract(name, tmp_path)))


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="links the sanitizers' libraries")
def test_module_that_was_built_here_links_no_torch_and_no_cuda_runtime():
    check_libraries(Path(fastseq._C.__file__))


@pytest.mark.slow
def test_wheel_holds_no_host_twin(wheel):
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "cuda_host" in name]


def test_building_does_not_need_torch():
    imported = {
        name
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        for name in ([a.name for a in getattr(node, "names", [])] + [getattr(node, "module", None) or ""])
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert not [name for name in imported if name.split(".")[0] == "torch"]
    requires = re.search(
        r"^requires\s*=\s*\[(.*?)\]", (ROOT / "pyproject.toml").read_text(), flags=re.S | re.M
    ).group(1)
    names = set(re.findall(r"[\"']([a-zA-Z0-9_-]+)", requires))
    assert names <= {"setuptools", "pybind11", "cmake", "ninja", "wheel"}


def test_kernels_include_no_torch_header():
    for source in (ROOT / "csrc").rglob("*"):
        if source.suffix in (".h", ".cpp", ".cu"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


def test_package_without_its_compiled_module_says_what_to_do(tmp_path):
    """As when Python finds the source tree before the installed package."""
    shutil.copytree(ROOT / "fastseq", tmp_path / "fastseq", ignore=NOT_SOURCE)
    script = (  # the finder of an editable installation would bring the compiled module in
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import fastseq"
    )
    code, output = run(sys.executable, "-c", script, cwd=tmp_path)
    assert code != 0
    assert "ImportError" in output
    assert "pip install" in output
