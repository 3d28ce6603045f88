"""A source of tokens that says what a test told it to, and a server on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from raycloud.edge.server import Server, address_of, bind
from raycloud.models.sampling import GREEDY, Sampling
from raycloud.models.text import TextModel


class Script:
    """Says one text over and over; counts what is open."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        repeat: int = 1,
        max_length: int = 1000,
        pause_s: float = 0.0,
        error: Exception | None = None,
        gate: threading.Event | None = None,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.ids = tokenizer(text, add_special_tokens=False)["input_ids"] * repeat
        self.pause_s, self.error, self.gate = pause_s, error, gate
        self.given, self.open, self.most_open = 0, 0, 0
        self.asked: list[tuple[list[int], int, Sampling]] = []
        self._lock = threading.Lock()

    def stream(
        self, prompt: Sequence[int], limit: int, sampling: Sampling = GREEDY, eos: Collection[int] = ()
    ) -> Iterator[int]:
        with self._lock:
            self.asked.append((list(prompt), limit, sampling))
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            if self.gate is not None:
                assert self.gate.wait(20)
            for token in self.ids[:limit]:
                time.sleep(self.pause_s)
                self.given += 1
                yield token
            if self.error is not None:
                raise self.error
        finally:
            with self._lock:
                self.open -= 1

    @property
    def model(self) -> TextModel:
        return TextModel(self, self.tokenizer, frozenset())

    def wait_closed(self, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while self.open and time.monotonic() < end:
            time.sleep(0.01)
        assert self.open == 0


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The base URL of the application on a free port of this machine."""
    with bind("127.0.0.1", 0, None) as listening:
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield address_of(listening)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
