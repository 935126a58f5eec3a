"""The documentation's site builds without warnings, and its examples run."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
# That one needs processes: see test_split_attention_calls.py.
ELSEWHERE = {ROOT / "docs" / "guide" / "distributed.md"}
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.S)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in ELSEWHERE and BLOCK.search(page.read_text())],
    ids=lambda p: p.relative_to(ROOT / "docs").as_posix(),
)
def test_python_blocks_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    """And print what comments below print() say, where there are such."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in BLOCK.findall(page.read_text()):
        if "from transformers" in block:
            pytest.importorskip("transformers", reason="transformers is not installed")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(page), "exec"), names)
        if told := re.findall(r"^print\(.*\n((?:# .*\n)+)", block, flags=re.M):
            assert printed.getvalue() == re.sub("^# ", "", "".join(told), flags=re.M)


def test_site_builds_without_warnings_and_has_every_page(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout + done.stderr
    for page in PAGES:
        built = site / page.relative_to(ROOT / "docs").with_suffix("")
        assert (built.parent if page.stem == "index" else built).joinpath("index.html").exists()
    for page in site.glob(
        "api/*/index.html"
    ):  # docstrings emphasize nothing: that was a product, as in (L*D, B)
        assert "<em>" not in page.read_text(), page.parent.name


def test_home_leads_to_every_page():
    home = (ROOT / "docs" / "index.md").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([\w/]+\.md)\)", home))


def test_api_pages_tell_of_all_public_names():
    import fastseq

    told = set(re.findall(r"^::: ([\w.]+)", "".join(p.read_text() for p in PAGES), flags=re.M))
    missing = [
        name
        for name in fastseq.__all__
        if not name.startswith("_") and not any(f"{t}.".startswith(f"fastseq.{name}.") for t in told)
    ]
    assert not missing
