"""Messages between edge and teacher: kinds, schemas, and a compact encoding of a batch.

The raw bytes of a request are token ids, those of a reply are safetensors, which give dtype and shape of every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from raycloud.data.batches import IGNORE, Batch
from raycloud.distill.signals import SignalCodec, SignalRecipe
from raycloud.distill.signals.encoding import decode_ids, encode_ids, id_bytes
from raycloud.errors import DataError
from raycloud.link.frames import Body, OpenRequest, SessionGrant

Name = Annotated[str, Field(max_length=512)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SignalMessageKind(IntEnum):
    """Kinds of messages between edge and teacher."""

    SIGNAL = 16
    SIGNAL_OK = 17
    HEAD = 18
    HEAD_OK = 19
    EMBEDDING = 20
    EMBEDDING_OK = 21
    REFUSED = 22
    """Reply to a request that is refused for its content. The session goes on; the body is an ``ErrorReply``."""


class OpenSignals(OpenRequest):
    """Request to open a session with a teacher."""

    service: str = "signals"


class TeacherServerInfo(SessionGrant):
    """Identity of the teacher, and the grant of a session with it."""

    teacher: Name
    """Name of the teacher with a fingerprint of its weights."""
    tokenizer: Name
    """See :func:`~raycloud.distill.signals.file.tokenizer_fingerprint`."""
    vocabulary_size: int = Field(ge=1, le=2**24)
    """Size of its vocabulary: number of rows of its head and of its embedding."""
    hidden_size: int = Field(ge=1, le=2**20)
    """Hidden size at its head."""
    request_bytes: int = Field(ge=1)
    """Largest number of raw bytes of a request."""


class SignalRequest(Body):
    """Request for the signal of a batch: the body of SIGNAL. The raw bytes are its tokens."""

    teacher: Name
    tokenizer: Name
    key: Hash
    """Key that the signal must have."""
    signal: SignalRecipe
    temperatures: list[Temperature] = Field(max_length=16)
    """Temperatures that the signal must be for; kinds that are valid at every temperature need none."""
    lengths: list[Annotated[int, Field(ge=1, le=2**24)]] = Field(min_length=1, max_length=4096)
    """Number of tokens of each sample."""

    @model_validator(mode="after")
    def _some_temperature(self) -> Self:
        if not self.temperatures and self.signal.kind not in ("hidden", "logits"):
            raise ValueError(f"a {self.signal.kind} signal needs temperatures")
        return self


class TableRequest(Body):
    """Request for a copy of the teacher's head or of its input embedding: the body of HEAD and EMBEDDING."""

    teacher: Name
    codec: SignalCodec = "bfloat16"
    """Codec of the signals that the head is for; the embedding is always bfloat16."""

    def key(self, kind: IntEnum) -> str:
        """Key that the reply to a request of this kind must have."""
        return f"{kind.name}|{self.codec}|{self.teacher}"


class SignalReply(Body):
    """Reply to any request, whose raw bytes are safetensors."""

    key: str = Field(max_length=600)
    """Key of the request."""
    softcap: float | None = None
    """Logit softcap of a head."""


def pack_batch(batch: Batch, vocabulary_size: int) -> tuple[list[int], bytes]:
    """Lengths of the samples, and their ids with one bit each that says whether the next token is a label.

    Raises:
        DataError: an id is outside the teacher's vocabulary, or the batch is not right-padded with the next tokens as
            labels.
    """
    ids, valid, labels = batch.ids.cpu(), batch.valid.cpu(), batch.labels.cpu()
    lengths = valid.sum(dim=1)
    bits = labels != IGNORE
    last = torch.zeros_like(bits)
    last[:, -1:] = True
    last[:, :-1] = ~valid[:, 1:]
    if not torch.equal(valid, _valid(lengths, ids.shape[1])) or bool((bits & last).any()):
        raise DataError("a batch for a teacher must be padded on the right and predict nothing behind a sample's end")
    if bool((labels != ids.roll(-1, dims=1))[bits].any()):
        raise DataError("a batch for a teacher must have the next tokens as labels")
    used = ids[valid]
    if bool(((used < 0) | (used >= vocabulary_size)).any()):
        raise DataError(
            f"a batch holds ids {int(used.min())} to {int(used.max())}; the teacher's are 0 to {vocabulary_size - 1}"
        )
    raw = encode_ids(used, vocabulary_size).numpy().tobytes() + np.packbits(bits[valid].numpy()).tobytes()
    return lengths.tolist(), raw


def unpack_batch(lengths: Sequence[int], raw: bytes, vocabulary_size: int) -> Batch:
    """Batch that :func:`pack_batch` packed, padded with zeros.

    Raises:
        ValueError: the number of bytes does not match the lengths, an id is unknown, or there are no labels.
    """
    tokens, width = sum(lengths), id_bytes(vocabulary_size)
    if len(raw) != tokens * width + -(-tokens // 8):
        expected = f"{tokens * width + -(-tokens // 8)} bytes"
        raise ValueError(f"{len(raw)} bytes for {tokens} tokens of {width} bytes and one bit each; expected {expected}")
    coded = np.frombuffer(raw, dtype=np.uint8)
    used = decode_ids(torch.from_numpy(coded[: tokens * width].copy()).view(tokens, width))
    if int(used.max()) >= vocabulary_size:
        raise ValueError(f"id {int(used.max())}; allowed: 0 to {vocabulary_size - 1}")
    valid = _valid(torch.tensor(lengths), max(lengths))
    ids, wanted = torch.zeros(valid.shape, dtype=torch.long), torch.zeros_like(valid)
    ids[valid] = used
    wanted[valid] = torch.from_numpy(np.unpackbits(coded[tokens * width :], count=tokens)).bool()
    follows = torch.zeros_like(valid)
    follows[:, :-1] = valid[:, 1:]
    if bool((wanted & ~follows).any()) or not bool(wanted.any()):
        raise ValueError("a label where no token follows, or no labels at all")
    return Batch(ids, valid, ids.roll(-1, dims=1).masked_fill(~wanted, IGNORE))


def _valid(lengths: Tensor, slots: int) -> Tensor:
    return torch.arange(slots) < lengths[:, None]
