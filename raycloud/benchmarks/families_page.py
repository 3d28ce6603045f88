"""Table of ``docs/models.md``, from the figures of a benchmark.

``raycloud bench families --json | python -m raycloud.benchmarks.families_page docs/models.md``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycloud.benchmarks.family_configs import DECODERS, ENCODERS

BEGIN, END = "<!-- table: raycloud.benchmarks.families_page -->", "<!-- end of the table -->"
HEADER = ("type", "split inference", "text generation in parts", "parts loaded from a checkpoint", "path", "why not")


def table(families: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of the figures of configurations; those that are not named after their type follow it."""
    types = {**DECODERS, **ENCODERS}
    rows = [[_label(name, types[name][0]), *_cells(figures)] for name, figures in families.items()]
    lines = [HEADER, ["---"] * len(HEADER), *sorted(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _label(name: str, kind: str) -> str:
    return f"`{kind}`" if name == kind else f"`{kind}`, {name}"


def _cells(figures: Mapping[str, Any]) -> list[str]:
    accepted = figures["accepted"]
    path = ("fast" if figures["layout"] else "general") if accepted else "refused"
    said = "; ".join(figures["wrong"]) or figures["refusal"] or "; ".join(figures["parts"])
    return [
        "yes" if accepted and figures["composed"] else "no",
        {True: "yes", False: "no", None: "-"}[figures["generated"]],
        "no" if figures["parts"] else "yes",
        path,
        said.replace("|", "\\|"),
    ]


def with_table(page: str, families: Mapping[str, Mapping[str, Any]]) -> str:
    """Text of the page with a new table between the marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(families)}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Read the benchmark's JSON, its last line, from standard input, and write the page that the argument names."""
    page = Path(sys.argv[1])
    figures = json.loads(sys.stdin.read().strip().splitlines()[-1])
    page.write_text(with_table(page.read_text(encoding="utf-8"), figures["families"]), encoding="utf-8")


if __name__ == "__main__":
    main()
