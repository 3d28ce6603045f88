"""Names of the package: no two public classes share one, so that a grep finds the place."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import raycloud


def test_no_two_public_classes_have_one_name() -> None:
    package = Path(raycloud.__file__).parent
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(package)))
    assert len(places) > 300
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
