"""Calibration: codecs fitted to a model's hidden states at its cuts, in one file that edge and cloud both have."""

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

from raycloud.data.batches import Sample, length_sorted_batches
from raycloud.durable import write_atomically
from raycloud.errors import DataError, LinkSetupError, ModelError
from raycloud.link.codecs.cut_codec import CutCodec, float_cut_codec
from raycloud.link.codecs.fitting import FITTED, CutFit, FitChoices, fit_cut, random_rotation
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.sizes import MOST_FIRST
from raycloud.link.codecs.transforms import Rotate
from raycloud.models.segments import Segment
from raycloud.models.structure import blocks_of
from raycloud.models.weights import fingerprint, weights_of

CALIBRATION_TOKENS = 8192
"""Number of tokens that suffices for a calibration."""

_BATCH = 16
_MIN_TOKENS = 64
_SINK_RATIO = 2.0
"""Factor by which hidden states at an attention-sink position are larger in norm than others."""


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    model: str
    cuts: dict[Annotated[int, Field(ge=0)], FitChoices]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibrated codecs of a model's cuts.

    Args:
        model: fingerprint of the weights that were calibrated.
        rotation: rotation of int4, shared by all cuts.
        fitted: fitted codecs by cut.
    """

    model: str
    rotation: Rotate
    fitted: dict[int, CutFit]

    @property
    def cuts(self) -> tuple[int, ...]:
        """Calibrated cuts, ascending."""
        return tuple(sorted(self.fitted))

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return self.rotation.size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the coded bytes; it must be equal at both ends of a link."""
        digest = hashlib.sha256(self._header().model_dump_json().encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def cut_codec(self, codec: str, cut: int) -> CutCodec:
        """Codec of one cut.

        Raises:
            LinkSetupError: the codec is unknown or the cut is not calibrated.
        """
        if codec in CODECS:
            return float_cut_codec(codec, self.width)
        name = next((known for known in FITTED if known == codec), None)
        if name is None:
            raise LinkSetupError(f"no codec '{codec}'; there are: {', '.join((*CODECS, *FITTED))}")
        if cut not in self.fitted:
            raise LinkSetupError(f"cut {cut} is not calibrated; this calibration has: {', '.join(map(str, self.cuts))}")
        fitted = self.fitted[cut]
        return CutCodec(fitted.codec(name, self.rotation), self.width, fitted.choices.first)

    def check(self, width: int, cuts: Iterable[int]) -> Calibration:
        """Return this calibration after checking that it is for hidden states of this width and has these cuts.

        Raises:
            LinkSetupError: the width differs or a cut is missing.
        """
        if width != self.width:
            raise LinkSetupError(
                f"the calibration is for hidden states of {self.width} numbers, the model's have {width}"
            )
        for cut in sorted(cuts):
            self.cut_codec(FITTED[0], cut)
        return self

    def save(self, path: str | Path) -> None:
        """Write the calibration to a file, atomically."""
        where = Path(path).expanduser()
        metadata = {"calibration": self._header().model_dump_json(), "fingerprint": self.fingerprint}
        write_atomically(where, safetensors.torch.save(self._tensors(), metadata))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that :meth:`save` wrote.

        Raises:
            ModelError: there is no such file, or it is damaged or no calibration.
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
            for name in ("mean", "outliers", "levels"):
                tensors[f"{cut}.{name}"] = getattr(fitted, name)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def _build(cls, header: _Header, tensors: dict[str, Tensor]) -> Calibration:
        fitted = {
            cut: CutFit(choices, *(tensors[f"{cut}.{name}"] for name in ("mean", "outliers", "levels")))
            for cut, choices in header.cuts.items()
        }
        found = cls(header.model, Rotate(tensors["left"], tensors["right"]), fitted)
        if not fitted or {len(one.mean) for one in fitted.values()} != {found.width}:
            raise ValueError("its cuts do not have hidden states of one width")
        return found


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    texts: Sequence[Sample],
    cuts: Iterable[int],
    *,
    progress: Callable[[int], Any] = lambda done: None,
) -> Calibration:
    """Run texts through a model and fit codecs to its hidden states at each cut.

    Args:
        model: model on any device, in any dtype.
        texts: token ids of whole texts from their first token on; see
            :func:`raycloud.split.calibration_texts.load_calibration_texts`.
        cuts: cuts from 0 (hidden states entering the first block) to L (those entering the final norm).
        progress: called with the number of cuts done.

    Raises:
        ModelError: the model has no such cut, or its hidden states there are not finite.
        DataError: there is too little text.
    """
    wanted, blocks = sorted(set(cuts)), len(blocks_of(model))
    for cut in wanted:
        if not 0 <= cut <= blocks:
            raise ModelError(f"cut {cut} is not in this model; allowed: 0 to {blocks}")
    width = int(model.config.hidden_size)
    batches = [batch.to(model.device) for batch in length_sorted_batches(texts, _BATCH, pad=0)]
    running = [batch.ids for batch in batches]
    rotation, fitted, before = random_rotation(width), dict[int, CutFit](), 0
    for done, cut in enumerate(wanted):
        progress(done)
        part = Segment(model, before, cut, embed=not fitted, head=False)
        running = [part.hidden(hidden, valid=batch.valid) for hidden, batch in zip(running, batches, strict=True)]
        before = cut
        hidden = torch.cat([states[batch.valid] for states, batch in zip(running, batches, strict=True)]).cpu().float()
        positions = torch.cat([torch.arange(int(n)) for batch in batches for n in batch.valid.sum(dim=1)])
        if not bool(hidden.isfinite().all()):
            raise ModelError(f"the hidden states at cut {cut} are not all finite; load it in float32 or bfloat16")
        if int((positions >= MOST_FIRST).sum()) < _MIN_TOKENS:
            raise DataError(f"too little text to calibrate on: need {_MIN_TOKENS} tokens beyond the first of a text")
        first = num_sink_positions(hidden, positions)
        fitted[cut] = fit_cut(hidden[positions >= first], first, rotation)
    progress(len(wanted))
    return Calibration(fingerprint(weights_of(model)), rotation, fitted)


def num_sink_positions(hidden: Tensor, positions: Tensor) -> int:
    """Number of first positions of a text that are attention sinks (hidden states of large norm), from one to four.

    Args:
        hidden: hidden states (n, d).
        positions: (n,) positions of the tokens in their texts.
    """
    lengths = hidden.norm(dim=1)
    usual = lengths[positions >= MOST_FIRST].median()
    sinks = [at for at in range(1, MOST_FIRST) if bool(lengths[positions == at].median() > _SINK_RATIO * usual)]
    return max(sinks, default=0) + 1
