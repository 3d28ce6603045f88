"""Self-contained HTML page with headings, tables, pictures and text; it loads nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from raycloud.durable import write_atomically
from raycloud.origin import Origin

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}.verdict{font-size:1.1rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;margin:.5rem 0}
th,td{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child,.prose th,.prose td{text-align:left}
th{border-bottom:2px solid #999}
img{max-width:100%}
pre{background:#f5f5f5;padding:1rem;overflow-x:auto;font-size:13px}
.note{color:#666}
@media(prefers-color-scheme:dark){body{background:#1b1b1b;color:#ddd}pre{background:#282828}img{background:#fff}td{border-color:#444}}
"""


class Page:
    """Builder of a page, whose parts appear in the order of the calls; all text is escaped.

    Args:
        title: title of the page.
        subtitle: text below the title; none if empty.
    """

    def __init__(self, title: str, verdict: str = "", origin: Origin | None = None) -> None:
        """Begin a page.

        Args:
            title: heading and title of the page.
            verdict: what the result is, in one sentence.
            origin: origin of the result, if it is known.
        """
        self._title = escape(title)
        self._parts = [f"<h1>{self._title}</h1>"]
        if verdict:
            self._parts.append(f'<p class="verdict">{escape(verdict)}</p>')
        if origin is not None:
            self.text(str(origin))

    def heading(self, text: str) -> None:
        """Add the heading of a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        self._parts += [f'<p class="note">{escape(text)}</p>' for text in paragraphs]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False) -> None:
        """Add a table whose first column names the rows; cells are aligned right, or left if ``prose``."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        kind = ' class="prose"' if prose else ""
        self._parts.append(f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, png: bytes, alt: str) -> None:
        """Add a PNG, embedded in the page."""
        data = base64.b64encode(png).decode()
        self._parts.append(f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">')

    def preformatted(self, text: str) -> None:
        """Add text with its line breaks and spaces."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """Return the whole page as HTML."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{self._title}</title>'
        parts = "\n".join(self._parts)
        body = f"<head>{head}<style>{_STYLE}</style></head><body>\n{parts}\n</body>"
        return f'<!doctype html>\n<html lang="en">{body}</html>\n'

    def save(self, path: Path, recipe: str, heading: str = "Recipe") -> None:
        """Write the page, with the recipe of its run at the end.

        Args:
            path: HTML file to write.
            recipe: recipe as YAML.
            heading: heading of the recipe.
        """
        self.heading(heading)
        self.preformatted(recipe)
        write_atomically(path, self.html())
