"""Messages from their pieces: large raw bytes cross a link in several frames, and go on where a connection broke."""

from __future__ import annotations

from dataclasses import replace

from raycloud.link.frames import Frame, FrameError


class MessageTooLarge(FrameError):
    """Error of a message with more raw bytes than are allowed."""


class PieceAssembler:
    """Assembler of messages from pieces, one message at a time.

    It outlives a connection, so that a message continues on the next one. Memory grows with the bytes that have
    arrived, not with those that are announced.
    """

    def __init__(self) -> None:
        self._head: Frame | None = None
        self._raw = bytearray()
        self._refused: int | None = None

    def received(self, seq: int) -> int:
        """Return how many raw bytes of the message ``seq`` have arrived; 0 if it is not the one in progress."""
        return len(self._raw) if self._head is not None and self._head.seq == seq else 0

    def add(self, piece: Frame, most: int) -> Frame | None:
        """Add a piece; return the whole message after its last one, otherwise None.

        Further pieces of a message that was too large are dropped.

        Args:
            piece: frame as it arrived.
            most: largest number of raw bytes of a message.

        Raises:
            MessageTooLarge: the message has more raw bytes; raised once.
            FrameError: the piece does not continue the message in progress.
        """
        if piece.offset == 0:
            self._refused = None
            size = len(piece.raw) + piece.rest
            if size > most:
                self._head, self._refused = None, piece.seq
                raise MessageTooLarge(f"{piece.kind.name}: {size} raw bytes; allowed: {most}")
            if not piece.rest:
                return piece
            self._head, self._raw = piece, bytearray(piece.raw)
            return None
        if piece.seq == self._refused:
            return None
        head = self._head
        if head is None or (piece.kind, piece.seq, piece.offset) != (head.kind, head.seq, len(self._raw)):
            raise FrameError(f"{piece.kind.name}: a piece from byte {piece.offset} on continues no message")
        if len(self._raw) + len(piece.raw) + piece.rest != len(head.raw) + head.rest or not piece.raw:
            raise FrameError(f"{piece.kind.name}: the size of the message changed")
        self._raw += piece.raw
        if piece.rest:
            return None
        whole = replace(piece, body=head.body, raw=bytes(self._raw), offset=0)
        self._head, self._raw = None, bytearray()
        return whole
