"""Table of the doctor's findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from raycloud.report.console import console

_STYLES = {"fine": "green", "warning": "yellow", "error": "red"}


def print_doctor(findings: Sequence[Mapping[str, str]]) -> None:
    """Print one row per finding: the check, its level, the finding, and below it the fix."""
    table = Table("check", "", "finding and its fix", box=box.SIMPLE, padding=(0, 1))
    table.columns[2].overflow = "fold"
    for finding in findings:
        what = finding["what"] + (f"\n→ {finding['fix']}" if finding["fix"] else "")
        table.add_row(finding["check"], Text(finding["level"], style=_STYLES[finding["level"]]), what)
    console.print(table)
