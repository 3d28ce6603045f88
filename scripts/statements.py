"""Count the statements of a package by subpackage: ``python scripts/statements.py [FOLDER]``; default: ``raycloud/``.

A statement is a node of the syntax tree, so line lengths, comments and blank lines do not count; docstrings do not
either. A subpackage is a folder right below the package; modules beside the subpackages count as one.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

BESIDE = "(beside the subpackages)"


def statements(source: str) -> int:
    """Number of statements in a module, without docstrings."""
    return sum(isinstance(node, ast.stmt) and not _is_text(node) for node in ast.walk(ast.parse(source)))


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is a text alone, as docstrings are."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def by_room(package: Path) -> Counter[str]:
    """Statements of a package by subpackage."""
    counted: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        counted[parts[0] if len(parts) > 1 else BESIDE] += statements(path.read_text(encoding="utf-8"))
    return counted


def main() -> None:
    """Print subpackages by size, and the sum."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "raycloud"
    counted = by_room(package)
    for subpackage, count in counted.most_common():
        print(f"{count:7,}  {subpackage}")
    print(f"{counted.total():7,}  {package.name}")


if __name__ == "__main__":
    main()
