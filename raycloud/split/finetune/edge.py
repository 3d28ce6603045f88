"""U-shaped edge of split fine-tuning: it keeps tokens, labels, first and last part, head and loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raycloud.data.batches import Batch
from raycloud.errors import LinkError
from raycloud.link.frames import Frame, parse_body
from raycloud.models.segments import Segment
from raycloud.split.finetune.bottleneck import LowRankDecoder, load_decoder_bytes
from raycloud.split.finetune.client import CloudClient
from raycloud.split.finetune.edge_trainer import (
    EdgeTrainer,
    PendingMicroBatch,
    TrainableParts,
    invalid_reply_error,
    token_counts,
)
from raycloud.split.finetune.messages import (
    BackwardRequest,
    FitRequest,
    ForwardReply,
    ForwardRequest,
    TuneConfig,
    TuneKind,
)
from raycloud.split.finetune.tasks import Task, head_outputs
from raycloud.split.finetune.traffic import step_traffic
from raycloud.split.finetune.wire_format import EncodedTensor
from raycloud.training.loop import LossSums


class UShapedEdge(EdgeTrainer):
    """Edge with the first and last part of a model; hidden states are sent at two cuts, and labels are not sent.

    A micro-batch takes two round trips: one with hidden states, one with gradients.

    Args:
        first: blocks [0, start_block) with the embedding.
        encoder: encoder of the first cut.
        decoder: decoder of the second cut.
        last: blocks [end_block, L) with everything after them.
        task: head and loss.
        config: configuration of the run; its pooling is ``none`` if the task pools hidden states itself.
        cloud: client of the cloud.
        max_in_flight: largest number of micro-batches in flight.
    """

    def __init__(
        self,
        first: Segment,
        encoder: nn.Module,
        decoder: nn.Module,
        last: Segment,
        task: Task,
        config: TuneConfig,
        cloud: CloudClient,
        max_in_flight: int = 1,
    ) -> None:
        super().__init__(first, encoder, config, cloud, max_in_flight, decoder=decoder, last=last, head=task.head)
        self.decoder, self.last, self.task, self.pooling = decoder, last, task, config.pooling
        self._parts |= {f"block {last.lo + index}": block for index, block in enumerate(last.blocks)}
        self._parts["head"] = task.head

    @property
    def _needs_backward(self) -> bool:
        return self.trainable.cloud or self.trainable.first_part

    @torch.no_grad()
    def fit(self, batches: Sequence[Batch]) -> None:
        """Have the cloud fit the second cut's bottleneck, if it is low-rank, to batches; called before the first step.

        Raises:
            LinkError: the cloud is gone, refuses, or sends no decoder.
        """
        if not isinstance(self.decoder, LowRankDecoder):
            return
        decoder = b""
        for number, batch in enumerate(batches):
            numbers = self._bottleneck_input(batch, number, training=False)
            coded = self.wire_formats.uplink.pack(numbers)
            last = number == len(batches) - 1
            request = FitRequest(lengths=token_counts(batch), last=last, scale=coded.scale)
            self.cloud.send(Frame.of(TuneKind.FIT, request, coded.payload))
            decoder = self._receive().raw
        try:
            load_decoder_bytes(self.decoder, decoder)
        except ValueError as error:
            raise LinkError(f"the cloud's bottleneck cannot be used: {error}") from None

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Outputs of the task's head for a batch, without dropout."""
        numbers = self._bottleneck_input(batch, 0, training=False)
        self.cloud.send(self._forward(batch, numbers, 0, training=False))
        answer = self._receive()
        reply = parse_body(answer, ForwardReply)
        self.clock.cloud += reply.seconds
        return self._run_last(self._arrived(reply.scale, answer.raw, batch, []), batch, 0, training=False)

    def traffic(
        self, step: int, micros: Sequence[Sequence[int]], trainable: TrainableParts | None = None
    ) -> Counter[str]:
        """Bytes of a step, by kind of message."""
        return step_traffic(step, micros, self.wire_formats, self.pooling, trainable or self.trainable)

    def _request(self, micro: PendingMicroBatch, targets: int) -> Frame:
        return self._forward(micro.batch, micro.numbers, micro.number, training=True)

    def _on_reply(self, micro: PendingMicroBatch, answer: Frame, sums: LossSums) -> bool:
        """Compute the loss and send the gradient at the second cut; return whether one was sent."""
        reply = parse_body(answer, ForwardReply)
        self.clock.cloud += reply.seconds
        with self._timed():
            sample_indices = self._sample_indices(micro.batch)
            leaf = self._arrived(reply.scale, answer.raw, micro.batch, sample_indices).requires_grad_()
            outputs = self._run_last(leaf, micro.batch, micro.number, training=True)
            loss = self.task.loss(outputs, micro.batch)
            (loss.sum / sums.tokens).backward()
            sums.add(loss)
            if not self._needs_backward:
                return False
            assert leaf.grad is not None
            # NaN and infinity must not be sent: the norm tells both sides to skip the step.
            self._non_finite |= not bool(leaf.grad.isfinite().all())
            gradient = leaf.grad.nan_to_num(0.0, 0.0, 0.0)
            coded = self.wire_formats.downlink.pack(gradient, self._generator(micro.number, "second"))
            request = BackwardRequest(
                step=self.trainer.step_index,
                micro_batch=micro.number,
                last=micro.last,
                needs_gradient=self.trainable.first_part,
                scale=coded.scale,
            )
        self.cloud.send(Frame.of(TuneKind.BWD, request, coded.payload))
        return True

    def _run_last(self, numbers: Tensor, batch: Batch, number: int, *, training: bool) -> Tensor:
        """Outputs of the task from the codes at the second cut."""
        with self._mode(number, training):
            return head_outputs(self.task, self.last, self.decoder(numbers), batch, self.pooling)

    def _forward(self, batch: Batch, numbers: Tensor, number: int, *, training: bool) -> Frame:
        coded, which = self._encode(numbers, batch, training=training)
        request = ForwardRequest(
            step=self.trainer.step_index,
            micro_batch=number,
            training=training,
            backward=training and self._needs_backward,
            lengths=token_counts(batch),
            scale=coded.scale,
        )
        return Frame.of(TuneKind.FWD, request, which + coded.payload)

    def _arrived(self, scale: float, raw: bytes, batch: Batch, sample_indices: Sequence[int]) -> Tensor:
        counts = token_counts(batch) if self.pooling == "none" else [1] * len(batch.ids)
        try:
            numbers = self.activation_cache.unpack("second", EncodedTensor(scale, raw), sample_indices, counts)
        except ValueError as error:
            raise invalid_reply_error(error) from None
        return numbers.to(batch.ids.device)
