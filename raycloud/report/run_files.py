"""Files of a finished run that its page is written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raycloud.errors import ResultError
from raycloud.results import RECIPE, SUMMARY, read_records


def read_summary(path: Path) -> dict[str, Any]:
    """Return the headline numbers in a file.

    Raises:
        ResultError: it is not a JSON object.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ResultError(f"cannot read '{path}': {error}") from None


def run_files(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Return summary, metrics, and the recipe as YAML."""
    recipe = (folder / RECIPE).read_text(encoding="utf-8")
    return read_summary(folder / SUMMARY), read_records(folder / "metrics.jsonl"), recipe
