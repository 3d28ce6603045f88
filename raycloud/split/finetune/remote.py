"""The cloud at the other end of a link: a session that outlives broken connections, and checkpoints of both sides."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from raycloud.link.caller import Caller
from raycloud.link.channel import Channel
from raycloud.link.frames import Frame, Granted, Kind, with_bytes
from raycloud.split.finetune.code import tensors_of
from raycloud.split.finetune.messages import PIECE_BYTES, Begin, Piece, Saved

_REPLIES = (
    Kind.FWD_OK,
    Kind.BWD_OK,
    Kind.LEARN_OK,
    Kind.JUDGE_OK,
    Kind.OPT_OK,
    Kind.SAVE_OK,
    Kind.CODE_OK,
    Kind.FIT_OK,
    Kind.GIVE_OK,
    Kind.ROUND_OK,
    Kind.TAKE_OK,
)


class RemoteCloud:
    """A cloud behind a channel. Requests are answered once each, however often the channel breaks.

    Args:
        connect: opens a channel; called again whenever one breaks, with the session's id.
        asked: what both sides agree on.
        decoder: the cloud's end of the first cut's code, sent to it unless it goes on from a checkpoint.
        patience_s: how long nothing may come back, reconnecting included; longer than any one request takes once its
            turn has come.

    Raises:
        LinkError: the cloud cannot be reached in time, or refuses.
    """

    def __init__(
        self, connect: Callable[[str], Channel], asked: Begin, decoder: nn.Module, patience_s: float = 60.0
    ) -> None:
        self._caller: Caller[Frame, Granted] = Caller(
            connect, asked, Granted, lambda frame: frame, None, _REPLIES, patience_s
        )
        if asked.up.narrow and asked.restore is None:
            packed = tensors_of(decoder)
            for at in range(0, len(packed), PIECE_BYTES):
                ours = Piece(up=True, at=at, size=len(packed))
                self.send(with_bytes(Kind.CODE, ours, packed[at : at + PIECE_BYTES]))
                self.receive()

    def send(self, request: Frame) -> None:
        """Send it off, or keep it until the cloud has room."""
        self._caller.send([request])

    def receive(self) -> Frame:
        """The answer to the oldest request that has none yet.

        Raises:
            SessionLost: both sides must go on from their last common checkpoint.
            LinkError: the link cannot be mended, or the cloud refuses.
        """
        return self._caller.receive()[1]

    def save(self, step: int) -> None:
        """Have the cloud keep what this step goes on from."""
        self.send(with_bytes(Kind.SAVE, Saved(step=step)))
        self.receive()

    def close(self) -> None:
        """End the session."""
        self._caller.close()
