"""Pages are self-contained and escape their content."""

from __future__ import annotations

from raycloud.origin import Origin
from raycloud.report.page import Page
from raycloud.report.plots import curves, grouped_bars


def test_everything_is_inside_the_page_and_escaped() -> None:
    page = Page("<script>", "a < b", Origin("ab12", "2026-11-29T12:00:00+00:00", "raycloud runs", "a processor"))
    page.heading("a & b")
    page.table(["x"], [["<b>"]])
    page.preformatted("</pre>")
    page.picture(curves({"one": [(0, 1), (1, 0.5)]}, "step", "loss", marks=[0.5]), 'a "curve"')
    page.picture(grouped_bars(["g"], {"a": [1.0], "b": [20.0]}, "y"), "bars")
    html = page.html()
    assert "<script>" not in html
    assert "&lt;b&gt;" in html
    assert html.index("a &lt; b") < html.index("Run ab12, 2026-11-29") < html.index("a &amp; b")
    assert "</pre></pre>" not in html
    assert "http" not in html
    assert html.count("data:image/png;base64,") == 2
