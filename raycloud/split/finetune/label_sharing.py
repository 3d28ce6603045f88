"""Label-sharing topology: the cloud has the last part, the head and the loss, and so receives the labels.

A micro-batch takes one round trip instead of two, and there is no second cut. The cost is privacy: the cloud reads
every text's label and the model's outputs for it. The topology must be enabled at both sides.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from raycloud.data.batches import IGNORE, Batch
from raycloud.link.frames import Frame, parse_body
from raycloud.models.segments import Segment
from raycloud.split.finetune.cloud import CloudTrainer, OutOfOrder, valid_mask
from raycloud.split.finetune.edge_trainer import (
    EdgeTrainer,
    PendingMicroBatch,
    TrainableParts,
    invalid_reply_error,
    token_counts,
)
from raycloud.split.finetune.messages import (
    HiddenStates,
    PredictReply,
    PredictRequest,
    TrainReply,
    TrainRequest,
    TuneConfig,
    TuneKind,
)
from raycloud.split.finetune.tasks import HeadConfig, Task, head_outputs
from raycloud.split.finetune.traffic import LABEL_BYTES, label_sharing_traffic
from raycloud.split.finetune.wire_format import EncodedTensor
from raycloud.training.loop import LossSums

WARNING = (
    "labels=cloud: the cloud is sent the label of every training text and computes the head's outputs for every text. "
    "labels=edge keeps both at the edge"
)


def _head_of(config: TuneConfig) -> HeadConfig:
    if config.head is None:
        raise ValueError("head: None, and the cloud is to have the head; allowed: its configuration")
    return config.head


def _pack(labels: Tensor, head: HeadConfig) -> bytes:
    return labels.cpu().numpy().astype(_dtype(head)).tobytes()


def _unpack(raw: bytes, head: HeadConfig, texts: int) -> Tensor:
    labels = torch.from_numpy(np.frombuffer(raw, _dtype(head)).copy())
    if len(labels) != texts * head.labels:
        raise ValueError(f"{len(labels)} labels came for {texts} texts of {head.labels}")
    if labels.is_floating_point():
        return labels
    return labels.long() if head.labels == 1 else labels.long().reshape(texts, head.labels)


def _dtype(head: HeadConfig) -> np.dtype:
    return np.dtype("<f4" if head.kind == "regression" else "<i4")


class LabelSharingEdge(EdgeTrainer):
    """Edge of the label-sharing topology: texts, and the part of the model before the cut.

    The arguments are those of :class:`~raycloud.split.finetune.edge_trainer.EdgeTrainer`.
    """

    @property
    def _head(self) -> HeadConfig:
        return _head_of(self.config)

    @property
    def _needs_backward(self) -> bool:
        return False

    def fit(self, batches: Sequence[Batch]) -> None:
        """Do nothing: there is no second cut."""

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Outputs of the cloud's head for a batch, without dropout."""
        numbers = self._bottleneck_input(batch, 0, training=False)
        coded, _ = self._encode(numbers, batch, training=False)
        request = PredictRequest(lengths=token_counts(batch), scale=coded.scale)
        self.cloud.send(Frame.of(TuneKind.PREDICT, request, coded.payload))
        answer = self._receive()
        reply = parse_body(answer, PredictReply)
        self.clock.cloud += reply.seconds
        if reply.shape[0] != len(batch.ids) or len(answer.raw) != 4 * prod(reply.shape):
            raise invalid_reply_error(
                ValueError(f"{len(answer.raw)} bytes are not {reply.shape} of {len(batch.ids)} texts")
            )
        return torch.frombuffer(bytearray(answer.raw), dtype=torch.float32).reshape(reply.shape).to(batch.ids.device)

    def traffic(
        self, step: int, micros: Sequence[Sequence[int]], trainable: TrainableParts | None = None
    ) -> Counter[str]:
        """Bytes of a step, by kind of message."""
        return label_sharing_traffic(step, micros, self.wire_formats, self._head.labels)

    def _request(self, micro: PendingMicroBatch, targets: int) -> Frame:
        batch = micro.batch
        coded, which = self._encode(micro.numbers, batch, training=True)
        request = TrainRequest(
            step=self.trainer.step_index,
            micro_batch=micro.number,
            last=micro.last,
            targets=targets,
            lengths=token_counts(batch),
            scale=coded.scale,
        )
        return Frame.of(TuneKind.TRAIN, request, _pack(batch.labels, self._head) + which + coded.payload)

    def _on_reply(self, micro: PendingMicroBatch, answer: Frame, sums: LossSums) -> bool:
        reply = parse_body(answer, TrainReply)
        sums.total += reply.loss
        self._end(micro, reply, answer.raw)
        return False


class LabelSharingCloud(CloudTrainer):
    """Cloud of the label-sharing topology: everything after the cut, with head, loss and labels.

    Args:
        middle: blocks [start_block, L).
        decoder: decoder of the cut.
        last: segment after the blocks.
        task: head and loss, see :meth:`~raycloud.split.finetune.tasks.HeadConfig.task`.
        config: configuration of the run with a head; its pooling is that between the blocks and ``last``.
    """

    def __init__(self, middle: Segment, decoder: nn.Module, last: Segment, task: Task, config: TuneConfig) -> None:
        super().__init__(middle, decoder, nn.Identity(), config, last=last, head=task.head)
        self.last, self.task, self._head = last, task, _head_of(config)
        self._parts["head"] = task.head

    def answer(self, request: Frame) -> Frame:
        """Process one request and return its reply; see :meth:`~raycloud.split.finetune.cloud.CloudTrainer.answer`."""
        started = time.perf_counter()
        match request.kind:
            case TuneKind.TRAIN:
                return self._train_step(parse_body(request, TrainRequest), request.raw, started)
            case TuneKind.PREDICT:
                return self._predict(parse_body(request, PredictRequest), request.raw, started)
            case TuneKind.OPT | TuneKind.CODE:
                return super().answer(request)
            case _:
                raise OutOfOrder(f"{request.kind.name} has no place where labels are the cloud's")

    def _train_step(self, request: TrainRequest, raw: bytes, started: float) -> Frame:
        if request.step != self.step:
            raise OutOfOrder(f"labels of step {request.step} came in step {self.step}")
        size, texts = LABEL_BYTES * self._head.labels * len(request.lengths), len(request.lengths)
        labels, raw = _unpack(raw[:size], self._head, texts).to(self._device), raw[size:]
        sample_indices, raw = self._split_announcement(request, raw)
        coded = EncodedTensor(request.scale, raw)
        numbers = self.activation_cache.unpack("first", coded, sample_indices, request.lengths)
        numbers = numbers.to(self._device).requires_grad_()
        with torch.enable_grad(), self._mode(training=True, step=request.step, micro=request.micro_batch):
            outputs, batch = self._outputs(numbers, request, labels)
            self._check(labels, outputs)
            loss = self.task.loss(outputs, batch)
            (loss.sum / request.targets).backward()
        coded = self._encode_gradient(numbers, request.step, request.micro_batch)
        reply = TrainReply(
            scale=coded.scale,
            norm=self._norm(request.last),
            loss=float(loss.sum.detach()),
            seconds=time.perf_counter() - started,
        )
        return Frame.of(TuneKind.TRAIN_OK, reply, coded.payload)

    @torch.no_grad()
    def _predict(self, request: PredictRequest, raw: bytes, started: float) -> Frame:
        coded = EncodedTensor(request.scale, raw)
        numbers = self.wire_formats.uplink.unpack(coded, sum(request.lengths)).to(self._device)
        with self._mode(training=False):
            outputs, _ = self._outputs(numbers, request, torch.empty(0))
        reply = PredictReply(shape=list(outputs.shape), seconds=time.perf_counter() - started)
        return Frame.of(TuneKind.PREDICT_OK, reply, outputs.float().cpu().numpy().tobytes())

    def _outputs(self, numbers: Tensor, request: HiddenStates, labels: Tensor) -> tuple[Tensor, Batch]:
        """Outputs of the head, and the batch without token ids, which the cloud does not have."""
        lengths = torch.tensor(request.lengths, device=self._device)
        batch = Batch(torch.empty(0), valid_mask(lengths), labels)
        return head_outputs(self.task, self.last, self._through(numbers, lengths), batch, self.pooling), batch

    def _check(self, labels: Tensor, outputs: Tensor) -> None:
        if labels.is_floating_point():
            sound = labels.isfinite()
        else:
            sound = (labels == IGNORE) | ((labels >= 0) & (labels < outputs.shape[1]))
        if not bool(sound.all()):
            raise ValueError(f"label {labels[~sound][0].item()}; allowed: 0 to {outputs.shape[-1] - 1}, or finite")
