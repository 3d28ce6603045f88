"""What a killed driver needs to go on: the averaged students after the last complete round, and the run's facts."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from raycloud.errors import ResultError
from raycloud.models.weights import Weights
from raycloud.results import write_folder

_WEIGHTS = "weights.safetensors"
_FACTS = "facts.json"


@dataclass(frozen=True)
class Snapshot:
    """A student between two rounds."""

    config: PretrainedConfig
    weights: Weights


@dataclass
class Checkpoint:
    """The state between two rounds."""

    rounds: int
    """Complete rounds."""
    students: dict[str, Snapshot]
    """By cohort."""
    facts: dict[str, Any]
    """What the summary needs to know of the time before, as plain JSON."""

    def save(self, folder: Path) -> None:
        """Write it as a folder that is there as a whole or not at all, then drop the older one."""

        def fill(to: Path) -> None:
            for cohort, student in self.students.items():
                student.config.save_pretrained(to / cohort)
                tensors = {name: tensor.contiguous() for name, tensor in student.weights.items()}
                save_file(tensors, to / cohort / _WEIGHTS)
            (to / _FACTS).write_text(json.dumps(self.facts))

        name = f"round-{self.rounds:04d}"
        write_folder(folder / name, fill)
        for old in folder.glob("round-*"):
            if old.name != name:
                shutil.rmtree(old)

    @classmethod
    def latest(cls, folder: Path) -> Checkpoint | None:
        """The newest one, or None.

        Raises:
            ResultError: it is there and cannot be read.
        """
        found = sorted(folder.glob("round-*"))
        if not found:
            return None
        newest = found[-1]
        try:
            facts = json.loads((newest / _FACTS).read_text())
            students = {
                cohort: Snapshot(AutoConfig.from_pretrained(newest / cohort), load_file(newest / cohort / _WEIGHTS))
                for cohort in facts["students"]
            }
        except Exception as error:  # whichever of the three readers meets the damage
            raise ResultError(f"cannot resume from '{newest}': {str(error).splitlines()[0]}") from error
        return cls(int(newest.name.removeprefix("round-")), students, facts)
