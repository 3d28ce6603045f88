"""Data set ``builtin:reviews``: sentences of four domains with human sentiment scores (Hutto & Gilbert, ICWSM 2014)."""

from __future__ import annotations

import html
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raycloud.fetch import cache_dir, cached_folder, fetch

DOMAINS = {
    "movie": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
    "product": "amazonReviewSnippets",
    "tweet": "tweets",
}
"""Names of the files by domain."""

_ENTRY = "reviews-1"
"""Name of the cache entry; its number increases whenever the parsing of sentences changes."""

SCHEMA = pa.schema([("domain", pa.string()), ("text", pa.string()), ("score", pa.float64()), ("label", pa.string())])


def label_of(score: float) -> str:
    """Sentiment label of a mean rating from -4 to 4, with VADER's own threshold of 0.5."""
    return "positive" if score >= 0.5 else "negative" if score <= -0.5 else "neutral"


def reviews(notify: Callable[[str], None] = lambda line: None) -> pa.Table:
    """Table of all sentences with domain, text, score (-4 to 4) and label; parsed once into the cache."""
    archive = fetch("reviews", notify) / "hutto_ICWSM_2014.tar.gz"

    def prepare(folder: Path) -> None:
        pq.write_table(pa.Table.from_pylist(list(_parse(archive)), schema=SCHEMA), folder / "reviews.parquet")

    return pq.read_table(cached_folder(cache_dir() / "data" / _ENTRY, prepare) / "reviews.parquet")


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
