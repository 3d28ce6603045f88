"""History of versions: the weights after each round, kept as differences, with a record of how each came about.

A history is a folder with a folder for each version. That holds ``record.json`` and, in ``weights.safetensors``, the
tensors that differ from the version before. History is only added to: a rollback is a new version with old weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raycloud.checksums import verify_file
from raycloud.durable import remove, remove_scratch, write_folder
from raycloud.errors import ChecksumError, ResultError
from raycloud.models.checkpoint import fingerprint_from
from raycloud.models.weights import Weights, tensor_digest

VERSIONS = "versions"
"""Folder of a result directory with its history, or with a folder for each of several histories."""
_RECORD, _WEIGHTS = "record.json", "weights.safetensors"


class VersionRecord(BaseModel):
    """Record of a version; in JSON a figure that is not finite is a string, such as ``NaN``."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    version: int
    """Number of the version; 0 is the start."""
    parent: int | None
    """Version that its stored tensors are the difference to; None if it holds all: the start, or the oldest kept."""
    round: int | None = None
    """Number of the round that made it, from 1; None for the start and for a rollback."""
    members: tuple[str, ...] = ()
    """Edges whose contributions were aggregated."""
    samples: int | None = None
    """Number of samples or tokens of these contributions; None if they were not counted."""
    time: str
    """Time at which it was added, UTC, ISO 8601."""
    digest: str
    """SHA-256 of the whole weights: of names, types, shapes and every byte. Equal weights have equal digests."""
    note: str = ""
    """What else is to be known of it, such as ``rollback to 3``."""
    figures: dict[str, float] = {}
    """Figures by name, such as the loss of the round."""
    tensors: dict[str, str]
    """Digest of each tensor of the whole weights, by name."""


class VersionStore:
    """Store of a history. One process at a time may write to it; others may read.

    Versions are atomic: a crash leaves the former ones as they were, and what a killed writer left is removed.

    Args:
        folder: folder of the history; made with the first version.
        keep: number of newest versions to keep; None for all. The oldest one kept then holds all tensors.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self._keep = folder, keep
        remove_scratch(folder)

    @property
    def current(self) -> int:
        """Number of the newest version; -1 if there is none."""
        return max(self._numbers(), default=-1)

    def records(self) -> list[VersionRecord]:
        """Read the records of all versions, oldest first.

        Raises:
            ChecksumError: a record is damaged.
        """
        return [self.record(number) for number in self._numbers()]

    def record(self, version: int) -> VersionRecord:
        """Read the record of a version.

        Raises:
            ResultError: there is no such version.
            ChecksumError: the record is damaged.
        """
        path = self._path(version) / _RECORD
        if not path.is_file():
            known = ", ".join(map(str, self._numbers())) or "none"
            raise ResultError(f"no version {version} in '{self.folder}'; there are: {known}")
        verify_file(path)
        try:
            record = VersionRecord.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ChecksumError(f"'{path}' is damaged: {error.errors()[0]['msg']}") from None
        if record.digest != _digest(record.tensors):
            raise ChecksumError(f"'{path}' is damaged: its digest is not that of its tensors")
        return record

    def changed(self, version: int) -> list[str]:
        """Names of the tensors that differ from the version before; all if it is the start or the oldest kept.

        Raises:
            ResultError, ChecksumError: see :meth:`record`.
        """
        record = self.record(version)
        before = {} if record.parent is None else self.record(record.parent).tensors
        return [name for name, digest in record.tensors.items() if before.get(name) != digest]

    def nbytes(self, version: int) -> int:
        """Size in bytes of the tensors that a version stores.

        Raises:
            ResultError: there is no such version.
        """
        path = self._path(version) / _WEIGHTS
        try:
            return path.stat().st_size
        except OSError:
            raise ResultError(f"version {version} in '{self.folder}' has lost its {_WEIGHTS}") from None

    def weights(self, version: int) -> dict[str, Tensor]:
        """Compose the whole weights of a version of its tensors and those of the versions before.

        Raises:
            ResultError: there is no such version, or one that it builds on is missing.
            ChecksumError: a file is damaged.
        """
        record = at = self.record(version)
        found: dict[str, Tensor] = {}
        while missing := {name: one for name, one in record.tensors.items() if name not in found}:
            found |= self._tensors(at.version, missing)
            if at.parent is None:
                break
            at = self.record(at.parent)
        if missing.keys() - found.keys():
            lacking = min(missing.keys() - found.keys())
            raise ChecksumError(f"version {version} in '{self.folder}' is damaged: no version holds '{lacking}'")
        return {name: found[name] for name in record.tensors}

    def add(
        self,
        weights: Weights,
        *,
        version: int | None = None,
        round: int | None = None,
        members: Sequence[str] = (),
        samples: int | None = None,
        note: str = "",
        figures: Mapping[str, float] | None = None,
    ) -> VersionRecord:
        """Add a version; the meaning of the other arguments is that of the fields of :class:`VersionRecord`.

        Args:
            weights: its tensors; those that it lacks stay as in the version before.
            version: its number, at most the next; None for the next. If that exists, as after a crash, it stays with
                its record if the weights are equal and is replaced otherwise, and later versions are removed.
            round: round that made it.
            members: edges whose contributions were aggregated.
            samples: number of samples of these.
            note: what else is to be known of it.
            figures: figures by name.

        Raises:
            StorageError: the version cannot be written.
            ChecksumError: the record before is damaged.
        """
        current = self.current
        number = current + 1 if version is None else version
        if not 0 <= number <= current + 1:
            raise ValueError(f"version {number} after version {current}; allowed: 0 to {current + 1}")
        before = self._before(number)
        tensors = {name: tensor_digest(tensor) for name, tensor in weights.items()}
        if before is not None:
            tensors = {**before.tensors, **tensors}
        record = VersionRecord(
            version=number,
            parent=None if before is None else before.version,
            round=round,
            members=tuple(members),
            samples=samples,
            time=_now(),
            digest=_digest(tensors),
            note=note,
            figures=dict(figures or {}),
            tensors=tensors,
        )
        return self._add(record, weights)

    def rollback(self, version: int) -> VersionRecord:
        """Add a version with the weights of an earlier one, which are those it had bit for bit; return its record.

        Raises:
            ResultError: there is no such version.
            ChecksumError: a file is damaged.
            StorageError: the new version cannot be written.
        """
        old, current = self.record(version), self.current
        record = VersionRecord(
            version=current + 1,
            parent=current,
            time=_now(),
            digest=old.digest,
            note=f"rollback to {version}",
            figures=old.figures,
            tensors=old.tensors,
        )
        return self._add(record, self.weights(version))

    def forget_after(self, version: int) -> None:
        """Remove later versions than this one: those of rounds that a resumed run does again."""
        for number in reversed(self._numbers()):
            if number > version:
                self._remove(number)

    def _add(self, record: VersionRecord, weights: Weights) -> VersionRecord:
        """Write a version with what differs from its parent, unless it is there; then remove what is not kept."""
        self.forget_after(record.version)
        if record.version == self.current and (known := self.record(record.version)).digest == record.digest:
            return known
        before = {} if record.parent is None else self.record(record.parent).tensors
        changed = {name: tensor for name, tensor in weights.items() if before.get(name) != record.tensors[name]}
        self._write(record, changed)
        if self._keep is not None:
            self._drop_all_but(self._keep)
        return record

    def _drop_all_but(self, keep: int) -> None:
        """Remove the oldest versions, after their tensors have been merged into the oldest one that stays."""
        numbers = self._numbers()
        if len(numbers) <= keep:
            return
        oldest = self.record(numbers[-keep])
        self._write(oldest.model_copy(update={"parent": None}), self.weights(oldest.version))
        for number in reversed(numbers[:-keep]):
            self._remove(number)

    def _remove(self, version: int) -> None:
        """Remove a version; its record first, without which it does not exist."""
        (self._path(version) / _RECORD).unlink(missing_ok=True)
        remove(self._path(version))

    def _write(self, record: VersionRecord, tensors: Weights) -> None:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

        def fill(folder: Path) -> None:
            save_file(plain, folder / _WEIGHTS)
            (folder / _RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")

        write_folder(self._path(record.version), fill)

    def _tensors(self, version: int, digests: Mapping[str, str]) -> dict[str, Tensor]:
        """Read those of some tensors that a version stores, and check them."""
        path = self._path(version) / _WEIGHTS
        try:
            with safe_open(path, "pt") as file:
                found: dict[str, Tensor] = {name: file.get_tensor(name) for name in digests.keys() & set(file.keys())}
        except (OSError, SafetensorError) as error:
            raise ChecksumError(f"cannot read '{path}': {str(error).splitlines()[0]}") from None
        for name, tensor in found.items():
            if tensor_digest(tensor) != digests[name]:
                raise ChecksumError(f"'{path}' is damaged: '{name}' is not what it was when it was written")
        return found

    def _before(self, version: int) -> VersionRecord | None:
        """Record of the version before; None if there is none."""
        return self.record(version - 1) if version - 1 in self._numbers() else None

    def _path(self, version: int) -> Path:
        return self.folder / f"{version:04d}"

    def _numbers(self) -> list[int]:
        """Numbers of the versions, ascending."""
        return sorted(int(path.parent.name) for path in self.folder.glob(f"[0-9]*/{_RECORD}"))


def histories(folder: Path) -> dict[str, VersionStore]:
    """Histories of a result directory by name: the empty name if it has one, those of its cohorts if several.

    Args:
        folder: result directory; the result is empty if it has no versions.
    """
    root = folder / VERSIONS
    if (whole := VersionStore(root)).current >= 0:
        return {"": whole}
    found = {path.name: VersionStore(path) for path in sorted(root.glob("[!.]*")) if path.is_dir()}
    return {name: store for name, store in found.items() if store.current >= 0}


def _digest(tensors: Mapping[str, str]) -> str:
    return fingerprint_from({}, tensors)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
