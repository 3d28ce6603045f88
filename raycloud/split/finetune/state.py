"""What one side must keep to go on with the next step: what it learns, and its optimiser."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from raycloud.errors import TrainingError
from raycloud.results import write_atomically
from raycloud.split.finetune.memory import MEMORY
from raycloud.training.loop import Trainer

GROUPS = "groups"
"""Beside the folders of runs: what groups have made of their members' work."""
_OPTIMISER = "optimiser/"


def learnt(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by module and name; those that modules share once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for side, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{side}.{name}"] = parameter
    return found


def codes(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All of the ends of codes, trained or not, and which coordinates they send apart.

    They were fitted to texts that are not there any more, and edges that are averaged begin with those of one of them.
    What else is not trained is a function of the model.
    """
    return {
        f"{side}.{name}": tensor
        for side in ("encoder", "decoder")
        if side in modules
        for name, tensor in modules[side].state_dict().items()
    }


def put(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Copy some of what :func:`learnt` and :func:`codes` name into modules.

    Raises:
        TrainingError: the modules have no such tensors.
    """
    mine = {**learnt(modules), **codes(modules)}
    odd = [name for name in weights if name not in mine or mine[name].shape != weights[name].shape]
    if odd:
        raise TrainingError(f"the group's weights do not fit this side: the first of {len(odd)} is '{odd[0]}'")
    with torch.no_grad():
        for name, tensor in weights.items():
            mine[name].copy_(tensor)


def state_of(modules: Mapping[str, nn.Module], trainer: Trainer | None) -> dict[str, Tensor]:
    """As plain tensors, for safetensors."""
    optimiser = trainer.state() if trainer is not None else {}
    return {
        **codes(modules),
        **{name: parameter.detach() for name, parameter in learnt(modules).items()},
        **{_OPTIMISER + name: tensor for name, tensor in optimiser.items()},
    }


def load_state(modules: Mapping[str, nn.Module], trainer: Trainer | None, state: Mapping[str, Tensor]) -> None:
    """Go on where :func:`state_of` was taken.

    Raises:
        TrainingError: the state is of other parameters.
    """
    mine = {**codes(modules), **learnt(modules)}
    theirs = {name: tensor for name, tensor in state.items() if not name.startswith((_OPTIMISER, MEMORY))}
    odd = sorted(mine.keys() ^ theirs.keys()) or [name for name in mine if mine[name].shape != theirs[name].shape]
    if odd:
        raise TrainingError(
            f"the saved state does not fit this side: {len(odd)} tensors differ, the first is '{odd[0]}'"
        )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
    if trainer is not None:
        trainer.load_state(
            {name.removeprefix(_OPTIMISER): t for name, t in state.items() if name.startswith(_OPTIMISER)}
        )


def forget(folder: Path, most: int, runs: Collection[str], groups: Collection[str]) -> None:
    """Remove all runs and groups of a folder but those that saved last, so many of each, and those that go on.

    Args:
        folder: holds a folder for each run, as :class:`Checkpoints` fills it, and a file for each group.
        most: of each that stay.
        runs: names of those that go on.
        groups: likewise.
    """
    saved = [path for path in folder.iterdir() if any(path.glob("*.safetensors")) and path.name != GROUPS]
    for path in _but_the_latest(saved, most, runs):
        shutil.rmtree(path, ignore_errors=True)
    for path in _but_the_latest((folder / GROUPS).glob("*.safetensors"), most, groups):
        path.unlink(missing_ok=True)


def _but_the_latest(paths: Iterable[Path], most: int, spare: Collection[str]) -> list[Path]:
    ordered = sorted(paths, key=lambda path: path.stat().st_mtime)
    return [path for path in ordered[:-most] if path.name.removesuffix(".safetensors") not in spare]


class Checkpoints:
    """One side's states by step. The edge's file is what makes a checkpoint count: the cloud writes its own before it.

    Args:
        folder: holds ``<step>.safetensors``.
    """

    KEPT = 2
    """The cloud's latest may be one that the edge never wrote, and the edge's the one before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steps(self) -> list[int]:
        """Those that are kept, ascending."""
        return sorted(int(path.stem) for path in self._folder.glob("*.safetensors") if path.stem.isdecimal())

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Write one as a whole or not at all, and forget the oldest."""
        write_atomically(self._path(step), save({name: tensor.contiguous() for name, tensor in state.items()}))
        for old in self.steps()[: -self.KEPT]:
            self._path(old).unlink()

    def load(self, step: int) -> dict[str, Tensor]:
        """Read one.

        Raises:
            TrainingError: it is not there, or damaged.
        """
        try:
            return load_file(self._path(step))
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"cannot read the checkpoint '{self._path(step)}': {error}") from None

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.safetensors"
