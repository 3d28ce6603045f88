"""The command line as text: every verb with its arguments and options.

``python -m tests.cli.surface`` writes it to ``surface.txt``, which a test compares with the command line as it is. Run
it when a change of the command line is meant, and review what it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from raycloud.cli import verbs

FILE = Path(__file__).with_name("surface.txt")


def surface() -> str:
    """Verbs in alphabetical order; below each its arguments and options in the order of its help."""
    return "\n".join(_lines(typer.main.get_command(verbs.app), "raycloud")) + "\n"


def _lines(command: Any, words: str) -> Iterator[str]:
    yield words
    for parameter in command.params:
        if parameter.name not in ("help", "install_completion", "show_completion"):
            yield f"  {_parameter(parameter)}"
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from _lines(below, f"{words} {name}")


def _parameter(parameter: Any) -> str:
    """Name, and whether it is a flag, required, or may be given several times; its environment variable and default."""
    option = parameter.param_type_name == "option"
    said = ["/".join((*parameter.opts, *parameter.secondary_opts)) if option else parameter.name.upper()]
    flag = getattr(parameter, "is_flag", False)
    said += ["flag"] * flag + ["required"] * bool(parameter.required)
    said += ["several"] * bool(getattr(parameter, "multiple", False) or parameter.nargs == -1)
    said += [f"${parameter.envvar}"] * bool(parameter.envvar)
    said += [f"={parameter.default}"] * (parameter.default is not None and not flag)
    return " ".join(said)


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
