"""Checkpoints of a DeepSpeed engine as plain tensors: every worker writes what it holds, any number of them reads.

DeepSpeed's own checkpoints are pickles, tied to the stage and, mostly, to the number of workers. Here each worker
writes the pieces of the float32 weights and of Adam's two averages that it holds, each with the parameter's name and
where in it the piece begins. Whoever reads puts together what it needs, so stage and workers may change between runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raycloud.errors import ResultError

WEIGHT = "weight"
_AVERAGES = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Of float16's loss scale, where there is one."""
_STATE = "state.json"


@dataclass(frozen=True)
class Piece:
    """A part of a parameter that this worker updates: ``flat[offset : offset + count]`` is ``[start, start + count)``
    of the parameter called ``name``."""

    name: str
    start: int
    count: int
    flat: Tensor
    """What the optimiser knows: the parameter itself, or a buffer that holds pieces of many."""
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the piece in ``flat`` or in a tensor of its shape."""
        return tensor.view(-1)[self.offset : self.offset + self.count]


def pieces(engine: Any, named: Mapping[str, nn.Parameter]) -> Iterator[Piece]:
    """What this worker updates.

    Args:
        engine: of DeepSpeed.
        named: the trained parameters by name.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    parameter: Any  # DeepSpeed hangs what it knows on the parameters themselves
    for name, parameter in named.items():
        if stage == 0:
            if engine.global_rank == 0:  # all workers hold the same
                yield Piece(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = torch.distributed.get_rank(parameter.ds_process_group) * count
            count = min(count, parameter.ds_numel - start)  # the last ones are padded
            if count > 0:
                yield Piece(name, start, count, optimizer.fp32_partitioned_groups_flat[group], offset)
        elif (found := parameter._hp_mapping) is not None:
            (flat,) = engine.basic_optimizer.param_groups[found.param_group_index]["params"]
            start, offset = found.lp_fragment_address.start, found.hp_fragment_address.start
            yield Piece(name, start, found.lp_fragment_address.numel, flat, offset)


def save(folder: Path, engine: Any, named: Mapping[str, nn.Parameter], facts: Mapping[str, Any]) -> None:
    """Write this worker's part of a checkpoint; the first worker's holds the facts as well.

    Args:
        folder: exists already.
        engine: of DeepSpeed, after at least one step.
        named: the trained parameters by name.
        facts: plain JSON for :attr:`Shards.facts`.
    """
    tensors: dict[str, Tensor] = {}
    for piece in pieces(engine, named):
        state = engine.basic_optimizer.state[piece.flat]
        for kind, tensor in ((WEIGHT, piece.flat), *((key, state[key]) for key in _AVERAGES)):
            tensors[f"{kind}/{piece.start}/{piece.name}"] = piece.of(tensor.detach()).float().cpu().clone()
    save_file(tensors, folder / f"worker-{engine.global_rank:05d}.safetensors")
    if engine.global_rank == 0:
        shapes = {name: list(getattr(one, "ds_shape", one.shape)) for name, one in named.items()}
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        scale = {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}
        state = {**facts, "shapes": shapes, "loss_scale": scale}
        (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")


class Shards:
    """A checkpoint that :func:`save` wrote, by however many workers.

    Args:
        folder: with the files of all of them.

    Raises:
        ResultError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        try:
            self._state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            for path in sorted(folder.glob("worker-*.safetensors")):
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118  # no mapping
                    kind, start, name = key.split("/", 2)
                    self._found.setdefault((kind, name), []).append((int(start), file, key))
        except (OSError, ValueError, SafetensorError) as error:
            raise ResultError(f"cannot read the checkpoint '{folder}': {str(error).splitlines()[0]}") from error

    @property
    def facts(self) -> dict[str, Any]:
        """What :func:`save` was given, and more."""
        return self._state

    @property
    def names(self) -> list[str]:
        """The parameters."""
        return list(self._state["shapes"])

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """The elements ``[start, start + count)`` (count,) of a parameter, or of one of its averages, in float32.

        Raises:
            ResultError: they are not all there.
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
        """A whole parameter in float32, in its shape."""
        shape = self._state["shapes"][name]
        return self.read(WEIGHT, name, 0, torch.Size(shape).numel()).reshape(shape)

    def restore(self, engine: Any, named: Mapping[str, nn.Parameter]) -> None:
        """Put weights, averages, step count and loss scale into an engine whose model has these weights already.

        Raises:
            ResultError: it is a checkpoint of other parameters.
        """
        if set(named) != set(self.names):
            raise ResultError(f"the checkpoint '{self._folder}' is of other parameters")
        optimizer, step = engine.basic_optimizer, float(self._state["updates"])
        for piece in pieces(engine, named) if engine.zero_optimization_stage() else _everything(named):
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


def _everything(named: Mapping[str, nn.Parameter]) -> Iterator[Piece]:
    return (Piece(name, 0, one.numel(), one, 0) for name, one in named.items())
