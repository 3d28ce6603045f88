"""Signals of a whole data set in a folder of safetensors files: computed once, for all epochs and students.

Batches are others in every epoch, so signals lie there sample by sample and are found by the samples' keys. A part of
the folder is there as a whole or not at all; building goes on where it was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import IGNORE, Batch, Sample, collate
from raycloud.distill.signals import Signal, SignalRecipe, observe, sample_keys
from raycloud.distill.signals.draws import tokens_at
from raycloud.distill.signals.keys import joined
from raycloud.errors import DataError
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.results import write_atomically

ORIGIN = "signals.json"
_VERSION = 1
_BATCH = 16
_KEYS, _TOKENS = "sample_keys", "sample_tokens"


@dataclass(frozen=True)
class Origin:
    """What all signals of a folder have in common."""

    teacher: str
    """Its name with a fingerprint of its weights."""
    tokenizer: str
    """See :func:`tokenizer_fingerprint`."""
    recipe: SignalRecipe
    temperatures: tuple[float, ...] = (1.0,)

    def keys(self, batch: Batch) -> list[str]:
        """Of the samples of a batch."""
        return sample_keys(self.teacher, batch, self.recipe, self.temperatures)

    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "version": _VERSION,
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "signal": self.recipe.model_dump(mode="json"),
            "temperatures": sorted(set(self.temperatures)),
        }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of which id stands for which token."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Place:
    """Where a sample's tokens are."""

    payload: Mapping[str, Tensor]
    tokens: slice


class FileSignals:
    """A :class:`~raycloud.distill.signals.SignalStore` that has computed all it will ever be asked for.

    Tensors are mapped from the files: what no batch asks for takes no memory.

    Args:
        path: the folder, see :meth:`build`.
        origin: what its signals must be of.

    Raises:
        DataError: there are no signals, they are of another origin, or a file is damaged.
    """

    def __init__(self, path: str | Path, origin: Origin) -> None:
        self._path, self._origin = Path(path), origin
        _check_origin(self._path, origin)
        self._places: dict[str, _Place] = {}
        for part in _parts(self._path):
            self._places |= _places(part)

    @classmethod
    def build(
        cls,
        path: str | Path,
        origin: Origin,
        teacher: Segment,
        samples: Sequence[Sample],
        *,
        part: int = 256,
        moved: Callable[[int, int], None] = lambda done, total: None,
    ) -> FileSignals:
        """Those of a folder that lacks none of the samples; see :func:`building`, whose steps ``moved`` is told."""
        for done, total in building(path, origin, teacher, samples, part=part):
            moved(done, total)
        return cls(path, origin)

    def __len__(self) -> int:
        """Samples it holds."""
        return len(self._places)

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about a batch.

        Raises:
            DataError: a sample is not there, or was cut or labelled otherwise when the file was built.
        """
        keys = self._origin.keys(batch)
        unknown = sum(key not in self._places for key in keys)
        if unknown:
            raise DataError(
                f"signals in '{self._path}' are stale: {unknown} of {len(keys)} samples of the batch have other ids or "
                f"labels than any of the {len(self)} it holds; build them again from the same data and max_length"
            )
        found = [tokens_at(place.payload, place.tokens) for place in map(self._places.__getitem__, keys)]
        payload = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        recipe = self._origin.recipe
        return Signal(joined(keys), recipe.kind, recipe.codec, payload, tuple(sorted(set(self._origin.temperatures))))


class MeteredSignals:
    """A :class:`~raycloud.distill.signals.SignalStore` that counts what it hands out as ``signals``."""

    def __init__(self, inner: FileSignals, meter: Meter) -> None:
        self._inner, self._meter = inner, meter

    def signal(self, batch: Batch) -> Signal:
        """Read, then count."""
        said = self._inner.signal(batch)
        self._meter.add("signals", said.nbytes)
        return said


def building(
    path: str | Path, origin: Origin, teacher: Segment, samples: Sequence[Sample], *, part: int = 256
) -> Iterator[tuple[int, int]]:
    """As :func:`gathering`, from a teacher that is here.

    Args:
        path: the folder, made where it is missing.
        origin: kind of signal, temperatures, and the teacher's name.
        teacher: the whole model.
        samples: the data set.
        part: samples of one file.
    """
    device = next(teacher.parameters()).device

    def said(batches: Sequence[Batch]) -> Iterator[Signal]:
        for batch in batches:
            yield observe(teacher, origin.teacher, batch.to(device), origin.recipe, origin.temperatures)

    return gathering(path, origin, said, samples, part=part)


def gathering(
    path: str | Path,
    origin: Origin,
    said: Callable[[Sequence[Batch]], Iterable[Signal]],
    samples: Sequence[Sample],
    *,
    part: int = 256,
) -> Iterator[tuple[int, int]]:
    """Have a teacher say what it thinks of all samples, but for those whose signals are there already.

    Where another process builds in the folder, its end is waited for, and what it has left is taken over.

    Args:
        path: the folder, made where it is missing.
        origin: kind of signal, temperatures, and the teacher's name.
        said: what the teacher says of batches, in order.
        samples: the data set.
        part: samples of one file, at most that many are lost when the process is killed.

    Yields:
        After each part, how many of how many samples are there.

    Raises:
        DataError: the folder holds signals of another origin.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if (folder / ORIGIN).is_file() or any(folder.glob("*.safetensors")):
            _check_origin(folder, origin)
        else:
            write_atomically(folder / ORIGIN, json.dumps(origin.facts(), indent=2) + "\n")
        wanted = {key: sample for sample in samples for key in origin.keys(collate([sample], pad=0))}
        missing = sorted(wanted.keys() - _whole_parts(folder), key=lambda key: (len(wanted[key].ids), key))
        there = len(wanted) - len(missing)
        yield there, len(wanted)
        for begin in range(0, len(missing), part):
            keys = missing[begin : begin + part]
            _save(folder, keys, _payload(said, [wanted[key] for key in keys]))
            yield there + begin + len(keys), len(wanted)


def _check_origin(folder: Path, origin: Origin) -> None:
    try:
        stored = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no signals in '{folder}' (it holds no {ORIGIN}); build them first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read '{folder / ORIGIN}': {str(error).splitlines()[0]}") from error
    for field, wanted in origin.facts().items():
        there = stored.get(field) if isinstance(stored, dict) else None
        if there != wanted:
            raise DataError(f"signals in '{folder}' are stale: {field} is {there}, not {wanted}; build them elsewhere")


def _payload(said: Callable[[Sequence[Batch]], Iterable[Signal]], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The payload of all samples in order, and how many tokens each of them has."""
    batches = [collate(samples[at : at + _BATCH], pad=0) for at in range(0, len(samples), _BATCH)]
    payloads = [one.payload for one in said(batches)]
    payload = {name: torch.cat([one[name] for one in payloads]) for name in payloads[0]}
    return payload | {_TOKENS: torch.cat([(batch.labels != IGNORE).sum(dim=1) for batch in batches])}


def _save(folder: Path, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """One part, under a name of its own, there as a whole or not at all."""
    coded = torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)
    scratch = folder / ".part"
    save_file({**{name: tensor.contiguous() for name, tensor in tensors.items()}, _KEYS: coded}, scratch)
    with open(scratch, "rb") as file:
        os.fsync(file.fileno())
    scratch.replace(folder / f"{joined(keys)[:16]}.safetensors")


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _places(part: Path) -> dict[str, _Place]:
    """The samples of a part by key.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with safe_open(part, framework="pt") as file:
            payload = {name: file.get_tensor(name) for name in sorted(file.keys())}
        keys, tokens = payload.pop(_KEYS), payload.pop(_TOKENS)
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(f"cannot read signals in '{part}': {str(error).splitlines()[0]}; build them again") from error
    ends = tokens.cumsum(dim=0).tolist()
    spans = map(slice, [0, *ends[:-1]], ends)
    return {bytes(key).hex(): _Place(payload, span) for key, span in zip(keys.numpy(), spans, strict=True)}


def _whole_parts(folder: Path) -> set[str]:
    """The keys of all samples there; parts that a crash damaged are removed."""
    found: set[str] = set()
    for part in _parts(folder):
        try:
            found |= _places(part).keys()
        except DataError:
            part.unlink()
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; what a killed process left behind half-written is overwritten."""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
