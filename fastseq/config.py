"""What this installation can do, in words."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from . import _C


def show_config() -> str:
    """Versions, the instruction set in use, threads, and whether CUDA kernels are there.

    Returns:
        A few lines of text; `python -m fastseq` prints them. Worth adding to every bug report.

    Example:
        >>> print(fastseq.show_config())  # doctest: +ELLIPSIS
        fastseq ...
    """
    cpu, cuda = _C.cpu_info(), _C.cuda_info()
    architectures = ", ".join(cuda["architectures"])
    if not cuda["built"]:
        cuda_line = f"absent: {cuda['reason']}"
    else:
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cuda_line = f"built for {architectures}; {seen} GPU(s) seen by torch, {cuda['devices']} by the driver"
    rows = {
        "fastseq": version("fastseq"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "isa": f"{cpu['isa']} in use, of {', '.join(cpu['isas'])}; built: {', '.join(cpu['compiled_isas'])}",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads changes it)",
        "cuda": cuda_line,
    }
    return "\n".join(f"{name:<8} {value}" for name, value in rows.items())
