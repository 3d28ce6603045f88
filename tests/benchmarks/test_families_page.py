"""Table of the models that work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raycloud.benchmarks.families_page import BEGIN, END, table, with_table
from raycloud.benchmarks.family_configs import DECODERS, ENCODERS


def figures(**changes: Any) -> dict[str, Any]:
    usual = {"accepted": True, "composed": True, "generated": True, "wrong": [], "refusal": "", "parts": []}
    return {**usual, "layout": None, **changes}


def test_every_configuration_has_a_row_under_its_type() -> None:
    lines = table({name: figures() for name in (*DECODERS, *ENCODERS)}).splitlines()
    assert len(lines) == 2 + len(DECODERS) + len(ENCODERS)
    assert all(any(line.startswith(f"| `{kind}`") for line in lines) for kind, _ in (DECODERS | ENCODERS).values())


def test_a_row_says_what_works_by_which_path_and_why_not() -> None:
    refused = figures(accepted=False, composed=False, generated=None, refusal="one block | many times")
    [_, _, *rows] = table(
        {"albert": refused, "bert": figures(generated=None, layout="bert"), "llama-yarn": figures(parts=["x differs"])}
    ).splitlines()
    assert rows == [
        "| `albert` | no | - | yes | refused | one block \\| many times |",
        "| `bert` | yes | - | yes | fast |  |",
        "| `llama`, llama-yarn | yes | yes | no | general | x differs |",
    ]


def test_a_new_table_takes_the_place_of_the_old_one() -> None:
    page = f"before\n\n{BEGIN}\nold\n{END}\nafter\n"
    once = with_table(page, {"bert": figures()})
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert with_table(once, {"bert": figures()}) == once


def test_the_page_lists_every_type_that_is_configured() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"\n| `{kind}`" in page for kind, _ in (DECODERS | ENCODERS).values())
