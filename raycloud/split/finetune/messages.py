"""Messages between edge and cloud during split fine-tuning.

Except with ``labels=cloud`` they contain no label; they never contain text or token ids. ``traffic.py`` computes the
bytes of every message: change both.

A session begins with OPEN and, unless it continues from a checkpoint, with the bottlenecks of low-rank cuts: CODE sends
the cloud its end of the first one, FIT the hidden states to fit the second one to, and the reply to the last FIT
returns the edge its end of that. A step is FWD and BWD for each of its micro-batches, then OPT; SAVE may follow. Each
request has one reply, in the order of the requests; PING, which is no reply, may come between them.
A message is a MessagePack map and raw bytes: encoded tensors or safetensors. A request has up to ``message_bytes`` raw
bytes (a limit of the service), PUSH up to ``part_bytes``. If activation deltas are sent, the raw bytes of FWD begin
with the indices of the texts in the edge's data set, and how often each was sent before.

In the label-sharing topology (``labels=cloud``) the cloud has head and loss: there TRAIN replaces FWD and BWD and does
send labels, and the reply to PREDICT is the head's outputs.

Edges that train together exchange weights between rounds of steps: PUSH sends an edge's contribution, ROUND requests
the state of the group, and PULL returns the aggregated weights.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

from pydantic import Field

from raycloud.link.frames import Body, OpenRequest, SessionGrant
from raycloud.rounds.recipe import AggregatorName
from raycloud.split.finetune.tasks import HeadConfig, Pooling
from raycloud.split.finetune.wire_dtype import WireDType
from raycloud.split.finetune.wire_format import WireFormat, WireFormats
from raycloud.training.recipe import LoraRecipe, TrainingRecipe


class TuneKind(IntEnum):
    """Kinds of messages. Those that end in ``_OK`` are replies."""

    FWD = 16
    FWD_OK = 17
    BWD = 18
    BWD_OK = 19
    TRAIN = 20
    TRAIN_OK = 21
    PREDICT = 22
    PREDICT_OK = 23
    OPT = 24
    OPT_OK = 25
    SAVE = 26
    """Save a checkpoint of the step on disk. The body of the reply, after it is saved, is the same."""
    SAVE_OK = 27
    CODE = 28
    """Raw bytes: the first cut's decoder as safetensors. Neither it nor its reply has a body."""
    CODE_OK = 29
    FIT = 30
    FIT_OK = 31
    """Reply without a body. After the last FIT the bottleneck is fitted; raw bytes: the second cut's decoder."""
    PUSH = 32
    PUSH_OK = 33
    ROUND = 34
    ROUND_OK = 35
    PULL = 36
    """Request, without a body, for the group's weights. The cloud's part loads them as well."""
    PULL_OK = 37


Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Scale of coded numbers, see :class:`~raycloud.split.finetune.wire_format.EncodedTensor`."""


class CutConfig(Body):
    """Configuration of one cut."""

    dtype: WireDType
    width: int = Field(ge=1, le=2**20)
    """Numbers sent per token: the rank and the outliers, or the width of unchanged hidden states."""
    num_outliers: int = Field(0, ge=0, le=2**20)
    """Number of outliers, see :class:`~raycloud.split.finetune.wire_format.WireFormat`."""
    low_rank: bool
    """True for a bottleneck with encoder and decoder, False for unchanged hidden states."""
    trained: bool
    """True if encoder and decoder are trained, each by the side that holds it."""
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Peak learning rate of the bottleneck; None for that of all other weights."""
    activation_delta: bool = False
    """True if from a text's second visit on only the activation delta is sent."""

    @property
    def wire_format(self) -> WireFormat:
        """Wire format of the cut."""
        return WireFormat(self.dtype, self.width, self.num_outliers, self.activation_delta)


GroupName = Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
"""Name of a group, or of an edge in it."""


class GroupConfig(Body):
    """Configuration of the group that an edge trains with. It is the same for all members, except for ``name``."""

    group: GroupName
    """Name of the group, unique among those of one token."""
    name: GroupName
    """Name of this edge."""
    edges: list[GroupName] = Field(min_length=1, max_length=1024)
    """Names of all edges."""
    steps: int = Field(ge=1)
    """Optimiser steps of a round."""
    deadline_s: float = Field(gt=0, allow_inf_nan=False)
    """Seconds from a round's first contribution until it ends without the missing ones."""
    averaged: bool
    """True if the edges' own parts are averaged as well as the cloud's."""
    aggregation: AggregatorName = "mean"
    """Aggregator of the contributions to a round."""


class TuneConfig(Body):
    """Configuration of a run on which both sides must agree, wherever the cloud is."""

    seed: int
    """Seed of dropout and rounding."""
    total_steps: int = Field(ge=1)
    training: TrainingRecipe
    lora: LoraRecipe | None = None
    """Adapters that are trained instead of the blocks' own weights."""
    train_cloud: bool
    """True if the cloud's part is trained."""
    pooling: Pooling
    """Pooling of a text's hidden states in the reply."""
    uplink: CutConfig
    """Configuration of the first cut."""
    downlink: CutConfig
    """Configuration of the second cut."""
    head: HeadConfig | None = None
    """Configuration of the cloud's head if labels are sent; None if head and labels stay at the edge."""

    @property
    def wire_formats(self) -> WireFormats:
        """Wire formats of both cuts."""
        return WireFormats(self.uplink.wire_format, self.downlink.wire_format)

    def bottleneck_lrs(self, *, uplink: str, downlink: str) -> dict[str, float]:
        """Peak learning rates of one side's ends of both bottlenecks, by their names on that side.

        An end that is not named is trained with the rate of all other weights.
        """
        rates = {uplink: self.uplink.lr, downlink: self.downlink.lr}
        return {name: rate for name, rate in rates.items() if rate is not None}


class OpenTuning(OpenRequest, TuneConfig):
    """OPEN: the configuration, and the model and run that it is for."""

    service: str = "split-tune"
    fingerprint: str = Field(max_length=128)
    """Fingerprint of the model both sides begin with."""
    start_block: int = Field(ge=0, le=512)
    end_block: int = Field(ge=1, le=512)
    run: str = Field(pattern="^[0-9a-f]{8,32}$")
    """Id of the run, under which checkpoints are kept."""
    restore: int | None = Field(None, ge=0)
    """Step of the checkpoint to continue from; None to begin."""
    group: GroupConfig | None = None
    """Group that the edge trains with; None for an edge that trains alone."""


class TuneGrant(SessionGrant):
    """Grant of the cloud to a session of split fine-tuning."""

    tokens: int = Field(ge=1)
    """Largest number of tokens of a micro-batch, padding included."""
    message_bytes: int = Field(ge=1)
    """Largest number of raw bytes of a request, except of one with an edge's weights."""


class HiddenStates(Body):
    """Hidden states at the first cut, of the valid tokens only, text after text."""

    lengths: list[Annotated[int, Field(ge=1, le=2**20)]] = Field(min_length=1, max_length=8192)
    """Number of tokens of each text."""
    scale: Scale


class FitRequest(HiddenStates):
    """FIT: hidden states to fit the second cut's bottleneck to, after the cloud's blocks have processed them."""

    last: bool
    """True for the last FIT."""


class SaveRequest(Body):
    """SAVE and SAVE_OK."""

    step: int = Field(ge=0)


class ForwardRequest(HiddenStates):
    """FWD: hidden states for a forward pass, and for training if a gradient follows."""

    step: int = Field(ge=0)
    micro_batch: int = Field(ge=0)
    training: bool
    """True if dropout is on."""
    backward: bool
    """True if a BWD follows."""


class ForwardReply(Body):
    """FWD_OK: hidden states at the second cut, or one per text if they are pooled there."""

    scale: Scale
    seconds: float = Field(ge=0)
    """Seconds in which the cloud computed."""


class BackwardRequest(Body):
    """BWD: the gradient of the hidden states in FWD_OK."""

    step: int = Field(ge=0)
    micro_batch: int = Field(ge=0)
    last: bool
    """True for the step's last micro-batch: the reply then holds the gradients' norm."""
    needs_gradient: bool
    """True if the edge's first part is trained and needs the gradient of its hidden states."""
    scale: Scale


class BackwardReply(Body):
    """BWD_OK: the gradient of the hidden states in FWD, if it was requested."""

    scale: Scale
    norm: float = Field(ge=0)
    """Norm of the cloud's gradients after the last micro-batch, 0 before; infinite if they are not finite."""
    seconds: float = Field(ge=0)


class TrainRequest(HiddenStates):
    """TRAIN: hidden states, preceded by their labels of four bytes each."""

    step: int = Field(ge=0)
    micro_batch: int = Field(ge=0)
    last: bool
    """True for the step's last micro-batch: the reply then holds the gradients' norm."""
    targets: int = Field(ge=1)
    """Number of labels of the whole step, over which the loss is the mean."""


class TrainReply(BackwardReply):
    """TRAIN_OK: the content of BWD_OK, and the loss."""

    loss: float
    """Loss summed over the labels."""


class PredictRequest(HiddenStates):
    """PREDICT: hidden states for which the head's outputs are requested, without dropout."""


class PredictReply(Body):
    """PREDICT_OK: outputs of the head, float32."""

    shape: list[Annotated[int, Field(ge=1, le=2**20)]] = Field(min_length=1, max_length=3)
    seconds: float = Field(ge=0)


class OptimiseRequest(Body):
    """OPT: apply the optimiser step."""

    step: int = Field(ge=0)
    norm: float = Field(ge=0)
    """Norm of both sides' gradients together; infinite for a step that both must skip."""


class OptimiseReply(Body):
    """OPT_OK: the step is applied."""

    step: int = Field(ge=0)
    """Number of the next step."""
    seconds: float = Field(ge=0)
    ended: int | None = None
    """Rounds that the edge's group has ended, so that a late edge notices it between two steps."""


class PushRequest(Body):
    """PUSH: this edge's contribution to a round. Raw bytes: its own weights as safetensors, none if they are private.

    The cloud adds the edge's copy of the cloud's part.
    """

    round: int = Field(ge=0)
    """Round of the contribution; 0 is the beginning, when the group agrees on a bottleneck."""
    samples: int = Field(ge=1)
    """Number of samples trained on: the weight in the average."""


class PushReply(Body):
    """PUSH_OK."""

    accepted: bool
    """True if the round has a contribution of this edge, this one or an earlier one; False if the round has ended."""


class RoundRequest(Body):
    """ROUND: a request for the state of the group."""

    round: int | None = Field(None, ge=0)
    """Round to wait for, for some seconds; None to be answered at once."""


class RoundReply(Body):
    """ROUND_OK, within seconds: if the round has not ended yet, the edge repeats the request."""

    ended: int = Field(ge=-1)
    """Latest round that ended; -1 before the beginning."""
    members: list[str]
    """Edges whose contributions were averaged in it."""
    missed: dict[str, str]
    """Edges whose contributions were not, with the reasons."""


class GroupWeightsReply(Body):
    """PULL_OK. Raw bytes: the aggregated weights of the edges' own parts as safetensors; none if they are private."""

    ended: int = Field(ge=0)
    """Round of the weights."""
