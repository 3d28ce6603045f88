"""Checkpoints of one side: its trained parameters, bottleneck tensors and optimiser state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raycloud.checksums import verify
from raycloud.durable import remove, write_folder
from raycloud.errors import ChecksumError, RaycloudError, TrainingError
from raycloud.link.client import SessionRefused
from raycloud.report.console import print_and_log
from raycloud.split.finetune.activation_cache import STATE_PREFIX
from raycloud.training.loop import Trainer

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

GROUPS = "groups"
"""Folder, next to those of the runs, with the rounds of groups."""
_OPTIMISER = "optimiser/"
_STATE = "state.safetensors"


def trainable_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Trainable parameters, by module and name; parameters shared by modules occur once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for side, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{side}.{name}"] = parameter
    return found


def bottleneck_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors of the bottlenecks' ends, trained or not, with the indices of their outlier coordinates.

    They were fitted to texts that are no longer available, and averaged edges begin with those of one edge. All other
    tensors that are not trained are a function of the model.
    """
    return {
        f"{side}.{name}": tensor
        for side in ("encoder", "decoder")
        if side in modules
        for name, tensor in modules[side].state_dict().items()
    }


def load_weights(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Copy weights into modules, named as in :func:`trainable_parameters` and :func:`bottleneck_tensors`.

    Raises:
        TrainingError: the modules have no such tensors.
    """
    mine = {**trainable_parameters(modules), **bottleneck_tensors(modules)}
    odd = [name for name in weights if name not in mine or mine[name].shape != weights[name].shape]
    if odd:
        raise TrainingError(f"the group's weights do not fit this side: the first of {len(odd)} is '{odd[0]}'")
    with torch.no_grad():
        for name, tensor in weights.items():
            mine[name].copy_(tensor)


def state_of(modules: Mapping[str, nn.Module], trainer: Trainer | None) -> dict[str, Tensor]:
    """State of modules and trainer as plain tensors, for safetensors."""
    optimiser = trainer.state() if trainer is not None else {}
    return {
        **bottleneck_tensors(modules),
        **{name: parameter.detach() for name, parameter in trainable_parameters(modules).items()},
        **{_OPTIMISER + name: tensor for name, tensor in optimiser.items()},
    }


def load_state(modules: Mapping[str, nn.Module], trainer: Trainer | None, state: Mapping[str, Tensor]) -> None:
    """Restore modules and trainer from a result of :func:`state_of`.

    Raises:
        TrainingError: the state is of other parameters.
    """
    mine = {**bottleneck_tensors(modules), **trainable_parameters(modules)}
    theirs = {name: tensor for name, tensor in state.items() if not name.startswith((_OPTIMISER, STATE_PREFIX))}
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


def remove_old_runs(folder: Path, most: int, runs: Collection[str], groups: Collection[str]) -> None:
    """Remove old runs and groups of a folder; keep the ``most`` latest of each and the active ones.

    Args:
        folder: folder with a folder for each run, as :class:`CheckpointStore` fills it, and in ``groups`` one for each
            group.
        most: number of runs and of groups to keep.
        runs: names of the active runs.
        groups: names of the active groups.
    """
    saved = [path for path in folder.iterdir() if any(path.glob(f"*/{_STATE}")) and path.name != GROUPS]
    for path in _removable(saved, most, runs):
        remove(path)
    for path in _removable((folder / GROUPS).glob("[!.]*"), most, groups):
        remove(path)


def _removable(paths: Iterable[Path], most: int, spare: Collection[str]) -> list[Path]:
    ordered = sorted(paths, key=lambda path: path.stat().st_mtime)
    return [path for path in ordered[:-most] if path.name not in spare]


class CheckpointStore:
    """Store of one side's states by step, or of a group's by round.

    A checkpoint is valid once the edge has written its own state: the cloud writes its state first.

    Args:
        folder: folder with a folder for each step.
        round_steps: steps of a round, if the edge trains in a group. A group whose latest round is damaged continues
            from the round before, and its members from a checkpoint before the damaged round's end: so the checkpoints
            at the end of the latest rounds are kept, too.
    """

    KEPT = 3
    """Number of checkpoints kept. The cloud's latest may be one that the edge never wrote, and the edge's the one
    before; if that one is damaged, both go back by one more."""

    def __init__(self, folder: Path, round_steps: int | None = None) -> None:
        self._folder, self._round_steps = folder, round_steps

    def steps(self) -> list[int]:
        """Steps of the stored checkpoints, ascending."""
        return sorted(int(path.name) for path in self._folder.glob("*") if path.name.isdecimal())

    def save(self, step: int, state: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
        """Write a checkpoint with its metadata, atomically, and remove the oldest."""
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        write_folder(self._path(step), lambda to: save_file(tensors, to / _STATE, dict(about or {})))
        steps = self.steps()
        stay = set(steps[-self.KEPT :])
        if self._round_steps is not None:
            stay |= set([step for step in steps if step % self._round_steps == 0][-self.KEPT :])
        for old in set(steps) - stay:
            remove(self._path(old))

    def check(self, step: int) -> None:
        """Check that a checkpoint can be read.

        Raises:
            TrainingError: the checkpoint is missing or damaged.
        """
        try:
            verify(self._path(step))
            with safe_open(self._path(step) / _STATE, "pt"):
                pass
        except (OSError, SafetensorError, ChecksumError) as error:
            raise self._unreadable(step, error) from None

    def load(self, step: int) -> dict[str, Tensor]:
        """Read a checkpoint.

        Raises:
            TrainingError: the checkpoint is missing or damaged.
        """
        self.check(step)
        try:
            return load_file(self._path(step) / _STATE)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(step, error) from None

    def about(self, step: int) -> dict[str, str]:
        """Read the metadata of a checkpoint.

        Raises:
            TrainingError: the checkpoint is missing or damaged.
        """
        self.check(step)
        with safe_open(self._path(step) / _STATE, "pt") as file:
            return dict(file.metadata() or {})

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are computed again."""
        for later in self.steps():
            if later > step:
                remove(self._path(later))

    def _path(self, step: int) -> Path:
        return self._folder / str(step)

    def _unreadable(self, step: int, error: Exception) -> TrainingError:
        return TrainingError(f"cannot read the checkpoint '{self._path(step)}': {str(error).splitlines()[0]}")


def latest_usable(store: CheckpointStore, use: Callable[[int], T], next_try: str, what: str = "") -> T | None:
    """Result of ``use`` for the latest step for which it succeeds; None if the store is empty.

    Damaged checkpoints are reported, and later ones than the result are removed.

    Args:
        store: store of checkpoints.
        use: reads the checkpoint of a step; raises TrainingError, or SessionRefused with the code ``checkpoint``, if
            that cannot be used.
        next_try: end of the warning, which says what is done instead.
        what: beginning of the warning, before the error.

    Raises:
        TrainingError: no checkpoint can be used; so for SessionRefused.
    """
    first: RaycloudError | None = None
    for step in reversed(store.steps()):
        try:
            found = use(step)
        except (TrainingError, SessionRefused) as error:
            if isinstance(error, SessionRefused) and error.code != "checkpoint":
                raise
            print_and_log(_LOG, f"warning: {what}{error}; {next_try}", logging.WARNING)
            first = first or error
            continue
        store.forget_after(step)
        return found
    if first is not None:
        raise first
    return None
