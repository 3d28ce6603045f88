"""Tables on the console."""

from __future__ import annotations

import pytest

from raycloud.report.table import print_table


def test_texts_are_on_the_left_numbers_on_the_right_between_title_and_caption(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(["what", "of", "size"], [["a", "b", "1"], ["longer", "c", "12"]], title="on", caption="below", texts=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "on" and lines[-1].strip() == "below"
    rows = [line for line in lines if line.startswith("│")]
    assert [[cell.strip() for cell in row.strip("│").split("│")] for row in rows] == [
        ["a", "b", "1"],
        ["longer", "c", "12"],
    ]
    assert rows[0].startswith("│ a ") and rows[0].endswith(" 1│")
