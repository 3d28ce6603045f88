"""Processor of this machine and commit of the code, which benchmarks print with their figures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from raycloud import __version__
from raycloud.origin import processor
from raycloud.training.precision import compute_dtype


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Describe the processor: its name, the cores that this process may use, and the vector extensions torch uses."""
    native = "native bfloat16" if compute_dtype("auto", torch.device("cpu")) else "no native bfloat16"
    return f"{processor(cpuinfo)}, {torch.backends.cpu.get_cpu_capability()}, {native}"


def commit(folder: Path = Path(__file__).parent) -> str:
    """Commit of the clone that has ``folder``, with ``+`` if tracked files differ; the version if there is no clone."""
    git = ["git", "-C", str(folder)]
    try:
        known = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return f"raycloud {__version__}"
    return known.stdout.strip() + "+" * bool(changed.returncode)
