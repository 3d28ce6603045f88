"""Cloud's side of split fine-tuning: the middle of a model, trained from hidden states and gradients alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycloud.errors import LinkError
from raycloud.link.frames import Frame, parse_body
from raycloud.models.segments import Segment
from raycloud.split.finetune.activation_cache import ENTRY_BYTES, ActivationCache
from raycloud.split.finetune.bottleneck import LowRankEncoder, decoder_to_bytes, fit_low_rank, load_decoder_bytes
from raycloud.split.finetune.checkpoints import load_state, load_weights, state_of, trainable_parameters
from raycloud.split.finetune.messages import (
    BackwardReply,
    BackwardRequest,
    FitRequest,
    ForwardReply,
    ForwardRequest,
    HiddenStates,
    OptimiseReply,
    OptimiseRequest,
    TuneConfig,
    TuneKind,
)
from raycloud.split.finetune.tasks import pooled
from raycloud.split.finetune.wire_format import EncodedTensor
from raycloud.training.loop import Trainer
from raycloud.training.seeding import derive_seed, seeded

MAX_CALIBRATION_TOKENS = 2**15
"""Largest number of tokens to fit the second cut's bottleneck to; they are kept in memory until all have arrived."""


class OutOfOrder(LinkError):
    """Error of a message that does not follow the previous ones."""


@dataclass(frozen=True)
class _ForwardPass:
    """Micro-batch whose gradient has not arrived: its input as a leaf tensor, and its output."""

    numbers: Tensor
    out: Tensor


def valid_mask(lengths: Tensor) -> Tensor:
    """Mask (B, T) of the valid tokens of right-padded texts with lengths (B,)."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


class CloudTrainer:
    """Trainer of the blocks between the cuts and their ends of both bottlenecks.

    Args:
        middle: blocks [start_block, end_block).
        decoder: decoder of the first cut.
        encoder: encoder of the second cut.
        config: configuration of the run. Parameters that do not require gradients are not trained.
        others: other modules of this side, by the names under which their parameters are saved.
    """

    def __init__(
        self, middle: Segment, decoder: nn.Module, encoder: nn.Module, config: TuneConfig, **others: nn.Module
    ) -> None:
        self.middle, self.decoder, self.encoder, self.config = middle, decoder, encoder, config
        self.modules: dict[str, nn.Module] = {"middle": middle, "decoder": decoder, "encoder": encoder, **others}
        """Modules by the names under which their parameters are saved."""
        self.wire_formats, self.pooling = config.wire_formats, config.pooling
        self.trainer: Trainer | None = None
        """Trainer of all trainable parameters here; None if there are none."""
        if trainable_parameters(self.modules):
            self.trainer = Trainer(
                self.modules,
                config.training,
                total_steps=config.total_steps,
                seed=config.seed,
                lr=config.bottleneck_lrs(uplink="decoder", downlink="encoder"),
            )
        self._parts = {f"block {middle.lo + index}": block for index, block in enumerate(middle.blocks)}
        self._parts["decoder"] = decoder
        self.activation_cache = ActivationCache(self.wire_formats)
        self._passes: dict[int, _ForwardPass] = {}
        self._calibration: list[Tensor] = []
        self._non_finite = False
        self.step = 0

    def state(self) -> dict[str, Tensor]:
        """State of the cloud's side on which the next step depends."""
        return {**state_of(self.modules, self.trainer), **self.activation_cache.state()}

    def load(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Restore a result of :meth:`state` and continue with step ``step``.

        Raises:
            TrainingError: the state is of other parameters.
        """
        self.activation_cache.load(state)
        load_state(self.modules, self.trainer, state)
        self.step = step

    def load_round(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Continue with step ``step`` from a group's averaged weights, with this side's own optimiser state.

        Raises:
            TrainingError: the weights are of other parameters.
        """
        load_weights(self.modules, weights)
        self._passes.clear()
        self._non_finite = False
        self.step = step
        if self.trainer is not None:
            self.trainer.jump(step)

    def answer(self, request: Frame) -> Frame:
        """Process one request and return its reply.

        Raises:
            OutOfOrder: the request does not follow the previous ones.
            FrameError: the request does not fit its schema.
            ValueError: its numbers are too few, too many or not finite.
            ModelError: no bottleneck of the agreed size can be fitted.
        """
        started = time.perf_counter()
        match request.kind:
            case TuneKind.FWD:
                return self._forward(parse_body(request, ForwardRequest), request.raw, started)
            case TuneKind.BWD:
                return self._backward(parse_body(request, BackwardRequest), request.raw, started)
            case TuneKind.OPT:
                return self._optimise(parse_body(request, OptimiseRequest), started)
            case TuneKind.FIT:
                return self._fit(parse_body(request, FitRequest), request.raw)
            case TuneKind.CODE:
                return self._code(request.raw)
            case _:
                raise OutOfOrder(f"{request.kind.name} has no place within a step")

    def _fit(self, request: FitRequest, raw: bytes) -> Frame:
        """Collect hidden states for the second cut's bottleneck; after the last ones, fit it and return its decoder."""
        if not isinstance(self.encoder, LowRankEncoder) or self.step or self._passes:
            raise OutOfOrder(f"hidden states to fit a bottleneck to came in step {self.step}, or for a cut without one")
        coded = EncodedTensor(request.scale, raw)
        numbers = self.wire_formats.uplink.unpack(coded, sum(request.lengths)).to(self._device)
        with torch.no_grad(), self._mode(training=False):
            hidden = self._through(numbers, torch.tensor(request.lengths, device=self._device))
        if not bool(hidden.isfinite().all()):
            raise ValueError("the hidden states to fit a bottleneck to are not all finite")
        self._calibration.append(hidden[: MAX_CALIBRATION_TOKENS - sum(map(len, self._calibration))].cpu())
        if not request.last:
            return Frame(TuneKind.FIT_OK)
        wire_format = self.wire_formats.downlink
        hidden, self._calibration = torch.cat(self._calibration), []
        bottleneck = fit_low_rank(
            hidden,
            wire_format.width - wire_format.num_outliers,
            wire_format.num_outliers,
            rotate=wire_format.dtype == "int4",
        )
        self.encoder.load_state_dict(bottleneck.encoder.state_dict())
        return Frame(TuneKind.FIT_OK, raw=decoder_to_bytes(bottleneck.decoder))

    def _code(self, decoder: bytes) -> Frame:
        """Load the first cut's decoder."""
        load_decoder_bytes(self.decoder, decoder)
        return Frame(TuneKind.CODE_OK)

    def _forward(self, request: ForwardRequest, raw: bytes, started: float) -> Frame:
        if request.backward and (request.step != self.step or request.micro_batch in self._passes):
            place = f"step {request.step}, micro-batch {request.micro_batch}"
            raise OutOfOrder(f"hidden states of {place} came in step {self.step}")
        sample_indices, raw = self._split_announcement(request, raw) if request.training else ([], raw)
        coded = EncodedTensor(request.scale, raw)
        numbers = self.activation_cache.unpack("first", coded, sample_indices, request.lengths).to(self._device)
        numbers.requires_grad_(request.backward)
        lengths = torch.tensor(request.lengths, device=self._device)
        with torch.set_grad_enabled(request.backward), self._mode(request.training, request.step, request.micro_batch):
            out = self.encoder(self._through(numbers, lengths))
        if request.backward:
            self._passes[request.micro_batch] = _ForwardPass(numbers, out)
        counts = request.lengths if self.pooling == "none" else [1] * len(request.lengths)
        coded = self.activation_cache.pack("second", out, sample_indices, counts)
        reply = ForwardReply(scale=coded.scale, seconds=time.perf_counter() - started)
        return Frame.of(TuneKind.FWD_OK, reply, coded.payload)

    def _split_announcement(self, request: HiddenStates, raw: bytes) -> tuple[list[int], bytes]:
        """Split raw bytes into the indices of its texts, if deltas are sent, and the coded activations."""
        if not self.activation_cache.kept:
            return [], raw
        size = ENTRY_BYTES * len(request.lengths)
        return self.activation_cache.read_visits(raw[:size]), raw[size:]

    def _through(self, numbers: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states (n, d) at the second cut from codes (n, width) at the first; (B, d) if they are pooled."""
        valid = valid_mask(lengths)
        decoded = self.decoder(numbers)
        hidden = decoded.new_zeros(*valid.shape, decoded.shape[-1])
        hidden[valid] = decoded
        hidden = self.middle.hidden(hidden, valid=None if bool(valid.all()) else valid)
        return hidden[valid] if self.pooling == "none" else pooled(hidden, valid, self.pooling)

    def _backward(self, request: BackwardRequest, raw: bytes, started: float) -> Frame:
        found = self._passes.pop(request.micro_batch, None)
        if request.step != self.step or found is None:
            place = f"step {request.step}, micro-batch {request.micro_batch}"
            raise OutOfOrder(f"a gradient of {place} came in step {self.step}")
        coded = EncodedTensor(request.scale, raw)
        gradient = self.wire_formats.downlink.unpack(coded, len(found.out), stochastic=True).to(found.out)
        found.out.backward(gradient)
        coded = EncodedTensor(1.0, b"")
        if request.needs_gradient:
            coded = self._encode_gradient(found.numbers, request.step, request.micro_batch)
        reply = BackwardReply(scale=coded.scale, norm=self._norm(request.last), seconds=time.perf_counter() - started)
        return Frame.of(TuneKind.BWD_OK, reply, coded.payload)

    def _encode_gradient(self, numbers: Tensor, step: int, micro: int) -> EncodedTensor:
        """Encode the gradient of a micro-batch's codes at the first cut."""
        assert numbers.grad is not None
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, step, micro, "first"))
        # NaN and infinity must not be sent: the norm informs the edge, and both sides skip the step.
        self._non_finite |= not bool(numbers.grad.isfinite().all())
        return self.wire_formats.uplink.pack(numbers.grad.nan_to_num(0.0, 0.0, 0.0), generator)

    def _norm(self, last: bool) -> float:
        """Norm of the step's gradients after its last micro-batch, 0 before; infinite if any gradient is not finite."""
        norm = self.trainer.gradient_norm() if self.trainer is not None and last else 0.0
        return norm if math.isfinite(norm) and not self._non_finite else math.inf

    def _optimise(self, request: OptimiseRequest, started: float) -> Frame:
        if request.step != self.step or self._passes:
            raise OutOfOrder(f"the end of step {request.step} came in step {self.step}")
        if self.trainer is not None:
            self.trainer.apply(request.norm)
        self._non_finite = False
        self.step += 1
        return Frame.of(TuneKind.OPT_OK, OptimiseReply(step=self.step, seconds=time.perf_counter() - started))

    @contextmanager
    def _mode(self, training: bool, step: int = 0, micro: int = 0) -> Iterator[None]:
        """Switch dropout on or off as the edge requests, with masks that are a function of the micro-batch."""
        for module in self.modules.values():
            module.train(training)
        with seeded(self._parts, self.config.seed, step, micro) if training else nullcontext():
            yield

    @property
    def _device(self) -> torch.device:
        return next(self.middle.parameters()).device
