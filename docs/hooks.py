"""Called by mkdocs: the site also has the files of benchmarks/results, which README links to."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*")):
        where = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, where, abs_src_path=str(path)))
    return files
