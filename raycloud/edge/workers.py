"""Generations in threads of their own, read from the event loop, so many at once and so many waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

from raycloud.models.text import Piece

_Pieces = Generator[Piece, None, None]


class Busy(Exception):
    """As many generations run and wait as are allowed."""


class Stopping(Exception):
    """The server ends before the text does."""


class Generation:
    """The pieces of one text, made in a thread and read with ``async for``.

    A whole generation runs in one thread: what a model or a socket keeps per thread stays with it.

    Args:
        pieces: closed by the thread as soon as it ends, fails or is cancelled.
    """

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Piece:
        match await self._queue.get():
            case Piece() as piece:
                return piece
            case None:
                raise StopAsyncIteration
            case error:
                raise error

    def cancel(self) -> None:
        """Nobody reads on: the thread ends before its next piece."""
        self._cancelled.set()

    def stop(self) -> None:
        """Let the reader hear that the server ends, and end the thread before its next piece.

        Raised there: :class:`Stopping`.
        """
        self.cancel()
        self._tell(Stopping())

    def work(self) -> None:
        """Make the pieces; called in the thread."""
        with closing(self._pieces):
            try:
                if not self._cancelled.is_set():
                    for piece in self._pieces:
                        self._tell(piece)
                        if self._cancelled.is_set():
                            return
            except Exception as error:  # the reader raises it where it can be answered
                self._tell(error)
            else:
                self._tell(None)

    def _tell(self, what: Piece | Exception | None) -> None:
        with suppress(RuntimeError):  # the server is gone, and so is its loop
            self._loop.call_soon_threadsafe(self._queue.put_nowait, what)


class Workers:
    """Runs so many generations at once.

    Args:
        running: threads.
        waiting: generations that may wait for one.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._threads = ThreadPoolExecutor(running, thread_name_prefix="generation")
        self._most = running + waiting
        self._generations: set[Generation] = set()

    @property
    def active(self) -> int:
        """Generations that run or wait."""
        return len(self._generations)

    def start(self, pieces: _Pieces) -> Generation:
        """Begin a generation, or queue it.

        Raises:
            Busy: too many wait already.
        """
        if self.active >= self._most:
            raise Busy
        generation = Generation(pieces)
        self._generations.add(generation)
        done = self._threads.submit(generation.work)
        done.add_done_callback(lambda _: self._generations.discard(generation))
        return generation

    def close(self) -> None:
        """Stop what runs and waits."""
        for generation in tuple(self._generations):
            generation.stop()
        self._threads.shutdown(wait=False)
