"""``builtin:reviews``: sentences of four domains with human sentiment scores (Hutto & Gilbert, ICWSM 2014)."""

from __future__ import annotations

import html
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raycloud.fetch import cache_dir, fetch, prepared

DOMAINS = {
    "movie": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
    "product": "amazonReviewSnippets",
    "tweet": "tweets",
}
"""Our name of each domain and the name of its file."""

_ENTRY = "reviews-1"
"""The number grows whenever sentences are parsed in another way."""

SCHEMA = pa.schema([("domain", pa.string()), ("text", pa.string()), ("score", pa.float64()), ("label", pa.string())])


def label_of(score: float) -> str:
    """The sentiment of a mean rating from -4 to 4; VADER's own threshold of half a point."""
    return "positive" if score >= 0.5 else "negative" if score <= -0.5 else "neutral"


def reviews(notify: Callable[[str], None] = lambda line: None) -> pa.Table:
    """All sentences as a table of domain, text, score (-4 to 4) and label; parsed once into the cache."""
    archive = fetch("reviews", notify) / "hutto_ICWSM_2014.tar.gz"

    def prepare(folder: Path) -> None:
        pq.write_table(pa.Table.from_pylist(list(_parse(archive)), schema=SCHEMA), folder / "reviews.parquet")

    return pq.read_table(prepared(cache_dir() / "data" / _ENTRY, prepare) / "reviews.parquet")


def _parse(archive: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(archive) as files:
        for domain, name in DOMAINS.items():
            file = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert file is not None
            # Two of the files are UTF-8 (one with a byte order mark) and two are not.
            raw = file.read()
            try:
                content = raw.decode("utf-8-sig")
            except UnicodeDecodeError:
                content = raw.decode("cp1252", errors="replace")
            for line in content.splitlines():
                _, score, text = line.split("\t", 2)
                # Some sentences were escaped twice.
                text = " ".join(html.unescape(html.unescape(text)).split())
                if text:
                    yield {"domain": domain, "text": text, "score": float(score), "label": label_of(float(score))}
