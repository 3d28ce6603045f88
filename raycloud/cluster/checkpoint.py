"""What a killed driver needs to go on: the averaged student after the last complete round, and the run's facts."""

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


@dataclass
class Checkpoint:
    """The state between two rounds."""

    rounds: int
    """Complete rounds."""
    config: PretrainedConfig
    weights: Weights
    facts: dict[str, Any]
    """What the summary needs to know of the time before, as plain JSON."""

    def save(self, folder: Path) -> None:
        """Write it as a folder that is there as a whole or not at all, then drop the older one."""

        def fill(to: Path) -> None:
            self.config.save_pretrained(to)
            save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, to / "weights.safetensors")
            (to / "facts.json").write_text(json.dumps(self.facts))

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
            config = AutoConfig.from_pretrained(newest)
            facts = json.loads((newest / "facts.json").read_text())
            return cls(
                int(newest.name.removeprefix("round-")), config, load_file(newest / "weights.safetensors"), facts
            )
        except Exception as error:  # whichever of the three readers meets the damage
            raise ResultError(f"cannot resume from '{newest}': {str(error).splitlines()[0]}") from error
