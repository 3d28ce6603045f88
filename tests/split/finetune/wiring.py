"""Tiny model trained whole and cut in three, with the same recipe."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from raycloud.data.batches import IGNORE, Batch
from raycloud.link.channel import Channel, Loopback
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.models.structure import base_of, blocks_of
from raycloud.split.finetune.bottleneck import Bottleneck, empty_bottleneck, identity_bottleneck
from raycloud.split.finetune.client import LocalCloudClient, RemoteCloudClient
from raycloud.split.finetune.cloud import CloudTrainer
from raycloud.split.finetune.edge import UShapedEdge
from raycloud.split.finetune.messages import CutConfig, OpenTuning, TuneConfig
from raycloud.split.finetune.server import TuneLimits, TuneServer
from raycloud.split.finetune.tasks import Classification, LanguageModelling, Pooling, Task, TextHead, pooled
from raycloud.split.finetune.wire_dtype import WireDType
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.training.loop import Loss, Step, Trainer
from raycloud.training.recipe import TrainingRecipe
from raycloud.training.seeding import seeded
from tests.models.families import tiny

TRAINING = TrainingRecipe(lr=2e-3, warmup_steps=4, max_grad_norm=0.5, weight_decay=0.05)
STEPS, SEED, WIDTH, CLASSES = 20, 3, 32, 3
DOWNLINK_OUTLIERS = 2


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model whose every parameter has a gradient worth the name.

    The bias of the keys has none, as softmax takes no notice of it: what rounding leaves is noise, which Adam would
    blow up to steps of full size.
    """
    model = tiny(family, dtype=dtype, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(("key.bias", "k_proj.bias")):
            parameter.requires_grad_(False)
        if name.endswith("c_attn.bias"):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return model


def batches(step: int, micros: int = 2, *, language: bool) -> list[Batch]:
    """Make texts of different lengths, padded on the right."""
    chance = torch.Generator().manual_seed(1000 + step)
    made = []
    for micro in range(micros):
        lengths = torch.randint(3, 12, (4,), generator=chance)
        valid = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.randint(3, 97, valid.shape, generator=chance).masked_fill(~valid, 0)
        if language:
            follows = torch.zeros_like(valid)
            follows[:, :-1] = valid[:, 1:]
            labels = ids.roll(-1, dims=1).masked_fill(~follows, IGNORE)
        else:
            labels = torch.randint(0, CLASSES, (4,), generator=chance)
        first = 4 * (micros * step + micro)
        made.append(Batch(ids, valid, labels, sample_indices=tuple(range(first, first + 4))))
    return made


def head_of(dtype: torch.dtype = torch.float32) -> TextHead:
    return TextHead(WIDTH, CLASSES, dropout=0.1, seed=SEED).to(dtype)


@dataclass
class Whole:
    """Stock model with its own forward pass, trained in one piece."""

    model: Any
    head: nn.Module | None
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        groups = {"model": self.model, **({"head": self.head} if self.head is not None else {})}
        self.trainer = Trainer(groups, TRAINING, total_steps=STEPS, seed=SEED)
        self._parts = {f"block {place}": block for place, block in enumerate(blocks_of(self.model))}
        if self.head is not None:
            self._parts["head"] = self.head

    def loss(self, batch: Batch) -> Loss:
        if self.head is None:
            logits = self.model(input_ids=batch.ids, attention_mask=batch.valid.long()).logits
            wanted = batch.labels != IGNORE
            total = F.cross_entropy(logits[wanted].float(), batch.labels[wanted], reduction="sum")
        else:
            rows = base_of(self.model)(input_ids=batch.ids, attention_mask=batch.valid.long()).last_hidden_state
            outputs = self.head(pooled(rows, batch.valid, self.pooling))
            total = F.cross_entropy(outputs.float(), batch.labels, reduction="sum")
        return Loss(total, batch.targets, {"cross_entropy": total})

    def step(self, micros: Sequence[Batch]) -> Step:
        self.model.train()
        numbers = itertools.count()

        def loss_of(batch: Batch) -> Loss:
            with seeded(self._parts, SEED, self.trainer.step_index, next(numbers)):
                return self.loss(batch)

        return self.trainer.step(micros, loss_of)


def split(
    model: Any,
    first: int,
    second: int,
    *,
    head: TextHead | None = None,
    code: Callable[[Segment], Bottleneck] | None = None,
    downlink_rank: int | None = None,
    dtype: WireDType = "float32",
    activation_delta: bool = False,
    max_in_flight: int = 1,
    meter: Meter | None = None,
) -> UShapedEdge:
    """Make the two sides of a copy of a model in one process; ``downlink_rank`` is the rank of the second
    bottleneck."""
    model, head = copy.deepcopy((model, head))
    ahead, last = Segment(model, 0, first, head=False), Segment(model, second, embed=False)
    middle = Segment(model, first, second, embed=False, head=False)
    cut = (code or (lambda _: identity_bottleneck(WIDTH)))(ahead)
    behind = (
        identity_bottleneck(WIDTH)
        if downlink_rank is None
        else empty_bottleneck(WIDTH, downlink_rank + DOWNLINK_OUTLIERS, DOWNLINK_OUTLIERS)
    )
    task: Task = Classification(head, "mean") if head is not None else LanguageModelling(last)
    config = TuneConfig(
        seed=SEED,
        total_steps=STEPS,
        training=TRAINING,
        train_cloud=True,
        pooling=task.pooling if second == len(blocks_of(model)) else "none",
        uplink=agreed(cut, dtype, activation_delta),
        downlink=agreed(behind, "float32" if downlink_rank is None else dtype, activation_delta),
    )
    cloud = CloudTrainer(middle, cut.decoder, behind.encoder, config)
    edge = UShapedEdge(
        ahead, cut.encoder, behind.decoder, last, task, config, LocalCloudClient(cloud, meter), max_in_flight
    )
    edge.fit(calibration(language=head is None))
    return edge


def calibration(*, language: bool) -> list[Batch]:
    """Batches to which the bottleneck of the second cut is fitted."""
    return batches(-1, 3, language=language)


class Service:
    """Cloud that trains, behind channels that can be broken, and that can be killed."""

    def __init__(self, edge: UShapedEdge, folder: Path, limits: TuneLimits | None = None) -> None:
        local = edge.cloud.trainer  # type: ignore[attr-defined]
        middle = copy.deepcopy(local.middle)
        plans = PlanSet.of(SplitPlan(middle.lo, middle.hi))
        self._part, self._folder, self._limits = CloudPart(middle, plans, "tiny"), folder, limits
        self.decoder = copy.deepcopy(local.decoder)
        self.channels: list[Channel] = []
        self.begin = OpenTuning(
            fingerprint="tiny",
            start_block=middle.lo,
            end_block=middle.hi,
            run="0" * 32,
            **dict(local.config),
        )
        self._start()

    def _start(self) -> None:
        # Sums in more than one thread may round otherwise than in one, as the tests compute.
        self.server = TuneServer(self._part, self._folder, self._limits, threads=1)
        self.loopback = Loopback(lambda connection: self.server.serve(connection, "me"))

    def connect(self, session: str) -> Channel:
        channel = self.loopback.connect()
        self.channels.append(channel)
        return channel

    def cut(self) -> None:
        """Break the latest connection."""
        self.channels[-1].close()

    def kill(self) -> None:
        """Lose all state except what is on disk."""
        self.close()
        self._start()

    def close(self) -> None:
        self.loopback.close()
        self.server.close()

    def at(self, step: int | None) -> RemoteCloudClient:
        """Make a new cloud, from the start or from a checkpoint."""
        return RemoteCloudClient(
            self.connect, self.begin.model_copy(update={"restore": step}), self.decoder, patience_s=20
        )


def agreed(cut: Bottleneck, dtype: WireDType = "float32", activation_delta: bool = False) -> CutConfig:
    """Configuration of a cut with this bottleneck."""
    return CutConfig(
        dtype=dtype,
        width=cut.width,
        num_outliers=cut.num_outliers,
        low_rank=not isinstance(cut.encoder, nn.Identity),
        trained=True,
        activation_delta=activation_delta,
    )


def sides(edge: UShapedEdge) -> dict[str, nn.Module]:
    """Modules of both sides, by their part of the whole model."""
    cloud = edge.cloud.trainer  # type: ignore[attr-defined]
    return {**{name: edge.modules[name] for name in ("first", "last", "head")}, "middle": cloud.middle}


def parts_of(whole: Whole, first: int, second: int) -> dict[str, nn.Module]:
    """Modules of an unsplit model, by part."""
    return {
        "first": Segment(whole.model, 0, first, head=False),
        "middle": Segment(whole.model, first, second, embed=False, head=False),
        "last": Segment(whole.model, second, embed=False),
        "head": whole.head or nn.Identity(),
    }


def named(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """List the parameters of several modules."""
    return {f"{side}.{name}": p for side, module in modules.items() for name, p in module.named_parameters()}


def values(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Copy the values of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in named(modules).items()}


def caught(modules: dict[str, nn.Module], trainers: list[Trainer], step: Callable[[], Step]) -> dict[str, Tensor]:
    """Compute the gradients of a step without changing the parameters."""
    found: dict[str, Tensor] = {}
    for trainer in trainers:

        def keep(norm: float, trainer: Trainer = trainer) -> bool:
            mine = set(map(id, trainer._named.values()))
            found.update({n: p.grad.clone() for n, p in named(modules).items() if id(p) in mine and p.grad is not None})
            return True

        trainer.apply = keep  # type: ignore[method-assign]
    step()
    return found


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative norm of all differences, taken as one vector."""
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name] - theirs[name]).flatten().double() for name in ours])
    return float(apart.norm() / torch.cat([theirs[name].flatten().double() for name in ours]).norm())
