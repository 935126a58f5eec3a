"""The machine and the software that a result was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastseq

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("FASTSEQ_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "pstate")


def cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git(*command):
    try:
        run = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def environment():
    changes = git("status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": fastseq._C.cpu_info()["isa"],
        "isas": list(fastseq._C.cpu_info()["isas"]),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch_config": torch.__config__.show(),
        "fastseq": fastseq.__version__,
        "commit": git("rev-parse", "HEAD") or os.environ.get("FASTSEQ_COMMIT"),  # a copy without .git
        "uncommitted_changes": None if changes is None else bool(changes),
        "load_at_start": os.getloadavg(),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
    }


def nvidia_smi(*fields):
    """What nvidia-smi tells of the first GPU, as text; read only, no setting is touched. {} without it."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in run.stdout.strip().split(",")), strict=False))


def gpu_environment(device):
    """The facts of a GPU run; on a CPU, in the rehearsal of one, the same keys."""
    facts = {
        "gpu": "no GPU, a rehearsal on the CPU",
        "driver": nvidia_smi("driver_version").get("driver_version"),
        "multiprocessors": None,
        "memory_gib": None,
        "capability": None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        # torch's defaults, left as they are: cuDNN may use tf32, a plain matrix product may not.
        "tf32": {
            "cudnn": torch.backends.cudnn.allow_tf32,
            "matmul": torch.backends.cuda.matmul.allow_tf32,
        },
        "clocks_before": nvidia_smi(*CLOCKS),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["capability"] = f"{properties.major}.{properties.minor}"
    return environment() | facts
