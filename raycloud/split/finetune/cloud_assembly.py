"""Assembly of the cloud's side of split fine-tuning, from the configuration that the edge has decided."""

from __future__ import annotations

from torch import nn

from raycloud.models.segments import Segment
from raycloud.split.finetune.bottleneck import Bottleneck, empty_bottleneck, identity_bottleneck
from raycloud.split.finetune.cloud import CloudTrainer
from raycloud.split.finetune.label_sharing import LabelSharingCloud
from raycloud.split.finetune.messages import CutConfig, TuneConfig
from raycloud.training.lora import add_segment_adapters


def agreed_bottleneck(cut: CutConfig, width: int) -> Bottleneck:
    """Bottleneck of the agreed size for hidden states of ``width`` numbers; a low-rank one is not fitted yet."""
    return empty_bottleneck(width, cut.width, cut.num_outliers) if cut.low_rank else identity_bottleneck(width)


def build_cloud(
    config: TuneConfig,
    middle: Segment,
    last: Segment | None = None,
    pooler: nn.Module | None = None,
    *,
    decoder: nn.Module | None = None,
) -> CloudTrainer:
    """Build the cloud's side: in the edge's process, in a server, or in an actor.

    Args:
        config: configuration of the run.
        middle: blocks between the cuts; trained in place.
        last: segment after the blocks, if head and labels are the cloud's.
        pooler: the model's own pooler, if it has one, for a head with ``pooling: first``.
        decoder: decoder of the first cut; None for one of the agreed size, which the edge sends before the first step.

    Raises:
        ValueError: the configuration has a head, and there is no ``last``.
    """
    width, device = int(middle.config.hidden_size), next(middle.parameters()).device
    middle.freeze_shared()
    if config.lora is not None:
        add_segment_adapters(middle, config.lora, config.seed)
    if not config.train_cloud:
        middle.requires_grad_(False)
    if decoder is None:
        decoder = agreed_bottleneck(config.uplink, width).decoder
    encoder = agreed_bottleneck(config.downlink, width).encoder
    for end, cut in ((decoder, config.uplink), (encoder, config.downlink)):
        end.to(device)
        if not (cut.trained and config.train_cloud):
            end.requires_grad_(False)
    if config.head is None:
        return CloudTrainer(middle, decoder, encoder, config)
    if last is None:
        raise ValueError("last: None, and the cloud has the head; allowed: the segment after the blocks")
    last.freeze_shared()
    if config.lora is not None:
        add_segment_adapters(last, config.lora, config.seed)
    task = config.head.task(width, config.seed, pooler)
    task.head.to(device)
    return LabelSharingCloud(middle, decoder, last, task, config)
