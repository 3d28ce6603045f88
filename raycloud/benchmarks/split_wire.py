"""What crosses the link of a whole session: its bytes against the formula, and a search for ids and text in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from raycloud.benchmarks.local_cloud import calibrated, scratch
from raycloud.benchmarks.measure import SMOLLM2, show
from raycloud.data.prompts import chat
from raycloud.data.sources import load_rows
from raycloud.link.channel import Channel, Loopback, Metered
from raycloud.link.frames import HEADER_BYTES, Kind, unpack
from raycloud.link.meter import Meter
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.report.console import working
from raycloud.split.calibration import Calibration
from raycloud.split.cloud.engine import Engine
from raycloud.split.cloud.host import Host
from raycloud.split.generation import SplitModel
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.remote import RemoteMiddle, Terms
from raycloud.split.terms import Codecs

FIRST, SECOND, NEW, CHUNK, GRAM = 4, 26, 48, 32, 4
CODECS = ("float32", "bfloat16", "int8", "int4")
_INTEGERS = ("<i2", "<i4", "<i8")


@dataclass
class Captured:
    """A channel that keeps everything that goes through it."""

    inner: Channel
    trace: list[bytes] = field(default_factory=list)

    def send(self, data: bytes) -> None:
        """Keep and send."""
        self.trace.append(data)
        self.inner.send(data)

    def receive(self, timeout_s: float) -> bytes:
        """Receive and keep."""
        data = self.inner.receive(timeout_s)
        self.trace.append(data)
        return data

    def close(self) -> None:
        """Close the channel."""
        self.inner.close()


def needles(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[bytes]]:
    """Every run of four tokens of a text, as integers of three sizes and as UTF-8."""
    grams = [list(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    found = {kind: [np.array(gram).astype(kind).tobytes() for gram in grams] for kind in _INTEGERS}
    texts = [str(tokenizer.decode(gram)) for gram in grams]
    found["utf-8"] = [text.encode() for text in texts if len(text.encode()) >= GRAM and "\ufffd" not in text]
    return found


def leaks(trace: bytes, sought: dict[str, list[bytes]]) -> dict[str, int]:
    """How many of the runs occur in a trace, by their form."""
    return {form: sum(needle in trace for needle in runs) for form, runs in sought.items()}


def formula(codecs: Codecs, codec: str, prompt: int, new: int, controls: dict[str, int]) -> dict[str, int]:
    """Bytes each way of a session: a header and coded rows per chunk and per token, and the control frames.

    The last token is never sent: nothing follows it.
    """
    up, down = (codecs.boundary(codec, cut) for cut in (FIRST, SECOND))
    steps = [(pos, min(CHUNK, prompt - pos)) for pos in range(0, prompt, CHUNK)]
    steps += [(prompt + token, 1) for token in range(new - 1)]
    sent = sum(HEADER_BYTES + up.payload_bytes(pos, rows) for pos, rows in steps)
    back = sum(HEADER_BYTES + down.payload_bytes(pos, rows) for pos, rows in steps)
    return {"up": controls["up"] + sent, "down": controls["down"] + back}


def session(
    make: Callable[[Channel], SplitModel], channel: Channel, prompt: Sequence[int]
) -> tuple[list[int], list[bytes]]:
    """One generation over a captured channel: the new tokens and the messages that crossed."""
    captured = Captured(channel)
    made = list(make(captured).stream(prompt, NEW))
    return made, captured.trace


def run(as_json: bool) -> dict[str, Any]:
    """Run one session per codec and examine what crossed."""
    plans = PlanSet.of(SplitPlan(FIRST, SECOND))
    edge = load_edge(SMOLLM2, plans, device="cpu", dtype="float32")
    engine = Engine(load_cloud(SMOLLM2, plans, device="cpu", dtype="float32"), threads=torch.get_num_threads())
    tokenizer = load_tokenizer(resolve(SMOLLM2))
    row = max(load_rows("builtin:instruct", "test")[:200], key=lambda row: len(row["input"]))
    prompt: list[int] = tokenizer(chat(tokenizer, row["instruction"], row["input"]).text)["input_ids"]
    with scratch() as folder:
        codecs = Codecs(edge.config.hidden_size, Calibration.load(calibrated(FIRST, SECOND, folder)))
    host = Host(engine, codecs)
    result: dict[str, Any] = {"codecs": {}, "header_bytes": HEADER_BYTES, "rows": len(prompt) + NEW - 1}
    rows = []
    with closing(Loopback(lambda connection: host.serve(connection, "benchmark"))) as cloud:
        for codec in CODECS:
            meter = Meter()
            terms = Terms(edge.fingerprint, plans, codecs, codec, 2048)

            def make(channel: Channel, terms: Terms = terms) -> SplitModel:
                return SplitModel(
                    edge.first, edge.last, lambda: RemoteMiddle(lambda _: channel, terms), plans, chunk=CHUNK
                )

            with working(f"a session with {codec}"):
                made, trace = session(make, Metered(cloud.connect(), meter), prompt)
            frames = [unpack(message) for message in trace]
            opened = {
                frame.kind: HEADER_BYTES + len(frame.payload)
                for frame in frames
                if frame.kind in (Kind.OPEN, Kind.OPEN_OK)
            }
            # CLOSE is a header alone, each way.
            controls = {"up": opened[Kind.OPEN] + HEADER_BYTES, "down": opened[Kind.OPEN_OK] + HEADER_BYTES}
            wanted = formula(codecs, codec, len(prompt), NEW, controls)
            counted = {way: meter.payload[way] for way in ("up", "down")}
            sought = needles([*prompt, *made], tokenizer)
            found = leaks(b"".join(trace), sought)
            # What leaks must be found: one run of the text in each form, hidden in the middle of the trace.
            middle = len(trace) // 2
            control = {
                form: leaks(b"".join([*trace[:middle], runs[len(runs) // 2], *trace[middle:]]), sought)[form]
                for form, runs in sought.items()
            }
            result["codecs"][codec] = {
                "counted": counted,
                "formula": wanted,
                "equal": counted == wanted,
                "searched": {form: len(runs) for form, runs in sought.items()},
                "leaks": found,
                "control_found": control,
            }
            ok = "yes" if counted == wanted else "NO"
            rows.append(
                [codec, f"{counted['up']:,}", f"{counted['down']:,}", ok, str(sum(map(len, sought.values()))),
                 str(sum(found.values())), f"{sum(map(bool, control.values()))} of {len(control)}"]
            )  # fmt: skip
    engine.close()
    each = result["codecs"].values()
    result["equal"] = all(one["equal"] for one in each)
    result["leaks"] = sum(sum(one["leaks"].values()) for one in each)
    result["controls_found"] = all(all(one["control_found"].values()) for one in each)
    title = f"A session of SmolLM2: {len(prompt)} prompt and {NEW} new tokens, headers of {HEADER_BYTES} bytes"
    header = ["codec", "bytes up", "bytes down", "as the formula says", "runs searched", "found", "planted ones found"]
    show(title, header, rows, result, as_json)
    return result
