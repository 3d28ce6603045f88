"""What edge and teacher say to each other: schemas, a batch in few bytes, and answers in parts.

Requests and answers are a MessagePack map followed by raw bytes: token ids on the way up, safetensors on the way down,
which say type and shape of every tensor. An answer larger than a frame goes on in further ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from raycloud.data.batches import IGNORE, Batch
from raycloud.distill.signals import SignalCodec, SignalRecipe
from raycloud.distill.signals.coding import decode_ids, encode_ids, id_bytes
from raycloud.errors import DataError
from raycloud.link.frames import Body, Frame, Kind, with_bytes

PART_BYTES = 2**20
"""Payload of a frame of an answer: far below what a WebSocket of Serve takes, and each one is a sign of life."""

Name = Annotated[str, Field(max_length=512)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Offer(Body):
    """Which teacher answers here."""

    teacher: Name
    """Its name with a fingerprint of its weights."""
    tokenizer: Name
    """See :func:`~raycloud.distill.signal_file.tokenizer_fingerprint`."""
    words: int = Field(ge=1, le=2**24)
    """Of its vocabulary: rows of its head and of its embedding."""
    width: int = Field(ge=1, le=2**20)
    """Of the rows that enter its head."""


class Ask(Body):
    """For the signal of a batch, whose tokens follow the map."""

    teacher: Name
    tokenizer: Name
    key: Hash
    """What the signal must be valid for."""
    signal: SignalRecipe
    temperatures: list[Temperature] = Field(min_length=1, max_length=16)
    lengths: list[Annotated[int, Field(ge=1, le=2**24)]] = Field(min_length=1, max_length=4096)
    """Tokens of each sample."""


Table = Literal["head", "words"]


class AskTable(Body):
    """For a copy of the teacher's head or of its input embedding."""

    teacher: Name
    table: Table
    codec: SignalCodec = "bfloat16"
    """Of the signals that the head is for; the embedding is always bfloat16."""

    @property
    def key(self) -> str:
        """What the answer must be of."""
        return f"{self.table}|{self.codec}|{self.teacher}"


class Told(Body):
    """The beginning of an answer; its bytes follow the map."""

    key: str = Field(max_length=600)
    """What was asked for."""
    nbytes: int = Field(ge=0)
    """Of all parts."""
    softcap: float | None = None
    """Of a head."""


def told(seq: int, head: Told, content: bytes) -> Iterator[Frame]:
    """The frames of an answer."""
    view = memoryview(content)
    yield with_bytes(Kind.TOLD, head, bytes(view[:PART_BYTES]), seq=seq)
    for at in range(PART_BYTES, len(content), PART_BYTES):
        yield Frame(Kind.PART, seq=seq, payload=bytes(view[at : at + PART_BYTES]))


def pack_batch(batch: Batch, words: int) -> tuple[list[int], bytes]:
    """The samples' lengths, and their ids with one bit each for whether the next one is to be learned.

    Raises:
        DataError: an id is beyond the teacher's, or it is no right-padded batch with the next tokens as labels.
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
    if bool(((used < 0) | (used >= words)).any()):
        raise DataError(f"a batch holds ids {int(used.min())} to {int(used.max())}; the teacher's are 0 to {words - 1}")
    raw = encode_ids(used, words).numpy().tobytes() + np.packbits(bits[valid].numpy()).tobytes()
    return lengths.tolist(), raw


def unpack_batch(lengths: Sequence[int], raw: bytes, words: int) -> Batch:
    """The batch that :func:`pack_batch` packed, padded with zeros.

    Raises:
        ValueError: the bytes are not as many as the lengths imply, an id is unknown, or nothing is to be learned.
    """
    tokens, width = sum(lengths), id_bytes(words)
    if len(raw) != tokens * width + -(-tokens // 8):
        expected = f"{tokens * width + -(-tokens // 8)} bytes"
        raise ValueError(f"{len(raw)} bytes for {tokens} tokens of {width} bytes and one bit each; expected {expected}")
    coded = np.frombuffer(raw, dtype=np.uint8)
    used = decode_ids(torch.from_numpy(coded[: tokens * width].copy()).view(tokens, width))
    if int(used.max()) >= words:
        raise ValueError(f"id {int(used.max())}; allowed: 0 to {words - 1}")
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
