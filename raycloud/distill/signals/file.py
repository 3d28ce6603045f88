"""Signals of a whole data set in a folder of safetensors files: computed once, for all epochs and students.

Batches differ in every epoch, so signals are stored sample by sample and found by the samples' keys. A file is either
complete or absent; an interrupted build continues where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.checksums import verify, verify_file, write_checksums
from raycloud.data.batches import IGNORE, Batch, Sample, collate
from raycloud.distill.signals import Signal, SignalRecipe, compute_signal, sample_keys
from raycloud.distill.signals.keys import combine_keys
from raycloud.distill.signals.sampled import tokens_at
from raycloud.durable import no_follow, remove_scratch, write_atomically
from raycloud.errors import ChecksumError, DataError
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.report.console import print_and_log

SOURCE_FILE = "signals.json"
_LOG = logging.getLogger(__name__)
_VERSION = 1
_BATCH = 16
_KEYS, _TOKENS = "sample_keys", "sample_tokens"


@dataclass(frozen=True)
class SignalSource:
    """Properties that all signals of a folder share."""

    teacher: str
    """Name of the teacher with a fingerprint of its weights."""
    tokenizer: str
    """Fingerprint of the tokenizer, see :func:`tokenizer_fingerprint`."""
    recipe: SignalRecipe
    temperatures: tuple[float, ...] = (1.0,)

    def keys(self, batch: Batch) -> list[str]:
        """Keys of the samples of a batch."""
        return sample_keys(self.teacher, batch, self.recipe, self.temperatures)

    def facts(self) -> dict[str, Any]:
        """The properties as plain JSON."""
        return {
            "version": _VERSION,
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "signal": self.recipe.model_dump(mode="json"),
            "temperatures": sorted(set(self.temperatures)),
        }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of the mapping from tokens to ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _SampleTokens:
    """Location of a sample's tokens in the payload of a file."""

    payload: Mapping[str, Tensor]
    tokens: slice


class FileSignals:
    """Store that reads computed signals from a folder, a :class:`~raycloud.distill.signals.SignalStore`.

    Tensors are memory-mapped: what no batch asks for takes no memory.

    Args:
        path: the folder, see :meth:`build`.
        source: required properties of its signals.

    Raises:
        DataError: there are no signals, they have another source, or a file is damaged.
    """

    def __init__(self, path: str | Path, source: SignalSource) -> None:
        self._path, self._source = Path(path), source
        _check_source(self._path, source)
        try:
            verify(self._path)
        except ChecksumError as error:
            raise DataError(f"{error}; build the signals again") from None
        self._samples: dict[str, _SampleTokens] = {}
        for part in _files(self._path):
            self._samples |= _samples_of(part)

    @classmethod
    def build(
        cls,
        path: str | Path,
        source: SignalSource,
        teacher: Segment,
        samples: Sequence[Sample],
        *,
        samples_per_file: int = 256,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> FileSignals:
        """Build the missing signals of a folder and open it; ``on_progress`` is called with the progress of
        :func:`build_signals`."""
        for done, total in build_signals(path, source, teacher, samples, samples_per_file=samples_per_file):
            on_progress(done, total)
        return cls(path, source)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def signal(self, batch: Batch) -> Signal:
        """Signal of a batch.

        Raises:
            DataError: a sample is missing, or was cut or labelled differently when the folder was built.
        """
        keys = self._source.keys(batch)
        unknown = sum(key not in self._samples for key in keys)
        if unknown:
            raise DataError(
                f"signals in '{self._path}' are stale: {unknown} of {len(keys)} samples of the batch have other ids or "
                f"labels than any of the {len(self)} it holds; build them again from the same data and max_length"
            )
        found = [tokens_at(sample.payload, sample.tokens) for sample in map(self._samples.__getitem__, keys)]
        payload = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        recipe = self._source.recipe
        return Signal(
            combine_keys(keys), recipe.kind, recipe.codec, payload, tuple(sorted(set(self._source.temperatures)))
        )


class MeteredSignals:
    """Store that counts the bytes it returns as ``signals``, a :class:`~raycloud.distill.signals.SignalStore`."""

    def __init__(self, inner: FileSignals, meter: Meter) -> None:
        self._inner, self._meter = inner, meter

    def signal(self, batch: Batch) -> Signal:
        """Read a batch's signal and count its bytes."""
        signal = self._inner.signal(batch)
        self._meter.add("signals", signal.nbytes)
        return signal


def build_signals(
    path: str | Path, source: SignalSource, teacher: Segment, samples: Sequence[Sample], *, samples_per_file: int = 256
) -> Iterator[tuple[int, int]]:
    """Build a folder as :func:`collect_signals` does, with a teacher in this process.

    Args:
        path: the folder, created if missing.
        source: kind of signal, temperatures, and the teacher's name.
        teacher: the whole model.
        samples: the data set.
        samples_per_file: number of samples per file.
    """
    device = next(teacher.parameters()).device

    def signals_of(batches: Sequence[Batch]) -> Iterator[Signal]:
        for batch in batches:
            yield compute_signal(teacher, source.teacher, batch.to(device), source.recipe, source.temperatures)

    return collect_signals(path, source, signals_of, samples, samples_per_file=samples_per_file)


def collect_signals(
    path: str | Path,
    source: SignalSource,
    signals_of: Callable[[Sequence[Batch]], Iterable[Signal]],
    samples: Sequence[Sample],
    *,
    samples_per_file: int = 256,
) -> Iterator[tuple[int, int]]:
    """Compute the signals of all samples that the folder does not hold yet.

    If another process builds in the same folder, this call waits for it and then computes what is still missing.

    Args:
        path: the folder, created if missing.
        source: kind of signal, temperatures, and the teacher's name.
        signals_of: returns the teacher's signals of batches, in order.
        samples: the data set.
        samples_per_file: number of samples per file; at most that many are lost if the process is killed.

    Yields:
        The number of samples done and the total, after each file.

    Raises:
        DataError: the folder holds signals of another source.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with _folder_lock(folder):
        remove_scratch(folder)
        if (folder / SOURCE_FILE).is_file() or any(folder.glob("*.safetensors")):
            _check_source(folder, source)
        else:
            write_atomically(folder / SOURCE_FILE, json.dumps(source.facts(), indent=2) + "\n")
        wanted = {key: sample for sample in samples for key in source.keys(collate([sample], pad=0))}
        missing = sorted(wanted.keys() - _complete_samples(folder), key=lambda key: (len(wanted[key].ids), key))
        there = len(wanted) - len(missing)
        yield there, len(wanted)
        for begin in range(0, len(missing), samples_per_file):
            keys = missing[begin : begin + samples_per_file]
            _save(folder, keys, _payload(signals_of, [wanted[key] for key in keys]))
            yield there + begin + len(keys), len(wanted)


def _check_source(folder: Path, source: SignalSource) -> None:
    try:
        stored = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no signals in '{folder}' (it holds no {SOURCE_FILE}); build them first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read '{folder / SOURCE_FILE}': {str(error).splitlines()[0]}") from error
    for field, wanted in source.facts().items():
        there = stored.get(field) if isinstance(stored, dict) else None
        if there != wanted:
            raise DataError(f"signals in '{folder}' are stale: {field} is {there}, not {wanted}; build them elsewhere")


def _payload(signals_of: Callable[[Sequence[Batch]], Iterable[Signal]], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Payload of all samples in order, and the number of tokens of each."""
    batches = [collate(samples[at : at + _BATCH], pad=0) for at in range(0, len(samples), _BATCH)]
    payloads = [one.payload for one in signals_of(batches)]
    payload = {name: torch.cat([one[name] for one in payloads]) for name in payloads[0]}
    return payload | {_TOKENS: torch.cat([(batch.labels != IGNORE).sum(dim=1) for batch in batches])}


def _save(folder: Path, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Write one file atomically, with a name derived from its keys."""
    coded = torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)
    kept = {**{name: tensor.contiguous() for name, tensor in tensors.items()}, _KEYS: coded}
    write_atomically(folder / f"{combine_keys(keys)[:16]}.safetensors", save(kept))
    write_checksums(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _samples_of(part: Path) -> dict[str, _SampleTokens]:
    """Samples of a file by key.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with safe_open(part, framework="pt") as file:
            payload = {name: file.get_tensor(name) for name in sorted(file.keys())}
        keys, tokens = payload.pop(_KEYS), payload.pop(_TOKENS)
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(f"cannot read signals in '{part}': {str(error).splitlines()[0]}") from error
    ends = tokens.cumsum(dim=0).tolist()
    spans = map(slice, [0, *ends[:-1]], ends)
    return {bytes(key).hex(): _SampleTokens(payload, span) for key, span in zip(keys.numpy(), spans, strict=True)}


def _complete_samples(folder: Path) -> set[str]:
    """Keys of all samples in the folder; damaged files are removed."""
    found: set[str] = set()
    for part in _files(folder):
        try:
            verify_file(part)
            found |= _samples_of(part).keys()
        except (ChecksumError, DataError) as error:
            print_and_log(_LOG, f"warning: {error}; its signals are built again", logging.WARNING)
            part.unlink()
    write_checksums(folder)
    return found


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock."""
    with open(folder / ".lock", "w", opener=no_follow) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
