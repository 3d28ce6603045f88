"""Calibration: codecs fitted to the rows that a model has at its cuts, as one file that edge and cloud both hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.data.batches import Sample, in_length_order
from raycloud.errors import DataError, LinkError, ModelError
from raycloud.link.codecs.boundary import Boundary, plain_boundary
from raycloud.link.codecs.fitting import FITTED, Choices, Fitted, fit, rotation_of
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.transforms import Rotate
from raycloud.models.anatomy import blocks_of
from raycloud.models.segments import Segment
from raycloud.models.weights import fingerprint, weights_of
from raycloud.results import write_atomically

TOKENS = 8192
"""Enough text to calibrate on."""

_BATCH = 16
_FIRST_AT_MOST = 4
_ROWS_AT_LEAST = 64
_SINK = 2.0
"""A position whose rows are so many times longer than others' is one where attention parks itself."""


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    cuts: dict[Annotated[int, Field(ge=0)], Choices]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The codecs of a model's cuts.

    Args:
        model: fingerprint of the weights it was made with.
        rotation: of int4, shared by all cuts.
        fitted: by cut.
    """

    model: str
    rotation: Rotate
    fitted: dict[int, Fitted]

    @property
    def cuts(self) -> tuple[int, ...]:
        """The calibrated cuts, ascending."""
        return tuple(sorted(self.fitted))

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.rotation.size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what crosses the link; equal on both ends of one."""
        digest = hashlib.sha256(self._header().model_dump_json().encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def boundary(self, codec: str, cut: int) -> Boundary:
        """The code of one cut.

        Raises:
            LinkError: the codec is unknown or the cut not calibrated.
        """
        if codec in CODECS:
            return plain_boundary(codec, self.width)
        name = next((known for known in FITTED if known == codec), None)
        if name is None:
            raise LinkError(f"no codec '{codec}'; there are: {', '.join((*CODECS, *FITTED))}")
        if cut not in self.fitted:
            raise LinkError(f"cut {cut} is not calibrated; this calibration has: {', '.join(map(str, self.cuts))}")
        fitted = self.fitted[cut]
        return Boundary(fitted.codec(name, self.rotation), self.width, fitted.choices.first)

    def check(self, width: int, cuts: Iterable[int]) -> Calibration:
        """This calibration, if it is for rows of this width and has these cuts.

        Raises:
            LinkError: it is not or has not.
        """
        if width != self.width:
            raise LinkError(f"the calibration is for rows of {self.width} numbers, the model's have {width}")
        for cut in sorted(cuts):
            self.boundary(FITTED[0], cut)
        return self

    def save(self, path: str | Path) -> None:
        """Write the file as a whole or not at all."""
        where = Path(path).expanduser()
        metadata = {"calibration": self._header().model_dump_json(), "fingerprint": self.fingerprint}
        write_atomically(where, safetensors.torch.save(self._tensors(), metadata))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that :meth:`save` wrote.

        Raises:
            ModelError: there is none, or it is damaged or something else.
        """
        where = Path(path).expanduser()
        if not where.is_file():
            raise ModelError(f"no calibration file at '{path}'; 'raycloud split calibrate' makes one")
        try:
            with safe_open(where, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            found = cls._build(_Header.model_validate_json(metadata["calibration"]), tensors)
            if found.fingerprint != metadata["fingerprint"]:
                raise ValueError("its contents do not match its fingerprint")
        except (SafetensorError, ValidationError, ValueError, TypeError, KeyError) as error:
            why = str(error).splitlines()[0] if not isinstance(error, KeyError) else f"it holds no {error}"
            raise ModelError(f"'{path}' is damaged or no calibration file: {why}") from error
        return found

    def _header(self) -> _Header:
        return _Header(model=self.model, cuts={cut: self.fitted[cut].choices for cut in self.cuts})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"left": self.rotation.left, "right": self.rotation.right}
        for cut, fitted in self.fitted.items():
            for name in ("mean", "outliers", "levels", "basis"):
                tensors[f"{cut}.{name}"] = getattr(fitted, name)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def _build(cls, header: _Header, tensors: dict[str, Tensor]) -> Calibration:
        fitted = {
            cut: Fitted(choices, *(tensors[f"{cut}.{name}"] for name in ("mean", "outliers", "levels", "basis")))
            for cut, choices in header.cuts.items()
        }
        found = cls(header.model, Rotate(tensors["left"], tensors["right"]), fitted)
        if not fitted or {len(one.mean) for one in fitted.values()} != {found.width}:
            raise ValueError("its cuts do not have rows of one width")
        return found


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    texts: Sequence[Sample],
    cuts: Iterable[int],
    *,
    rank: int | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> Calibration:
    """Run texts through a model and fit codecs to its rows at each cut.

    Args:
        model: on any device, in any dtype.
        texts: token ids, whole texts from their first token on; see :func:`raycloud.split.passages.passages`.
        cuts: from 0, the rows entering the first block, to L, those entering the final norm.
        rank: of the low-rank codecs; half the width if None.
        progress: told the number of cuts done.

    Raises:
        ModelError: the model has no such cut, or rows there that are not finite.
        DataError: there is too little text.
    """
    wanted, blocks = sorted(set(cuts)), len(blocks_of(model))
    for cut in wanted:
        if not 0 <= cut <= blocks:
            raise ModelError(f"cut {cut} is not in this model; allowed: 0 to {blocks}")
    width = int(model.config.hidden_size)
    if rank is not None and not 1 <= rank <= width:
        raise ModelError(f"rank must be from 1 to the width of rows, {width}, got {rank}")
    batches = [batch.to(model.device) for batch in in_length_order(texts, _BATCH, pad=0)]
    running = [batch.ids for batch in batches]
    rotation, fitted, before = rotation_of(width), dict[int, Fitted](), 0
    for done, cut in enumerate(wanted):
        progress(done)
        part = Segment(model, before, cut, embed=not fitted, head=False)
        running = [part.rows(rows, valid=batch.valid) for rows, batch in zip(running, batches, strict=True)]
        before = cut
        rows = torch.cat([rows[batch.valid] for rows, batch in zip(running, batches, strict=True)]).cpu().float()
        positions = torch.cat([torch.arange(int(n)) for batch in batches for n in batch.valid.sum(dim=1)])
        if not bool(rows.isfinite().all()):
            raise ModelError(f"the model's rows at cut {cut} are not all finite; load it in float32 or bfloat16")
        if int((positions >= _FIRST_AT_MOST).sum()) < _ROWS_AT_LEAST:
            raise DataError(f"too little text to calibrate on: need {_ROWS_AT_LEAST} tokens beyond the first of a text")
        first = leading_sinks(rows, positions)
        fitted[cut] = fit(rows[positions >= first], first, rotation, rank or max(1, width // 2))
    progress(len(wanted))
    return Calibration(fingerprint(weights_of(model)), rotation, fitted)


def leading_sinks(rows: Tensor, positions: Tensor) -> int:
    """How many of a text's first positions have rows unlike all others; at least one, at most four.

    Args:
        rows: (n, d).
        positions: (n,) where they stand in their texts.
    """
    lengths = rows.norm(dim=1)
    usual = lengths[positions >= _FIRST_AT_MOST].median()
    sinks = [at for at in range(1, _FIRST_AT_MOST) if bool(lengths[positions == at].median() > _SINK * usual)]
    return max(sinks, default=0) + 1
