"""The script that counts statements."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "statements.py"


def test_statements_are_counted_by_room_without_docstrings(tmp_path: Path) -> None:
    package = tmp_path / "house"
    (package / "room" / "corner").mkdir(parents=True)
    (package / "top.py").write_text(
        '"""Text."""\nimport os  # one\n\n\nNAME = """two,\nnot a docstring"""\n"""Its docstring."""\n'
    )
    (package / "room" / "a.py").write_text("def f():\n    '''Text.'''\n    if f: return 1\n    return 2\n")  # 4
    (package / "room" / "corner" / "b.py").write_text("x = 1; y = (\n    2\n)\n")  # 2
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(package)], capture_output=True, text=True, check=True, timeout=280
    )
    counts = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert counts == [["6", "room"], ["2", "(beside the subpackages)"], ["8", "house"]]
