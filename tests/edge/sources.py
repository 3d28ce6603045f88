"""Fake source of tokens, and a server on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from raycloud.edge.server import Server, address_of, bind
from raycloud.link.channel import Loopback
from raycloud.models.generation import Decoding, Token
from raycloud.models.sampling import Sampling
from raycloud.models.text_model import TextModel
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.client import RemoteBlocks, SessionConfig
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.generation import SplitTokenSource, text_model
from raycloud.split.inference.server import InferenceServer
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet


class Script:
    """Source that repeats one text, and counts its open streams."""

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

    def tokens(self, prompt: Sequence[int], limit: int, decoding: Decoding) -> Iterator[Token]:
        with self._lock:
            self.asked.append((list(prompt), limit, decoding.sampling))
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            if self.gate is not None:
                assert self.gate.wait(120)
            for token in self.ids[:limit]:
                time.sleep(self.pause_s)
                self.given += 1
                yield Token(token)
            if self.error is not None:
                raise self.error
        finally:
            with self._lock:
                self.open -= 1

    @property
    def model(self) -> TextModel:
        return TextModel(self, self.tokenizer, frozenset())

    def wait_closed(self) -> None:
        end = time.monotonic() + 120
        while self.open and time.monotonic() < end:
            time.sleep(0.01)
        assert self.open == 0


@contextmanager
def running(app: FastAPI, **options: Any) -> Iterator[str]:
    """Serve the application on a free port of this machine; yield its base URL."""
    with bind("127.0.0.1", 0, None) as listening:
        server = Server(app, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield address_of(listening)
        finally:
            server.should_exit = True
            thread.join(120)
            assert not thread.is_alive()


@contextmanager
def cut(folder: Path, plan: PlanSet) -> Iterator[TextModel]:
    """Load a model whose middle blocks run behind a link in this process, with the frames and codec of a network."""
    edge, cloud = load_edge(str(folder), plan), load_cloud(str(folder), plan)
    codecs, engine = CutCodecs(edge.config.hidden_size), InferenceEngine(cloud, threads=1)
    host = InferenceServer(engine, codecs)
    with closing(engine), closing(Loopback(lambda connection: host.serve(connection, "me"))) as loopback:
        terms = SessionConfig(edge.fingerprint, plan, codecs, "float32", 2048)
        middle = partial(RemoteBlocks, lambda _: loopback.connect(), terms)
        yield text_model(edge, SplitTokenSource(edge.first, edge.last, middle, plan, max_length=2048))
