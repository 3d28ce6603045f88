"""The cloud's side of split fine-tuning: the middle of a model that learns from rows and gradients alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycloud.errors import LinkError
from raycloud.link.frames import Frame, Kind, split_off, with_bytes
from raycloud.models.segments import Segment
from raycloud.split.finetune.code import Encoder, load_decoder, narrow, tensors_of
from raycloud.split.finetune.memory import ENTRY_BYTES, Memory
from raycloud.split.finetune.messages import (
    PIECE_BYTES,
    Backward,
    Backwarded,
    Fit,
    Fitted,
    Forward,
    Forwarded,
    Optimise,
    Optimised,
    Piece,
    Rows,
)
from raycloud.split.finetune.numbers import Coded, Packings
from raycloud.split.finetune.state import load_state, put, state_of
from raycloud.split.finetune.tasks import Pooling, pooled
from raycloud.training.draws import drawing, seed_of
from raycloud.training.loop import Trainer

CALIBRATION_ROWS = 2**15
"""That the second cut's code is fitted to, at most: they are kept until all are there."""


class OutOfStep(LinkError):
    """A message that does not follow on those before it."""


@dataclass(frozen=True)
class _Pass:
    """A micro-batch whose gradient is not there yet: the leaf its rows came in by, and what went out."""

    numbers: Tensor
    out: Tensor


def valid_of(lengths: Tensor) -> Tensor:
    """Which tokens (B, T) texts of some lengths (B,) have when they are padded on the right."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


class CloudSide:
    """The blocks between the cuts with their ends of both codes, and the optimiser of what of them is trained.

    Args:
        middle: blocks [first, second).
        decoder: of the first cut.
        encoder: of the second one.
        packings: of both.
        pooling: what of a text's rows leaves the second cut.
        trainer: of everything here that learns; None if nothing does.
        seed: of dropout and of rounding, the edge's.
    """

    def __init__(
        self,
        middle: Segment,
        decoder: nn.Module,
        encoder: nn.Module,
        packings: Packings,
        pooling: Pooling,
        trainer: Trainer | None,
        seed: int,
    ) -> None:
        self.middle, self.decoder, self.encoder = middle, decoder, encoder
        self.packings, self.pooling, self.trainer, self.seed = packings, pooling, trainer, seed
        self._parts = {f"block {middle.lo + place}": block for place, block in enumerate(middle.blocks)}
        self._parts["decoder"] = decoder
        self.memory = Memory(packings)
        self._passes: dict[int, _Pass] = {}
        self._calibration: list[Tensor] = []
        self._brought = bytearray()
        self._fitted = b""
        self._spoiled = False
        self.step = 0

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By the names that their parameters are saved under."""
        return {"middle": self.middle, "decoder": self.decoder, "encoder": self.encoder}

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, but for the edge's side of it."""
        return {**state_of(self.modules, self.trainer), **self.memory.state()}

    def load(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Go on with a step where :meth:`state` was taken.

        Raises:
            TrainingError: it is of other parameters.
        """
        self.memory.load(state)
        load_state(self.modules, self.trainer, state)
        self.step = step

    def join(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Go on with a step from weights that a group has made of its members', the optimiser's state its own.

        Raises:
            TrainingError: they are of other parameters.
        """
        put(self.modules, weights)
        self._passes.clear()
        self._spoiled = False
        self.step = step
        if self.trainer is not None:
            self.trainer.jump(step)

    def answer(self, request: Frame) -> Frame:
        """What one message leads to.

        Raises:
            OutOfStep: it does not follow on those before it.
            FrameError: it does not fit its schema.
            ValueError: its numbers are too few, too many or not finite.
            ModelError: no code of the agreed size can be fitted.
        """
        started = time.perf_counter()
        match request.kind:
            case Kind.FWD:
                return self._forward(*split_off(request, Forward), started)
            case Kind.BWD:
                return self._backward(*split_off(request, Backward), started)
            case Kind.OPT:
                return self._optimise(split_off(request, Optimise)[0], started)
            case Kind.FIT:
                return self._fit(*split_off(request, Fit))
            case Kind.CODE:
                return self._code(*split_off(request, Piece))
            case _:
                raise OutOfStep(f"{request.kind.name} has no place within a step")

    def _fit(self, asked: Fit, payload: bytes) -> Frame:
        """Rows that the second cut's code is to be fitted to; after the last of them, its decoder."""
        if not isinstance(self.encoder, Encoder) or self.step or self._passes:
            raise OutOfStep(f"rows to fit a code to came in step {self.step}, or to a cut that has none")
        numbers = self.packings.first.unpack(Coded(asked.unit, payload), sum(asked.lengths)).to(self._device)
        with torch.no_grad(), self._mode(training=False):
            rows = self._through(numbers, torch.tensor(asked.lengths, device=self._device))
        if not bool(rows.isfinite().all()):
            raise ValueError("the rows to fit a code to are not all finite")
        self._calibration.append(rows[: CALIBRATION_ROWS - sum(map(len, self._calibration))].cpu())
        if not asked.last:
            return with_bytes(Kind.FIT_OK, Fitted())
        packing = self.packings.second
        rows, self._calibration = torch.cat(self._calibration), []
        code = narrow(rows, packing.width - packing.apart, packing.apart, even=packing.form == "int4")
        self.encoder.load_state_dict(code.encoder.state_dict())
        self._fitted = tensors_of(code.decoder)
        return with_bytes(Kind.FIT_OK, Fitted())

    def _code(self, asked: Piece, raw: bytes) -> Frame:
        """A piece of the first cut's decoder for this side, or of the second one's for the edge."""
        if not asked.up:
            told = asked.model_copy(update={"size": len(self._fitted)})
            return with_bytes(Kind.CODE_OK, told, self._fitted[asked.at : asked.at + PIECE_BYTES])
        wanted = len(tensors_of(self.decoder))
        if asked.at != len(self._brought) or asked.size != wanted or asked.at + len(raw) > wanted:
            raise ValueError(
                f"bytes {asked.at} to {asked.at + len(raw)} of {asked.size} of a decoder came where "
                f"those from {len(self._brought)} to {wanted} at most are wanted"
            )
        self._brought += raw
        if len(self._brought) == wanted:
            load_decoder(self.decoder, bytes(self._brought))
            self._brought.clear()
        return with_bytes(Kind.CODE_OK, asked)

    def _forward(self, asked: Forward, payload: bytes, started: float) -> Frame:
        if asked.returns and (asked.step != self.step or asked.micro in self._passes):
            raise OutOfStep(f"rows of step {asked.step}, micro-batch {asked.micro} came in step {self.step}")
        places, payload = self._which(asked, payload) if asked.training else ([], payload)
        coded = Coded(asked.unit, payload)
        numbers = self.memory.unpack("first", coded, places, asked.lengths).to(self._device)
        numbers.requires_grad_(asked.returns)
        lengths = torch.tensor(asked.lengths, device=self._device)
        with torch.set_grad_enabled(asked.returns), self._mode(asked.training, asked.step, asked.micro):
            out = self.encoder(self._through(numbers, lengths))
        if asked.returns:
            self._passes[asked.micro] = _Pass(numbers, out)
        rows = asked.lengths if self.pooling == "rows" else [1] * len(asked.lengths)
        coded = self.memory.pack("second", out, places, rows)
        told = Forwarded(unit=coded.unit, seconds=time.perf_counter() - started)
        return with_bytes(Kind.FWD_OK, told, coded.payload, rows=len(out))

    def _which(self, asked: Rows, payload: bytes) -> tuple[list[int], bytes]:
        """Which texts are visited again, where changes cross, and the coded numbers."""
        if not self.memory.kept:
            return [], payload
        size = ENTRY_BYTES * len(asked.lengths)
        return self.memory.heard(payload[:size]), payload[size:]

    def _through(self, numbers: Tensor, lengths: Tensor) -> Tensor:
        """Rows (n, d) at the second cut, of numbers (n, width) at the first one."""
        valid = valid_of(lengths)
        decoded = self.decoder(numbers)
        rows = decoded.new_zeros(*valid.shape, decoded.shape[-1])
        rows[valid] = decoded
        rows = self.middle.rows(rows, valid=None if bool(valid.all()) else valid)
        return rows[valid] if self.pooling == "rows" else pooled(rows, valid, self.pooling)

    def _backward(self, asked: Backward, payload: bytes, started: float) -> Frame:
        found = self._passes.pop(asked.micro, None)
        if asked.step != self.step or found is None:
            raise OutOfStep(f"a gradient of step {asked.step}, micro-batch {asked.micro} came in step {self.step}")
        coded = Coded(asked.unit, payload)
        gradient = self.packings.second.unpack(coded, len(found.out), by_chance=True).to(found.out)
        found.out.backward(gradient)
        rows, coded = 0, Coded(1.0, b"")
        if asked.back:
            rows, coded = len(found.numbers), self._gradient(found.numbers, asked.step, asked.micro)
        told = Backwarded(unit=coded.unit, norm=self._norm(asked.last), seconds=time.perf_counter() - started)
        return with_bytes(Kind.BWD_OK, told, coded.payload, rows=rows)

    def _gradient(self, numbers: Tensor, step: int, micro: int) -> Coded:
        """That of a micro-batch's numbers at the first cut, as it crosses."""
        assert numbers.grad is not None
        chance = torch.Generator().manual_seed(seed_of(self.seed, step, micro, "first"))
        # What is no number must not cross: the edge is told by the norm, and both sides skip the step.
        self._spoiled |= not bool(numbers.grad.isfinite().all())
        return self.packings.first.pack(numbers.grad.nan_to_num(0.0, 0.0, 0.0), chance)

    def _norm(self, last: bool) -> float:
        """Of the gradients so far, behind a step's last micro-batch; infinite if anything is not finite."""
        norm = self.trainer.gradient_norm() if self.trainer is not None and last else 0.0
        return norm if math.isfinite(norm) and not self._spoiled else math.inf

    def _optimise(self, asked: Optimise, started: float) -> Frame:
        if asked.step != self.step or self._passes:
            raise OutOfStep(f"the end of step {asked.step} came in step {self.step}")
        if self.trainer is not None:
            self.trainer.apply(asked.norm)
        self._spoiled = False
        self.step += 1
        return with_bytes(Kind.OPT_OK, Optimised(step=self.step, seconds=time.perf_counter() - started))

    @contextmanager
    def _mode(self, training: bool, step: int = 0, micro: int = 0) -> Iterator[None]:
        """Dropout on or off as the edge says, with masks that are a function of the micro-batch."""
        for module in self.modules.values():
            module.train(training)
        with drawing(self._parts, self.seed, step, micro) if training else nullcontext():
            yield

    @property
    def _device(self) -> torch.device:
        return next(self.middle.parameters()).device
