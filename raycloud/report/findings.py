"""What the doctor found, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from raycloud.report.console import console

_STYLES = {"fine": "green", "warning": "yellow", "error": "red"}


def print_findings(findings: Sequence[Mapping[str, str]]) -> None:
    """A row for each finding: which check, how bad, what, and the mend below it."""
    table = Table("check", "", "finding, and its mend", box=box.SIMPLE, padding=(0, 1))
    table.columns[2].overflow = "fold"
    for finding in findings:
        what = finding["what"] + (f"\n→ {finding['mend']}" if finding["mend"] else "")
        table.add_row(finding["check"], Text(finding["level"], style=_STYLES[finding["level"]]), what)
    console.print(table)
