"""What edge and cloud say to each other while they train. No text, token id, label or mask is in any of it.

A session begins with OPEN and, unless it goes on from a checkpoint, with the codes of narrow cuts: CODE brings the
cloud its end of the first one, FIT the rows that it fits the second one to, CODE the edge its end of that. A step is
FWD and BWD for each of its micro-batches, then OPT; SAVE may follow. Each has one answer, in the order of the requests;
PING, which is none, may come between them.
Payloads are a MessagePack map followed by coded numbers or tensors. Where changes cross, FWD has between the two which
texts they are, by their numbers in the edge's data set, and how often each was there before.

All this holds but for the one topology that must be asked for, in which the cloud has head and loss: there LEARN takes
the place of FWD and BWD and does bring labels, and JUDGE is answered with what the head says.

Edges that train together meet between rounds of steps: GIVE, as often as it takes, and ROUND bring an edge's work,
ROUND alone asks where the group stands, and with TAKE both sides begin from what the group made of everybody's.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raycloud.link.frames import Body
from raycloud.split.finetune.numbers import Form, Packing
from raycloud.split.finetune.tasks import Pooling, TaskTerms
from raycloud.training.loop import TrainingRecipe
from raycloud.training.lora import LoraRecipe

PIECE_BYTES = 2 * 2**20
"""Of tensors in one frame, at most."""

Unit = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""See :class:`~raycloud.split.finetune.numbers.Coded`."""


class Agreed(Body):
    """What crosses one cut."""

    form: Form
    width: int = Field(ge=1, le=2**20)
    """Numbers of a row."""
    apart: int = Field(0, ge=0, le=2**20)
    """See :class:`~raycloud.split.finetune.numbers.Packing`."""
    narrow: bool
    """Whether they are a code with an encoder and a decoder, and not rows as they are."""
    trained: bool
    """Whether each of these learns with the side that holds it."""
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Peak rate at which it does; None for that of everything else."""
    changes: bool = False
    """Whether from a text's second visit on only the change crosses."""

    @property
    def packing(self) -> Packing:
        """The numbers as bytes."""
        return Packing(self.form, self.width, self.apart, self.changes)


GroupName = Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
"""Of a group, or of an edge in it."""


class Together(Body):
    """The group that an edge trains with. All members ask for the same, but for their names."""

    group: GroupName
    """Among those of one token."""
    name: GroupName
    """This edge's."""
    edges: list[GroupName] = Field(min_length=1, max_length=1024)
    """All names."""
    steps: int = Field(ge=1)
    """Of a round."""
    deadline_s: float = Field(gt=0, allow_inf_nan=False)
    """How long the first work of a round waits for that of the others."""
    averaged: bool
    """Whether the edges' own parts are averaged as well as the cloud's."""


class Begin(Body):
    """OPEN: what both sides must agree on."""

    fingerprint: str = Field(max_length=128)
    """Of the model both sides begin with."""
    first: int = Field(ge=0, le=512)
    second: int = Field(ge=1, le=512)
    run: str = Field(pattern="^[0-9a-f]{8,32}$")
    """Under which checkpoints are kept."""
    restore: int | None = Field(None, ge=0)
    """The step of the checkpoint to go on from."""
    seed: int
    """Of dropout and of rounding."""
    total_steps: int = Field(ge=1)
    training: TrainingRecipe
    lora: LoraRecipe | None = None
    """Adapters that learn in place of the blocks' own weights."""
    cloud: bool
    """Whether the cloud's part learns."""
    back: Pooling
    """What of a text's rows is to come back."""
    up: Agreed
    """Of the first cut."""
    down: Agreed
    """Of the second one."""
    task: TaskTerms | None = None
    """Given if labels are to cross; None for a head that stays at the edge with them."""
    together: Together | None = None
    """None for an edge that trains by itself."""


class Piece(Body):
    """CODE: some bytes of the first cut's decoder as safetensors, or the wish for some of the second one's.

    CODE_OK: the same without bytes, or with them.
    """

    up: bool
    """Whether it is the first cut's, which the cloud needs."""
    at: int = Field(ge=0)
    """Where they begin."""
    size: int = Field(ge=0)
    """Of all of them; of no meaning in a wish."""


class Rows(Body):
    """Rows at the first cut, of the valid tokens only, text after text."""

    lengths: list[Annotated[int, Field(ge=1, le=2**20)]] = Field(min_length=1, max_length=8192)
    """Tokens of each text."""
    unit: Unit


class Fit(Rows):
    """FIT: rows that the cloud fits the second cut's code to, once its blocks have worked on them."""

    last: bool
    """Whether all are there now."""


class Fitted(Body):
    """FIT_OK: the rows are there; after the last of them, so is the code."""


class Saved(Body):
    """SAVE: keep what the step goes on from, on disk. SAVE_OK: it is there."""

    step: int = Field(ge=0)


class Forward(Rows):
    """FWD: rows to work on, and to learn from if a gradient follows."""

    step: int = Field(ge=0)
    micro: int = Field(ge=0)
    training: bool
    """Whether dropout is on."""
    returns: bool
    """Whether a BWD follows."""


class Forwarded(Body):
    """FWD_OK: rows at the second cut, or one row a text where they are pooled there."""

    unit: Unit
    seconds: float = Field(ge=0)
    """That the cloud computed."""


class Backward(Body):
    """BWD: the gradient of what FWD_OK carried."""

    step: int = Field(ge=0)
    micro: int = Field(ge=0)
    last: bool
    """Whether it is the step's last one: the answer then tells the gradients' norm."""
    back: bool
    """Whether the edge learns ahead of the cloud and wants the gradient of its rows."""
    unit: Unit


class Backwarded(Body):
    """BWD_OK: the gradient of what FWD carried, if it was wanted."""

    unit: Unit
    norm: float = Field(ge=0)
    """Of the cloud's gradients so far, where it was the last one; infinite if they are not finite."""
    seconds: float = Field(ge=0)


class Learn(Rows):
    """LEARN: rows with their labels, four bytes each, ahead of them."""

    step: int = Field(ge=0)
    micro: int = Field(ge=0)
    last: bool
    """Whether it is the step's last one: the answer then tells the gradients' norm."""
    targets: int = Field(ge=1)
    """Labels of the whole step, which the loss is the mean over."""


class Learnt(Backwarded):
    """LEARN_OK: what BWD_OK carries, and the loss."""

    loss: float
    """Summed over the labels."""


class Judge(Rows):
    """JUDGE: rows that the head is to say something of, dropout off."""


class Judged(Body):
    """JUDGE_OK: what it says, float32."""

    shape: list[Annotated[int, Field(ge=1, le=2**20)]] = Field(min_length=1, max_length=3)
    seconds: float = Field(ge=0)


class Optimise(Body):
    """OPT: make the step."""

    step: int = Field(ge=0)
    norm: float = Field(ge=0)
    """Of both sides' gradients together; infinite for a step that both must skip."""


class Optimised(Body):
    """OPT_OK."""

    step: int = Field(ge=0)
    """Of the next one."""
    seconds: float = Field(ge=0)
    ended: int | None = None
    """Rounds that the edge's group has ended, so that one that is late learns of it between two steps."""


class Meet(Body):
    """ROUND: this edge's work of a round, whose own weights GIVE brought; or where the group stands."""

    round: int | None = Field(None, ge=0)
    """The round that is worked for; 0 is the beginning, at which the group agrees on a code. None only asks."""
    samples: int = Field(1, ge=1)
    """That were trained on, by which it is averaged."""


class Met(Body):
    """ROUND_OK, within seconds: if the round has not ended yet, it is asked for again."""

    ended: int = Field(ge=-1)
    """The latest round that ended; -1 before the beginning."""
    members: list[str]
    """Whose work was averaged in it."""
    missed: dict[str, str]
    """Whose was not, and why."""


class Given(Body):
    """GIVE: some bytes of the edge's own weights as safetensors. GIVE_OK likewise, without them."""

    at: int = Field(ge=0)
    """Where they begin."""


class Take(Body):
    """TAKE: some bytes of the edges' weights as the group has them. At 0 the cloud's part takes over the group's."""

    at: int = Field(ge=0)


class Taken(Body):
    """TAKE_OK: the bytes."""

    ended: int = Field(ge=0)
    """The round whose they are."""
    size: int = Field(ge=0)
    """Of all of them."""
