"""A self-contained HTML page: headings, tables, pictures and text, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
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
    """Collects the parts of a page in order; everything given is text and is escaped."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = escape(title)
        self._parts = [f"<h1>{self._title}</h1>"]
        if subtitle:
            self.text(subtitle)

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False) -> None:
        """A table whose first column names the rows; numbers stand on the right, ``prose`` on the left."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        kind = ' class="prose"' if prose else ""
        self._parts.append(f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, png: bytes, alt: str) -> None:
        """A PNG, inside the page."""
        data = base64.b64encode(png).decode()
        self._parts.append(f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">')

    def preformatted(self, text: str) -> None:
        """Text as it is."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """The whole page."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{self._title}</title>'
        parts = "\n".join(self._parts)
        body = f"<head>{head}<style>{_STYLE}</style></head><body>\n{parts}\n</body>"
        return f'<!doctype html>\n<html lang="en">{body}</html>\n'
