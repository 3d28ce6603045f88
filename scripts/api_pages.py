"""Hooks of mkdocs: one page of the API reference per subpackage, made from docstrings.

Nothing lists modules by hand, so a module that is added, moved or removed needs no change in the docs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "raycloud"
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):(?=<code>)")
"""Role of a docstring's reference, as in ``:class:`Segment```; the page shows the name alone."""
TOP = "top"
"""Page of the modules that belong to no package."""


def _modules() -> dict[str, list[str]]:
    """Dotted names of the public modules by package; benchmarks and the command line are no API."""
    packages: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ("benchmarks", "cli") or parts[-1] == "__main__":
            continue
        package = parts[0] if len(parts) > 1 else TOP
        packages.setdefault(package, []).append(".".join(("raycloud", *parts)).removesuffix(".__init__"))
    return packages


def _title(package: str) -> str:
    return "raycloud" if package == TOP else f"raycloud.{package}"


def on_config(config: Any) -> Any:
    """Add the reference to the navigation."""
    config.nav.append({"API reference": [{_title(package): f"reference/{package}.md"} for package in _modules()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference."""
    for package, modules in _modules().items():
        text = f"# {_title(package)}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
        files.append(File.generated(config, f"reference/{package}.md", content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of references from a page."""
    return ROLE.sub("", html)
