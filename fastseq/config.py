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
    elif torch._C._dispatch_has_kernel_for_dispatch_key("fastseq::recurrent", "CUDA"):
        cuda_line = f"built for {architectures}, {torch.cuda.device_count()} device(s) seen by torch"
    else:
        cuda_line = f"compiled for {architectures}; no kernels yet, CUDA tensors are an error"
    rows = {
        "fastseq": version("fastseq"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "isa": f"{cpu['isa']} in use, of {', '.join(cpu['isas'])}; built: {', '.join(cpu['compiled_isas'])}",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads changes it)",
        "cuda": cuda_line,
    }
    return "\n".join(f"{name:<8} {value}" for name, value in rows.items())
