"""Bad days, for real: Ray Serve, SmolLM2 and OpenAI-style sessions while replicas die and sockets break.

Every generation must finish with the very tokens an undisturbed one gives, or end with one clear error; the cloud must
serve the others throughout and free every session.
"""

from __future__ import annotations

import itertools
import json
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import ray
import torch
from ray import serve

from raycloud.benchmarks.local_cloud import local_cloud
from raycloud.benchmarks.measure import SMOLLM2, show
from raycloud.edge.cloud import Cloud, remote
from raycloud.errors import LinkError, RaycloudError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import MAX_FRAME, Frame, Kind, Open, Refusal, body, unpack
from raycloud.link.meter import Meter
from raycloud.link.websocket import WebSocketChannel
from raycloud.models.text import TextModel
from raycloud.report.console import working
from raycloud.serving.split import SplitSettings, app
from raycloud.split.cloud.limits import Limits
from raycloud.split.middle import Trip
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.remote import RemoteMiddle, Terms
from raycloud.split.terms import CODEC_NUMBERS, Codecs

FIRST, SECOND, NEW, WIDTH = 4, 26, 24, 576
# Lossy: what is replayed must be the very bytes that were sent.
CODEC = "bfloat16"
TOKEN, OTHER_TOKEN = "benchmark", "somebody-else"
LEASE_S, PATIENCE_S = 8.0, 90.0
BAD_FRAMES, IDLE_SOCKETS = 10_000, 200
CUT_AFTER = (60, 300, 700, 5_000, 30_000, 50_001, 75_003, 90_017, 100_000, 110_101, 120_000, 125_555)
_PROMPTS = ("Describe the sea in winter.", "How does a bicycle stay upright?", "What is a lighthouse for?")


@dataclass
class Score:
    """How the generations ended."""

    faults: int = 0
    exact: int = 0
    clear: int = 0
    wrong: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self, *, exact: bool = False, clear: bool = False, note: str = "") -> str:
        """Count one: with the right tokens, with a clear error, or wrong."""
        with self._lock:
            self.clear += clear
            self.exact += exact
            self.wrong += not (clear or exact)
        return f"error: {note}" if clear else "exact" if exact else "WRONG TOKENS"


class CuttingProxy:
    """A TCP relay that breaks a connection after so many bytes, in the middle of whatever is crossing."""

    def __init__(self, port: int) -> None:
        self._target, self._budgets = port, list[int]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def plan(self, budgets: list[int]) -> None:
        """The next connections break after these numbers of bytes; those behind them do not."""
        self._budgets = list(budgets)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                budget = [self._budgets.pop(0)] if self._budgets else [-1]
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(source, sink, budget), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, budget: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if 0 <= budget[0] <= len(data):
                    sink.sendall(data[: budget[0]])
                    self.cuts += 1
                    break
                budget[0] -= len(data) if budget[0] > 0 else 0
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()


@dataclass(frozen=True)
class WatchedCloud(Cloud):
    """A cloud that remembers the sessions it was asked for."""

    asked: list[str] = field(default_factory=list)

    def channel(self, meter: Meter, session: str) -> Channel:
        """A new channel for a session."""
        self.asked.append(session)
        return super().channel(meter, session)


class Bench:
    """The running cloud and what is done to it."""

    def __init__(self, cloud: WatchedCloud, settings: SplitSettings) -> None:
        self.cloud, self.settings, self.score = cloud, settings, Score()
        self.model = self.reach(cloud)
        self.offer = cloud.offer()
        self.prompts = [self.model.chat_prompt([{"role": "user", "content": text}]) for text in _PROMPTS]
        self.references = [self.tokens(self.model, prompt) for prompt in self.prompts]
        self._turn = itertools.count()

    def reach(self, cloud: Cloud) -> TextModel:
        """The edge's side of the model."""
        return remote(SMOLLM2, cloud, codec=CODEC, device="cpu", dtype="float32", patience_s=PATIENCE_S)

    def tokens(self, model: TextModel, prompt: list[int]) -> list[int]:
        """One generation."""
        return list(model.source.stream(prompt, NEW))

    def generate(self, model: TextModel | None = None) -> str:
        """One counted generation of the next prompt; how it ended."""
        index = next(self._turn) % len(self.prompts)
        try:
            made = self.tokens(model or self.model, self.prompts[index])
        except RaycloudError as error:
            return self.score.ended(clear=True, note=str(error))
        return self.score.ended(exact=made == self.references[index])

    @contextmanager
    def meanwhile(self, count: int = 1) -> Iterator[list[str]]:
        """Generations beside what happens in the block; how each ended, once it is left."""
        ends: list[str] = []
        threads = [threading.Thread(target=lambda: ends.append(self.generate())) for _ in range(count)]
        for thread in threads:
            thread.start()
        # Into the middle of them.
        time.sleep(0.5)
        yield ends
        for thread in threads:
            thread.join()

    def connect(self, token: str = TOKEN) -> WebSocketChannel:
        """A bare connection."""
        return WebSocketChannel(self.cloud.url, token=token)

    def open(self) -> tuple[WebSocketChannel, bytes]:
        """A bare connection with a session."""
        channel, session = self.connect(), secrets.token_bytes(16)
        asked = Open(fingerprint=self.offer.fingerprint, codec=CODEC, firsts=[FIRST], seconds=[SECOND], max_tokens=2048)
        channel.send(Frame(Kind.OPEN, session, payload=asked.pack()).pack())
        if unpack(channel.receive(30)).kind is Kind.OPEN_OK:
            return channel, session
        # The cloud holds as many sessions of one principal as it wants to: broken ones go when their leases end.
        channel.close()
        time.sleep(1)
        return self.open()

    def middle(self) -> RemoteMiddle:
        """The middle as the edge sees it."""
        plans = PlanSet.of(SplitPlan(FIRST, SECOND))
        terms = Terms(self.offer.fingerprint, plans, Codecs(WIDTH), CODEC, 2048, PATIENCE_S)
        return RemoteMiddle(lambda _: self.connect(), terms)

    def sessions(self) -> int:
        """What the cloud says it holds."""
        with urlopen(f"http://{urlsplit(self.cloud.url).netloc}/healthz", timeout=30) as answer:
            return int(json.load(answer)["sessions"])


# -- the faults; each says how many it injected and what came of it


def cut_sockets(bench: Bench) -> tuple[int, str]:
    """The connection breaks after so many bytes, also in frames and handshakes; twice in one generation."""
    parts = urlsplit(bench.cloud.url)
    assert parts.port is not None
    proxy = CuttingProxy(parts.port)
    model = bench.reach(replace(bench.cloud, url=f"ws://127.0.0.1:{proxy.port}{parts.path}"))
    ends = []
    for place in CUT_AFTER:
        proxy.plan([place, 2 * place])
        ends.append(bench.generate(model))
    proxy.close()
    return proxy.cuts, _summary(ends)


def kill_replicas(bench: Bench) -> tuple[int, str]:
    """The replica's process dies in mid-generation, twice; its keys and values are gone."""
    ends = []
    for _ in range(2):
        with bench.meanwhile(2) as ended:
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if "#split#" in actor["name"]:
                    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
        ends += ended
    return 2, _summary(ends)


def restart_cloud(bench: Bench) -> tuple[int, str]:
    """The application is taken away and deployed again."""
    with bench.meanwhile() as ends:
        serve.delete("split")
        serve.run(app(bench.settings), name="split", route_prefix="/")
    return 1, _summary(ends)


def connect_twice(bench: Bench) -> tuple[int, str]:
    """Somebody with the same token takes a running session over; somebody with another token tries to."""
    answers = []
    with bench.meanwhile() as ends:
        session = bytes.fromhex(bench.cloud.asked[-1])
        for token, epoch in ((OTHER_TOKEN, 7), (TOKEN, 0), (TOKEN, 3)):
            channel = bench.connect(token)
            channel.send(Frame(Kind.RESUME, session, epoch).pack())
            answer = unpack(channel.receive(30))
            answers.append(body(answer, Refusal).code if answer.kind is Kind.ERROR else answer.kind.name)
            channel.close()
    return 3, f"{_summary(ends)}; other token: {answers[0]}, old epoch: {answers[1]}, newer epoch: {answers[2]}"


def bad_frames(bench: Bench) -> tuple[int, str]:
    """Corrupted, truncated, oversized, reordered and senseless frames, and rows that are no numbers."""
    source, sent, refused = random.Random(0), 0, 0
    boundary = Codecs(WIDTH).boundary(CODEC, FIRST)
    with bench.meanwhile(2) as ends:
        while sent < BAD_FRAMES:
            channel, session = bench.open()
            good = Frame(
                Kind.STEP, session, 0, 1, rows=1, out_rows=1, first=FIRST, second=SECOND, codec=CODEC_NUMBERS[CODEC]
            )
            good = replace(good, payload=boundary.encode(torch.zeros(1, WIDTH), 0).numpy().tobytes())
            mild = [make(good, source) for make in source.choices(_MILD, k=min(100, BAD_FRAMES - sent - 1))]
            for data in (*mild, source.choice(_FATAL)(good, source)):
                with suppress(LinkDown):
                    channel.send(data)
                sent += 1
                try:
                    refused += unpack(channel.receive(30)).kind is Kind.ERROR
                except LinkDown:
                    refused += 1
                    break
            channel.close()
    return sent, f"{refused} of {sent} refused; beside them {_summary(ends)}"


def _with(**changes: Any) -> Callable[[Frame, random.Random], bytes]:
    return lambda frame, source: replace(frame, **changes).pack()


# Refused one by one: the connection and its session stay.
_MILD: list[Callable[[Frame, random.Random], bytes]] = [
    _with(seq=2),
    _with(seq=2**40),
    _with(kind=Kind.OPEN),
    _with(kind=Kind.STEP_OK),
    _with(rows=2),
    _with(rows=4_000_000_000),
    _with(pos=5),
    _with(keep=9),
    _with(out_rows=2),
    _with(first=FIRST + 1),
    _with(second=SECOND - 1),
    _with(codec=0),
    _with(payload=b""),
]


def _flipped(frame: Frame, source: random.Random) -> bytes:
    data = bytearray(frame.pack())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    return bytes(data)


# After these nothing on the connection, or in the session, can be trusted any more.
_FATAL: list[Callable[[Frame, random.Random], bytes]] = [
    _flipped,
    lambda frame, source: frame.pack()[: source.randrange(len(frame.pack()))],
    lambda frame, source: frame.pack() + bytes(source.randrange(1, 2_000_000)),
    lambda frame, source: source.randbytes(source.randrange(4096)),
    lambda frame, source: bytes(MAX_FRAME + 1),
    lambda frame, source: replace(frame, payload=b"\xff" * len(frame.payload)).pack(),
    lambda frame, source: replace(frame, session=bytes(16)).pack(),
    lambda frame, source: replace(frame, epoch=1).pack(),
]


def not_a_number(bench: Bench) -> tuple[int, str]:
    """An edge whose own rows overflow is told so."""
    middle = bench.middle()
    rows = torch.full((1, 3, WIDTH), float("nan"))
    middle.send(Trip(SplitPlan(FIRST, SECOND), rows, 0, 3, 0))
    try:
        middle.receive()
    except LinkError as error:
        return 1, bench.score.ended(clear=True, note=str(error))
    return 1, bench.score.ended(exact=False)


def idle_sockets(bench: Bench) -> tuple[int, str]:
    """Connections that never say anything."""
    channels = [bench.connect() for _ in range(IDLE_SOCKETS)]
    ends = [bench.generate() for _ in range(2)]
    closed = 0
    for channel in channels:
        try:
            channel.receive(30)
        except LinkDown:
            closed += 1
        channel.close()
    return IDLE_SOCKETS, f"{closed} closed by the cloud; beside them {_summary(ends)}"


def slow_reader(bench: Bench) -> tuple[int, str]:
    """An edge that sends one chunk after the other and takes no reply."""
    channel, session = bench.open()
    boundary = Codecs(WIDTH).boundary(CODEC, FIRST)
    payload = boundary.encode(torch.zeros(512, WIDTH), 0).numpy().tobytes()
    sent, stop = 0, threading.Event()

    def send() -> None:
        nonlocal sent
        with suppress(LinkDown):
            while not stop.is_set():
                sent += 1
                step = Frame(
                    Kind.STEP, session, 0, sent, rows=512, out_rows=512, first=FIRST, second=SECOND,
                    codec=CODEC_NUMBERS[CODEC], payload=payload,
                )  # fmt: skip
                channel.send(step.pack())

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    ends = [bench.generate() for _ in range(2)]
    stop.set()
    channel.close()
    thread.join(5)
    return 1, f"{sent} chunks taken from it; beside it {_summary(ends)}"


FAULTS: tuple[Callable[[Bench], tuple[int, str]], ...] = (
    cut_sockets,
    kill_replicas,
    restart_cloud,
    connect_twice,
    bad_frames,
    not_a_number,
    idle_sockets,
    slow_reader,
)


def _summary(ends: list[str]) -> str:
    return ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)) or "nothing ended"


def run(as_json: bool) -> dict[str, Any]:
    """Inject every fault and print what came of it."""
    limits = Limits(lease_s=LEASE_S, send_s=5.0, tokens=2048)
    settings = SplitSettings(
        model=SMOLLM2, first=FIRST, second=SECOND, token=f"{TOKEN},{OTHER_TOKEN}", limits=limits, threads=1
    )
    torch.set_num_threads(1)
    rows = []
    with local_cloud(settings) as cloud:
        bench = Bench(WatchedCloud(cloud.url, cloud.token), settings)
        score = bench.score
        for fault in FAULTS:
            with working(fault.__name__.replace("_", " ")):
                count, outcome = fault(bench)
            score.faults += count
            rows.append([fault.__name__.replace("_", " "), str(count), outcome])
        with working("waiting for leases to end"):
            time.sleep(LEASE_S + 3)
        rows.append(["afterwards", "", bench.generate()])
        time.sleep(1)
        leaked = bench.sessions()
    result = {
        "faults_injected": score.faults,
        "completed_exact": score.exact,
        "clear_errors": score.clear,
        "wrong_tokens": score.wrong,
        "leaked_sessions": leaked,
    }
    rows.append(["sessions left", "", str(leaked)])
    show("Bad days of a split model on Ray Serve", ["fault", "injected", "outcome"], rows, result, as_json)
    return result
