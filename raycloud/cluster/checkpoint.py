"""Checkpoint of the driver of a distillation: the averaged students after the last complete round, and run facts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from raycloud.checksums import verify
from raycloud.durable import remove, write_folder
from raycloud.errors import ResultError
from raycloud.models.weights import Weights
from raycloud.report.console import print_and_log
from raycloud.results import plain_json

KEPT = 2
"""Number of checkpoints that are kept: the newest, and the previous one in case the newest is damaged."""
_LOG = logging.getLogger(__name__)
_WEIGHTS = "weights.safetensors"
_SINGLE = "single-"
_FACTS = "facts.json"


@dataclass(frozen=True)
class StudentCheckpoint:
    """Student between two rounds."""

    config: PretrainedConfig
    weights: Weights
    singles: Mapping[str, Weights] = field(default_factory=dict)
    """Each edge's weights of the last round before averaging, by edge; kept until they are evaluated."""


@dataclass
class DistillCheckpoint:
    """State of a distillation between two rounds."""

    rounds: int
    """Number of complete rounds."""
    students: dict[str, StudentCheckpoint]
    """Students by cohort."""
    facts: dict[str, Any]
    """Data that the summary needs about earlier rounds, as plain JSON; numbers that are not finite are None."""

    def save(self, folder: Path) -> None:
        """Write the checkpoint atomically as a folder, then delete all but the newest ``KEPT``."""

        def fill(to: Path) -> None:
            for cohort, student in self.students.items():
                student.config.save_pretrained(to / cohort)
                _save(student.weights, to / cohort / _WEIGHTS)
                for edge, weights in student.singles.items():
                    _save(weights, to / cohort / f"{_SINGLE}{edge}.safetensors")
            (to / _FACTS).write_text(plain_json(self.facts))

        name = f"round-{self.rounds:04d}"
        write_folder(folder / name, fill)
        for old in _stored(folder)[:-KEPT]:
            remove(old)

    @classmethod
    def latest(cls, folder: Path) -> DistillCheckpoint | None:
        """Return the newest undamaged checkpoint, or None if there are none; damaged ones are deleted.

        Raises:
            ResultError: all checkpoints are damaged.
        """
        damaged: ResultError | None = None
        for path in reversed(_stored(folder)):
            try:
                found = cls._read(path)
            except ResultError as error:
                print_and_log(_LOG, f"warning: {error}; trying the checkpoint before it", logging.WARNING)
                damaged = error
                continue
            for newer in _stored(folder):
                if newer.name > path.name:
                    remove(newer)
            return found
        if damaged is not None:
            raise damaged
        return None

    @classmethod
    def _read(cls, path: Path) -> DistillCheckpoint:
        try:
            verify(path)
            facts = json.loads((path / _FACTS).read_text())
            students = {
                cohort: StudentCheckpoint(
                    AutoConfig.from_pretrained(path / cohort, trust_remote_code=False),
                    load_file(path / cohort / _WEIGHTS),
                    {
                        single.stem.removeprefix(_SINGLE): load_file(single)
                        for single in sorted((path / cohort).glob(f"{_SINGLE}*.safetensors"))
                    },
                )
                for cohort in facts["students"]
            }
        except Exception as error:  # whichever of the readers meets the damage
            raise ResultError(f"cannot resume from '{path}': {str(error).splitlines()[0]}") from error
        return cls(int(path.name.removeprefix("round-")), students, facts)


def _stored(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    return sorted(folder.glob("round-*"))


def _save(weights: Weights, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
