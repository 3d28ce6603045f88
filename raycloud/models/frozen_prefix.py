"""Forward of a model that begins at one of its blocks: what the blocks before it hand on is recorded once and given.

Frozen blocks at the front of a model compute the same in every step of a training, so their outputs are kept. The
model's own forward runs, with stand-ins for the blocks, so any model with a list of blocks can be trained so: of texts
or of images, with task heads, with stages, and with an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.block_trace import tensors_in, without_cache
from raycloud.models.chain import block_list_of
from raycloud.models.shell import StandIn, replace_module, shell_of


class _Stop(Exception):
    """End of a recorded forward."""


@dataclass(frozen=True)
class Boundary:
    """Outputs of the blocks of a prefix that the rest of their model reads, for some samples."""

    outputs: Mapping[str, Any]
    """Outputs of blocks by path, detached."""
    samples: int

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the outputs."""
        return tensors_in(list(self.outputs.values()))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(one.nbytes for one in self.tensors)

    def select(self, rows: Tensor) -> Boundary:
        """Boundary of some of the samples, given by their numbers."""
        outputs = {path: _mapped(output, lambda one: self._rows(one, rows)) for path, output in self.outputs.items()}
        return Boundary(outputs, len(rows))

    def _rows(self, tensor: Tensor, rows: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] % self.samples or tensor.shape[0] < self.samples:
            return tensor  # equal for all samples, such as position biases
        each = tensor.shape[0] // self.samples
        taken = tensor if each == 1 else tensor.view(self.samples, each, *tensor.shape[1:])
        return taken[rows].reshape(len(rows) * each, *tensor.shape[1:])

    @staticmethod
    def cat(parts: Sequence[Boundary]) -> Boundary:
        """Boundary of all samples of several, which have equal shapes."""
        first = parts[0]
        outputs = {path: _joined([one.outputs[path] for one in parts], parts) for path in first.outputs}
        return Boundary(outputs, sum(one.samples for one in parts))


@dataclass
class _Call:
    """Current forward of a prefix."""

    given: Boundary | None = None
    found: dict[str, Any] = field(default_factory=dict)


class FrozenPrefix:
    """Blocks of a model before block ``start``, whose outputs are recorded once.

    Neither the model nor its blocks are copied. Nothing random may happen in the prefix: it holds in evaluation mode.

    Args:
        model: model with a list of blocks.
        start: number of the first block that is not in the prefix, from 0 to the number of blocks.
    """

    def __init__(self, model: PreTrainedModel, start: int) -> None:
        blocks = block_list_of(model).blocks
        if not 0 <= start <= len(blocks):
            raise ValueError(f"a prefix ends at block 0 to {len(blocks)}, not {start}")
        self.start, self.call = start, _Call()
        self.tuple_sizes: dict[str, int] = {}
        """0 for a block that returns its hidden states, otherwise the size of its tuple; by path."""
        # Keys and values that nobody reads again are not kept.
        self._arguments = without_cache(model)
        self._model, self._kept = model, _handed_on(model, list(blocks), start)
        self._recorder, self._rest = shell_of(model), shell_of(model)
        for index, (path, block) in enumerate(list(blocks.items())[:start]):
            replace_module(self._recorder, path, _Recorded(self, path, block, index == start - 1))
            replace_module(self._rest, path, _Given(self, path, block))

    def record(self, inputs: Mapping[str, Tensor]) -> Boundary:
        """Run the stem and the prefix, without gradients.

        Args:
            inputs: arguments of the model's forward, with the samples in their first dimension.
        """
        samples = len(next(iter(inputs.values())))
        if not self.start:
            return Boundary({}, samples)
        self.call = _Call()
        with torch.no_grad(), suppress(_Stop):
            self._recorder(**inputs, **self._arguments)
        found = self.call.found
        self.tuple_sizes = {path: len(one) if isinstance(one, tuple) else 0 for path, one in found.items()}
        return Boundary({path: found[path] for path in self._kept}, samples)

    def run(self, boundary: Boundary | None, inputs: Mapping[str, Tensor]) -> Any:
        """Run what follows the prefix.

        The stem runs too, as masks and positions are made there.

        Args:
            boundary: result of :meth:`record` for these samples; None runs the whole model.
            inputs: arguments of the model's forward.

        Returns:
            Output of the model.
        """
        if boundary is None or not self.start:
            return self._model(**inputs, **self._arguments)
        self.call = _Call(given=boundary)
        return self._rest(**inputs, **self._arguments)


class _Recorded(nn.Module):
    """Block whose outputs are recorded."""

    def __init__(self, prefix: FrozenPrefix, path: str, block: nn.Module, last: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_held", (prefix, path, block, last))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][2], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prefix, path, block, last = self.__dict__["_held"]
        output = block(*args, **kwargs)
        prefix.call.found[path] = output
        if last:
            raise _Stop
        return output


class _Given(StandIn):
    """Stand-in for a block of a prefix: it returns what was recorded of it, or hands on what it is given."""

    def __init__(self, prefix: FrozenPrefix, path: str, block: nn.Module) -> None:
        super().__init__(block)
        object.__setattr__(self, "_prefix", prefix)
        self._path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prefix: FrozenPrefix = self.__dict__["_prefix"]
        given = prefix.call.given
        assert given is not None
        if (known := given.outputs.get(self._path)) is not None:
            return known
        # Nobody reads it: a later block of the prefix replaces it.
        hidden = args[0] if args else kwargs["hidden_states"]
        size = prefix.tuple_sizes[self._path]
        return (hidden, *[None] * (size - 1)) if size else hidden


def _handed_on(model: PreTrainedModel, paths: Sequence[str], start: int) -> list[str]:
    """Paths of the blocks before ``start`` that something behind the prefix reads: the last one, and with an encoder
    the last one of each list."""
    lists = [path.rpartition(".")[0] for path in paths]
    two = bool(getattr(model.config, "is_encoder_decoder", False))
    return [paths[index] for index in range(start) if index == start - 1 or (two and lists[index] != lists[index + 1])]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(one, change) for one in value) if type(value) in (tuple, list) else value


def _joined(values: Sequence[Any], parts: Sequence[Boundary]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        shared = not first.dim() or first.shape[0] % parts[0].samples or first.shape[0] < parts[0].samples
        return first if shared else torch.cat(list(values))
    if type(first) in (tuple, list):
        return type(first)(_joined(inner, parts) for inner in zip(*values, strict=True))
    return first
