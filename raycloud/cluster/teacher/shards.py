"""Checkpoints of a DeepSpeed engine as plain tensors: each worker writes its part, any number of workers reads.

DeepSpeed's own checkpoints are pickles that depend on the stage and, mostly, on the number of workers. Here each worker
writes its pieces of the float32 weights and of Adam's two averages, each with the parameter's name and the piece's
offset in it. A reader assembles the pieces that it needs, so stage and workers may change between runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raycloud.checksums import CHECKSUMS, verify, write_checksums
from raycloud.durable import sync, write_atomically, writing
from raycloud.errors import ChecksumError, ResultError, TrainingError
from raycloud.report.console import print_and_log

WEIGHT = "weight"
_AVERAGES = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Fields of float16's loss scaler that are saved, where there is one."""
_STATE = "state.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterShard:
    """Part of a parameter that this worker updates: ``flat[offset : offset + count]`` holds the elements
    ``[start, start + count)`` of the parameter called ``name``."""

    name: str
    start: int
    count: int
    flat: Tensor
    """Tensor that the optimizer updates: the parameter itself, or a buffer with pieces of many parameters."""
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of the piece in ``flat`` or in a tensor of its shape."""
        return tensor.view(-1)[self.offset : self.offset + self.count]


def parameter_shards(engine: Any, named: Mapping[str, nn.Parameter]) -> Iterator[ParameterShard]:
    """Yield the pieces that this worker updates.

    Args:
        engine: DeepSpeed engine.
        named: trained parameters by name.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    parameter: Any  # DeepSpeed stores its data as attributes of the parameters
    for name, parameter in named.items():
        if stage == 0:
            if engine.global_rank == 0:  # all workers hold the same
                yield ParameterShard(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = torch.distributed.get_rank(parameter.ds_process_group) * count
            count = min(count, parameter.ds_numel - start)  # the last pieces are padded
            if count > 0:
                yield ParameterShard(name, start, count, optimizer.fp32_partitioned_groups_flat[group], offset)
        elif (found := parameter._hp_mapping) is not None:
            (flat,) = engine.basic_optimizer.param_groups[found.param_group_index]["params"]
            start, offset = found.lp_fragment_address.start, found.hp_fragment_address.start
            yield ParameterShard(name, start, found.lp_fragment_address.numel, flat, offset)


def save(folder: Path, engine: Any, named: Mapping[str, nn.Parameter], facts: Mapping[str, Any]) -> None:
    """Write this worker's part of a checkpoint; the first worker also writes the facts.

    Args:
        folder: existing folder of the checkpoint.
        engine: DeepSpeed engine after at least one step.
        named: trained parameters by name.
        facts: plain JSON for :attr:`ShardedCheckpoint.facts`.

    Raises:
        TrainingError: a number of the state is not finite, so no run could resume from it.
    """
    tensors: dict[str, Tensor] = {}
    for piece in parameter_shards(engine, named):
        state = engine.basic_optimizer.state[piece.flat]
        for kind, tensor in ((WEIGHT, piece.flat), *((key, state[key]) for key in _AVERAGES)):
            tensors[f"{kind}/{piece.start}/{piece.name}"] = piece.of(tensor.detach()).float().cpu().clone()
    mine = folder / f"worker-{engine.global_rank:05d}.safetensors"
    with writing(mine):
        save_file(tensors, mine)
        sync(mine)
    if engine.global_rank == 0:
        shapes = {name: list(getattr(one, "ds_shape", one.shape)) for name, one in named.items()}
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        scale = {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}
        state = {**facts, "shapes": shapes, "loss_scale": scale}
        try:
            text = json.dumps(state, allow_nan=False)
        except ValueError:
            raise TrainingError(f"the checkpoint's state is not all finite: {facts}, loss scale {scale}") from None
        write_atomically(folder / _STATE, text)


def write_shard_checksums(folder: Path) -> None:
    """Complete a checkpoint after every worker has written its part; one worker calls this."""
    with writing(folder):
        write_checksums(folder)
        sync(folder)
        sync(folder.parent)


def check(folder: Path) -> None:
    """Check that a checkpoint is complete and undamaged.

    Raises:
        ResultError: it is incomplete or damaged.
    """
    try:
        if not (folder / CHECKSUMS).is_file():
            raise ChecksumError(f"'{folder}' is not complete: it holds no {CHECKSUMS}")
        verify(folder)
    except ChecksumError as error:
        raise ResultError(f"cannot read the checkpoint '{folder.name}': {error}") from None


def latest_undamaged(newest: Path) -> Path:
    """Return a checkpoint or, if it is damaged, the newest undamaged one before it; log a warning for damaged ones.

    Raises:
        ResultError: all checkpoints are damaged.
    """
    before = [path for path in newest.parent.glob("checkpoint_*") if path.name < newest.name]
    return first_undamaged([newest, *sorted(before, reverse=True)])


def first_undamaged(folders: Iterable[Path]) -> Path:
    """Return the first undamaged checkpoint.

    Args:
        folders: checkpoint folders, at least one.

    Raises:
        ResultError: all checkpoints are damaged.
    """
    first: ResultError | None = None
    for folder in folders:
        try:
            check(folder)
        except ResultError as error:
            print_and_log(_LOG, f"warning: {error}; trying another checkpoint", logging.WARNING)
            first = first or error
            continue
        return folder
    assert first is not None
    raise first


class ShardedCheckpoint:
    """Checkpoint written by :func:`save` with any number of workers.

    Args:
        folder: folder with the files of all workers.

    Raises:
        ResultError: the checkpoint cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        try:
            self._state = json.loads((folder / _STATE).read_text(encoding="utf-8"), parse_constant=_no_number)
            for path in sorted(folder.glob("worker-*.safetensors")):
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118  # no mapping
                    kind, start, name = key.split("/", 2)
                    self._found.setdefault((kind, name), []).append((int(start), file, key))
        except (OSError, ValueError, SafetensorError) as error:
            raise ResultError(f"cannot read the checkpoint '{folder}': {str(error).splitlines()[0]}") from error

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that :func:`save` was given, and its own."""
        return self._state

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters."""
        return list(self._state["shapes"])

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Read the elements ``[start, start + count)`` (count,) of a parameter or of one of its averages, in float32.

        Raises:
            ResultError: the files lack some of the elements.
        """
        parts, at = [], start
        for begin, file, key in sorted(self._found.get((kind, name), ()), key=lambda one: one[0]):
            view = file.get_slice(key)
            (length,) = view.get_shape()
            if begin <= at < min(begin + length, start + count):
                parts.append(view[at - begin : min(length, start + count - begin)])
                at += len(parts[-1])
        if at != start + count:
            raise ResultError(f"the checkpoint '{self._folder}' lacks a part of '{name}'")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def weight(self, name: str) -> Tensor:
        """Return a whole parameter in float32, in its shape."""
        shape = self._state["shapes"][name]
        return self.read(WEIGHT, name, 0, torch.Size(shape).numel()).reshape(shape)

    def restore(self, engine: Any, named: Mapping[str, nn.Parameter]) -> None:
        """Restore weights, averages, step count and loss scale of an engine whose model already has these weights.

        Raises:
            ResultError: the checkpoint is of other parameters.
        """
        if set(named) != set(self.names):
            raise ResultError(f"the checkpoint '{self._folder}' belongs to other parameters")
        optimizer, step = engine.basic_optimizer, float(self._state["updates"])
        for piece in parameter_shards(engine, named) if engine.zero_optimization_stage() else _everything(named):
            state = optimizer.state[piece.flat]
            if not state:
                state["step"] = torch.tensor(step, device=piece.flat.device)
                state.update({key: torch.zeros_like(piece.flat) for key in _AVERAGES})
            state["step"].fill_(step)
            for kind, tensor in ((WEIGHT, piece.flat), *((key, state[key]) for key in _AVERAGES)):
                piece.of(tensor.detach()).copy_(self.read(kind, piece.name, piece.start, piece.count))
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        for key, value in self._state["loss_scale"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)


def _no_number(name: str) -> float:
    raise ValueError(f"{_STATE} holds {name}; allowed: finite numbers")


def _everything(named: Mapping[str, nn.Parameter]) -> Iterator[ParameterShard]:
    return (ParameterShard(name, 0, one.numel(), one, 0) for name, one in named.items())
