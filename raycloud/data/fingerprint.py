"""Fingerprints of data sets, so that a run is not resumed with data that has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raycloud.checksums import digest
from raycloud.data.sources import HasSource, path_of
from raycloud.fetch import BUILTINS, PREFIX

_PACKAGES = {"reviews": "reviews", "instruct": "reviews"}
"""Package that each built-in data set is made from."""


def data_sources(data: HasSource | Sequence[str]) -> list[str]:
    """Sources that the ``data`` of a recipe names."""
    if isinstance(data, Sequence):
        return list(data)
    return [data.source, *([data.validation] if data.validation else [])]


def fingerprints(sources: Iterable[str]) -> dict[str, str]:
    """Fingerprints by source: SHA-256 of files and of the packages of built-in sets, the revision of hub sets.

    A hub set whose revision cannot be read, such as without a network, has none.

    Raises:
        DataError: a file does not exist.
    """
    found = {source: fingerprint(source) for source in sources}
    return {source: value for source, value in found.items() if value is not None}


def fingerprint(source: str) -> str | None:
    """Fingerprint of one source, see :func:`fingerprints`; None if it has none."""
    name = source.removeprefix(PREFIX)
    if source.startswith(PREFIX):
        packages = BUILTINS[_PACKAGES[name]].packages if name in _PACKAGES else ()
        return " ".join(package.sha256 for package in packages) or None
    if (path := path_of(source)) is not None:
        return digest(path)
    return _revision(name.partition(":")[0])


def _revision(name: str) -> str | None:
    """Latest commit of a data set on the hub; None if it cannot be read."""
    try:
        from huggingface_hub import dataset_info

        return dataset_info(name, timeout=10.0).sha
    except Exception:  # the hub's client raises errors of many kinds; reading the data set reports the cause
        return None
