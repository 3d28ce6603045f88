"""Line about BOS at the beginning of texts, the same in every report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycloud.report.console import console


def format_bos(bos: str | Mapping[str, str]) -> str:
    """Say in one line whether texts begin with BOS, and why; one entry per model if several models differ."""
    if isinstance(bos, str):
        return f"BOS added: {bos}"
    if len(set(bos.values())) == 1:
        return f"BOS added: {next(iter(bos.values()))}"
    return "BOS added: " + "; ".join(f"{model}: {reason}" for model, reason in bos.items())


def bos_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the BOS line of a finished run; no line if the summary of an earlier version lacks it."""
    return [format_bos(summary["bos"])] if summary.get("bos") else []


def print_bos(summary: Mapping[str, Any]) -> None:
    """Print :func:`bos_lines`."""
    for line in bos_lines(summary):
        console.print(line)
