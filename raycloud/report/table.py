"""Tables on the console; all are printed here, so that they look alike."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from raycloud.report.console import console


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    caption: str | None = None,
    texts: int = 1,
    whole: bool = False,
) -> None:
    """Print a table.

    Args:
        header: names of the columns.
        rows: cells of each row.
        title: text above the table.
        caption: text below the table.
        texts: number of columns on the left that hold text; the others hold numbers and are aligned right.
        whole: never wrap numbers, even on a narrow terminal.
    """
    table = Table(*header, title=title, caption=caption, padding=(0, 0, 0, 1))
    for column in table.columns[:texts]:
        column.overflow = "fold"
    for column in table.columns[texts:]:
        column.justify, column.no_wrap = "right", whole
    for row in rows:
        table.add_row(*row)
    console.print(table)
