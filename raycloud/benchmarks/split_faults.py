"""Fault injection: generations of SmolLM2 over Ray Serve while replicas die and sockets break.

Every generation must finish with exactly the tokens of an undisturbed run, or end with one clear error. The cloud must
keep serving other sessions and free every session.
"""

from __future__ import annotations

import itertools
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request

import torch

from raycloud.benchmarks.breaking_proxy import BreakingProxy
from raycloud.benchmarks.local_cloud import ServedApplication, served
from raycloud.benchmarks.measure import SMOLLM2, Measured
from raycloud.edge.endpoint import CloudEndpoint, load_split
from raycloud.errors import LinkError, RaycloudError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import MAX_FRAME, ErrorReply, Frame, ResumeRequest, SessionKind, parse_body, unpack
from raycloud.link.meter import Meter
from raycloud.link.proxy import open_url
from raycloud.link.websocket import WebSocketChannel
from raycloud.models.text_model import TextModel
from raycloud.report.console import timed
from raycloud.serving.split import SplitSettings, app
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.blocks import StepRequest
from raycloud.split.inference.client import RemoteBlocks, SessionConfig
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.inference.messages import InferenceKind, OpenInference, StepMessage
from raycloud.split.plan import PlanSet, SplitPlan

FIRST, SECOND, NEW, WIDTH = 4, 26, 24, 576
# A lossy codec, so that a replay is exact only if it sends the same bytes again.
CODEC = "bfloat16"
TOKEN, OTHER_TOKEN = "benchmark", "somebody-else"
LEASE_S, LEASES_END_S, PATIENCE_S = 8.0, 40.0, 90.0
BAD_FRAMES, IDLE_SOCKETS, KILLS = 10_000, 200, 2
CUT_AFTER = (60, 300, 700, 5_000, 30_000, 50_001, 75_003, 90_017, 100_000, 110_101, 120_000, 125_555)
QUICK = {"new": 12, "cut_after": (60, 30_000), "kills": 1, "bad_frames": 200, "idle_sockets": 8}
_PROMPTS = ("Describe the sea in winter.", "How does a bicycle stay upright?", "What is a lighthouse for?")


@dataclass
class OutcomeCounts:
    """Outcomes of the generations, and the number of injected faults."""

    faults: int = 0
    exact: int = 0
    clear: int = 0
    wrong: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self, *, exact: bool = False, clear: bool = False, note: str = "") -> str:
        """Count one generation as exact, as ended by a clear error, or as wrong; return a description."""
        with self._lock:
            self.clear += clear
            self.exact += exact
            self.wrong += not (clear or exact)
        return f"error: {note}" if clear else "exact" if exact else "WRONG TOKENS"


@dataclass(frozen=True)
class RecordingCloud(CloudEndpoint):
    """Cloud endpoint that records the ids of the sessions opened through it."""

    asked: list[str] = field(default_factory=list)

    def channel(self, meter: Meter, session: str) -> Channel:
        """Open a new channel for a session."""
        self.asked.append(session)
        return super().channel(meter, session)


@dataclass(frozen=True)
class Faults:
    """Number of faults of each kind, and number of tokens per generation; see :data:`FAULTS`."""

    new: int
    cut_after: tuple[int, ...]
    kills: int
    bad_frames: int
    idle_sockets: int


class FaultBench:
    """Running cloud, with the operations that the faults use.

    Args:
        running: application on Ray Serve.
        faults: number of faults of each kind.
    """

    def __init__(self, running: ServedApplication, faults: Faults) -> None:
        self.running, self.faults, self.score = running, faults, OutcomeCounts()
        self.cloud = cloud = RecordingCloud(f"{running.url}/v1/split", TOKEN)
        self.model = self.reach(cloud)
        self.server_info = cloud.server_info()
        self.prompts = [self.model.chat_prompt([{"role": "user", "content": text}]) for text in _PROMPTS]
        self.references = [self.tokens(self.model, prompt) for prompt in self.prompts]
        self._turn = itertools.count()

    def reach(self, cloud: CloudEndpoint) -> TextModel:
        """Load the edge part of the model, connected to a cloud."""
        return load_split(SMOLLM2, cloud, codec=CODEC, device="cpu", dtype="float32", patience_s=PATIENCE_S)

    def tokens(self, model: TextModel, prompt: list[int], begun: threading.Event | None = None) -> list[int]:
        """Generate tokens once; ``begun`` is set at the first token."""
        made = []
        for token in model.source.stream(prompt, self.faults.new):
            made.append(token)
            if begun is not None:
                begun.set()
        return made

    def generate(self, model: TextModel | None = None, begun: threading.Event | None = None) -> str:
        """Generate from the next prompt, count the outcome, and describe it."""
        index = next(self._turn) % len(self.prompts)
        try:
            made = self.tokens(model or self.model, self.prompts[index], begun)
        except RaycloudError as error:
            return self.score.ended(clear=True, note=str(error))
        return self.score.ended(exact=made == self.references[index])

    @contextmanager
    def meanwhile(self, count: int = 1) -> Iterator[list[str]]:
        """Run generations in threads during the block, which starts after their first tokens.

        Yields:
            The list of outcomes, complete after the block.
        """
        ends: list[str] = []
        begun = [threading.Event() for _ in range(count)]
        threads = [threading.Thread(target=lambda one=one: ends.append(self.generate(begun=one))) for one in begun]
        for thread in threads:
            thread.start()
        # Wait until all generations have begun.
        for one in begun:
            one.wait(PATIENCE_S)
        yield ends
        for thread in threads:
            thread.join()

    def connect(self, token: str = TOKEN) -> WebSocketChannel:
        """Open a connection without a session."""
        return WebSocketChannel(self.cloud.url, token=token)

    def open(self) -> tuple[WebSocketChannel, bytes]:
        """Open a connection and a session on it."""
        channel, session = self.connect(), secrets.token_bytes(16)
        asked = OpenInference(
            fingerprint=self.server_info.fingerprint,
            codec=CODEC,
            start_blocks=[FIRST],
            end_blocks=[SECOND],
            max_tokens=2048,
        )
        channel.send(Frame(SessionKind.OPEN, session, body=asked.pack()).pack())
        if unpack(channel.receive(30), InferenceKind).kind is SessionKind.OPEN_OK:
            return channel, session
        # The cloud limits the sessions of one principal: broken sessions count until their leases end.
        channel.close()
        time.sleep(1)
        return self.open()

    def middle(self) -> RemoteBlocks:
        """Make the edge's client of the middle blocks."""
        plans = PlanSet.of(SplitPlan(FIRST, SECOND))
        config = SessionConfig(self.server_info.fingerprint, plans, CutCodecs(WIDTH), CODEC, 2048, PATIENCE_S)
        return RemoteBlocks(lambda _: self.connect(), config)

    def sessions_left(self) -> int:
        """Return the number of sessions the cloud still holds; wait until it is zero or every lease must have ended."""
        until = time.monotonic() + LEASES_END_S
        while True:
            with open_url(Request(f"http://{urlsplit(self.cloud.url).netloc}/healthz"), timeout_s=30) as answer:
                held = int(json.load(answer)["sessions"])
            if not held or time.monotonic() > until:
                return held
            time.sleep(0.5)


# -- faults; each function returns the number of injected faults and a description of the outcome


def cut_sockets(bench: FaultBench) -> tuple[int, str]:
    """Break the connection twice per generation after a number of bytes, also within frames and handshakes."""
    parts = urlsplit(bench.cloud.url)
    assert parts.port is not None
    proxy = BreakingProxy(parts.port)
    model = bench.reach(replace(bench.cloud, url=f"ws://127.0.0.1:{proxy.port}{parts.path}"))
    ends = []
    for limit in bench.faults.cut_after:
        proxy.plan([limit, 2 * limit])
        ends.append(bench.generate(model))
    proxy.close()
    return proxy.cuts, _summary(ends)


def kill_replicas(bench: FaultBench) -> tuple[int, str]:
    """Kill the replica's process during generations, repeatedly; its KV cache is lost."""
    ends, killed = [], 0
    for _ in range(bench.faults.kills):
        with bench.meanwhile(2) as ended:
            killed += bench.running.kill_replicas()
        ends += ended
    return killed, _summary(ends)


def restart_cloud(bench: FaultBench) -> tuple[int, str]:
    """Delete the application during a generation and deploy it again."""
    with bench.meanwhile() as ends:
        bench.running.undeploy()
        bench.running.deploy()
    return 1, _summary(ends)


def connect_twice(bench: FaultBench) -> tuple[int, str]:
    """Resume a running session from other connections: with another token, an old epoch, and a newer epoch."""
    answers = []
    with bench.meanwhile() as ends:
        session = bytes.fromhex(bench.cloud.asked[-1])
        for token, epoch in ((OTHER_TOKEN, 7), (TOKEN, 0), (TOKEN, 3)):
            channel = bench.connect(token)
            channel.send(Frame(SessionKind.RESUME, session, epoch, body=ResumeRequest().pack()).pack())
            answer = unpack(channel.receive(30), InferenceKind)
            answers.append(
                parse_body(answer, ErrorReply).code if answer.kind is SessionKind.ERROR else answer.kind.name
            )
            channel.close()
    return 3, f"{_summary(ends)}; other token: {answers[0]}, old epoch: {answers[1]}, newer epoch: {answers[2]}"


def bad_frames(bench: FaultBench) -> tuple[int, str]:
    """Send corrupted, truncated, oversized, reordered and invalid frames, and hidden states that are not finite."""
    source, sent, refused = random.Random(0), 0, 0
    cut_codec = CutCodecs(WIDTH).cut_codec(CODEC, FIRST)
    with bench.meanwhile(2) as ends:
        while sent < bench.faults.bad_frames:
            channel, session = bench.open()
            coded = cut_codec.encode(torch.zeros(1, WIDTH), 0).numpy().tobytes()
            good = Frame(InferenceKind.STEP, session, 0, 1, body=_STEP.pack(), raw=coded)
            mild = [
                make(good, source) for make in source.choices(_MILD, k=min(100, bench.faults.bad_frames - sent - 1))
            ]
            for data in (*mild, source.choice(_FATAL)(good, source)):
                with suppress(LinkDown):
                    channel.send(data)
                sent += 1
                try:
                    refused += unpack(channel.receive(30), InferenceKind).kind is SessionKind.ERROR
                except LinkDown:
                    refused += 1
                    break
            channel.close()
    return sent, f"{refused} of {sent} refused; meanwhile {_summary(ends)}"


_STEP = StepMessage(FIRST, SECOND, keep=0, start=0, tokens=1, wanted=1)


def _with(**changes: Any) -> Callable[[Frame, random.Random], bytes]:
    """Make a frame with other values of its header or its raw bytes."""
    return lambda frame, source: replace(frame, **changes).pack()


def _step(**changes: int) -> Callable[[Frame, random.Random], bytes]:
    """Make a frame with other numbers in its step."""
    return _with(body=replace(_STEP, **changes).pack())


# Frames that are refused one by one; the connection and its session stay open.
_MILD: list[Callable[[Frame, random.Random], bytes]] = [
    _with(seq=2),
    _with(seq=2**31),
    _with(kind=SessionKind.OPEN),
    _with(kind=InferenceKind.STEP_OK),
    _step(tokens=2),
    _step(tokens=65_535),
    _step(start=5),
    _step(keep=9),
    _step(wanted=2),
    _step(start_block=FIRST + 1),
    _step(end_block=SECOND - 1),
    _with(body=b"short"),
    _with(raw=b""),
]


def _flipped(frame: Frame, source: random.Random) -> bytes:
    data = bytearray(frame.pack())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    return bytes(data)


# Frames after which the connection or the session must be closed.
_FATAL: list[Callable[[Frame, random.Random], bytes]] = [
    _flipped,
    lambda frame, source: frame.pack()[: source.randrange(len(frame.pack()))],
    lambda frame, source: frame.pack() + bytes(source.randrange(1, 2_000_000)),
    lambda frame, source: source.randbytes(source.randrange(4096)),
    lambda frame, source: bytes(MAX_FRAME + 1),
    lambda frame, source: replace(frame, raw=b"\xff" * len(frame.raw)).pack(),
    lambda frame, source: replace(frame, session=bytes(16)).pack(),
    lambda frame, source: replace(frame, epoch=1).pack(),
]


def not_a_number(bench: FaultBench) -> tuple[int, str]:
    """Send hidden states with NaN; the edge must get a clear error."""
    middle = bench.middle()
    hidden = torch.full((1, 3, WIDTH), float("nan"))
    middle.send(StepRequest(SplitPlan(FIRST, SECOND), hidden, 0, 3, 0))
    try:
        middle.receive()
    except LinkError as error:
        return 1, bench.score.ended(clear=True, note=str(error))
    return 1, bench.score.ended(exact=False)


def idle_sockets(bench: FaultBench) -> tuple[int, str]:
    """Open connections that never send anything."""
    channels = [bench.connect() for _ in range(bench.faults.idle_sockets)]
    ends = [bench.generate() for _ in range(2)]
    closed = 0
    for channel in channels:
        try:
            channel.receive(30)
        except LinkDown:
            closed += 1
        channel.close()
    return len(channels), f"{closed} closed by the cloud; meanwhile {_summary(ends)}"


def slow_reader(bench: FaultBench) -> tuple[int, str]:
    """Send one chunk after another without reading replies."""
    channel, session = bench.open()
    cut_codec = CutCodecs(WIDTH).cut_codec(CODEC, FIRST)
    payload = cut_codec.encode(torch.zeros(512, WIDTH), 0).numpy().tobytes()
    sent, stop = 0, threading.Event()

    def send() -> None:
        nonlocal sent
        with suppress(LinkDown):
            while not stop.is_set():
                sent += 1
                step = StepMessage(FIRST, SECOND, keep=0, start=0, tokens=512, wanted=512)
                frame = Frame(InferenceKind.STEP, session, 0, sent, body=step.pack(), raw=payload)
                for piece in frame.pieces():
                    channel.send(piece)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    ends = [bench.generate() for _ in range(2)]
    stop.set()
    channel.close()
    thread.join(5)
    return 1, f"{sent} chunks accepted; meanwhile {_summary(ends)}"


FAULTS: tuple[Callable[[FaultBench], tuple[int, str]], ...] = (
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
    return ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)) or "no generation ended"


def run(
    *,
    new: int = NEW,
    cut_after: tuple[int, ...] = CUT_AFTER,
    kills: int = KILLS,
    bad_frames: int = BAD_FRAMES,
    idle_sockets: int = IDLE_SOCKETS,
) -> Measured:
    """Inject every fault."""
    limits = InferenceLimits(lease_s=LEASE_S, send_s=5.0, tokens=2048)
    settings = SplitSettings(
        model=SMOLLM2, start_block=FIRST, end_block=SECOND, token=f"{TOKEN},{OTHER_TOKEN}", limits=limits, threads=1
    )
    torch.set_num_threads(1)
    rows = []
    with served(app(settings)) as running:
        bench = FaultBench(running, Faults(new, cut_after, kills, bad_frames, idle_sockets))
        score = bench.score
        for fault in FAULTS:
            with timed(fault.__name__.replace("_", " ")):
                count, outcome = fault(bench)
            score.faults += count
            rows.append([fault.__name__.replace("_", " "), str(count), outcome])
        rows.append(["afterwards", "", bench.generate()])
        with timed("waiting for leases to end"):
            leaked = bench.sessions_left()
    result = {
        "faults_injected": score.faults,
        "completed_exact": score.exact,
        "clear_errors": score.clear,
        "wrong_tokens": score.wrong,
        "leaked_sessions": leaked,
    }
    rows.append(["sessions left", "", str(leaked)])
    return Measured("Faults injected into a split model on Ray Serve", ["fault", "injected", "outcome"], rows, result)
