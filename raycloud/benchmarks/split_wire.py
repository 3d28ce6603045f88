"""Traffic of a whole session: its bytes compared with a formula, and a search for token ids and text in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from raycloud.benchmarks.local_cloud import TEXT, calibrated, scratch
from raycloud.benchmarks.measure import SMOLLM2, Measured
from raycloud.data.prompts import bounds_of, chat
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row
from raycloud.link.channel import Channel, Loopback, MeteredChannel
from raycloud.link.frames import HEADER_BYTES, SessionKind, unpack
from raycloud.link.meter import Meter
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.report.console import timed
from raycloud.split.calibration import Calibration
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.client import RemoteBlocks, SessionConfig
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.generation import SplitTokenSource
from raycloud.split.inference.messages import STEP_BYTES, InferenceKind
from raycloud.split.inference.server import InferenceServer
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan

FIRST, SECOND, NEW, CHUNK, GRAM = 4, 26, 48, 32, 4
CODECS = ("float32", "bfloat16", "int8", "int4")
QUICK = {"new": 6, "text": 512}
_INTEGERS = ("<i2", "<i4", "<i8")


@dataclass
class CapturingChannel:
    """Channel that keeps all messages that pass through it."""

    inner: Channel
    trace: list[bytes] = field(default_factory=list)

    def send(self, data: bytes) -> None:
        """Record a message and send it."""
        self.trace.append(data)
        self.inner.send(data)

    def receive(self, timeout_s: float) -> bytes:
        """Receive a message and record it."""
        data = self.inner.receive(timeout_s)
        self.trace.append(data)
        return data

    def close(self) -> None:
        """Close the channel."""
        self.inner.close()


def needles(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[bytes]]:
    """Encode every run of four tokens of a text as integers of three sizes and as UTF-8, by encoding."""
    grams = [list(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    found = {kind: [np.array(gram).astype(kind).tobytes() for gram in grams] for kind in _INTEGERS}
    texts = [str(tokenizer.decode(gram)) for gram in grams]
    found["utf-8"] = [text.encode() for text in texts if len(text.encode()) >= GRAM and "\ufffd" not in text]
    return found


def leaks(trace: bytes, sought: dict[str, list[bytes]]) -> dict[str, int]:
    """Count how many of the runs occur in a trace, by encoding."""
    return {form: sum(needle in trace for needle in runs) for form, runs in sought.items()}


def formula(codecs: CutCodecs, codec: str, prompt: int, new: int, controls: dict[str, int]) -> dict[str, int]:
    """Compute the bytes of a session in each direction: a header and coded hidden states per chunk and per token.

    The last token is never sent, because nothing follows it.

    Args:
        codecs: codecs of the model.
        codec: name of the codec.
        prompt: number of prompt tokens.
        new: number of generated tokens.
        controls: bytes of the control frames in each direction.
    """
    up, down = (codecs.cut_codec(codec, cut) for cut in (FIRST, SECOND))
    steps = [(pos, min(CHUNK, prompt - pos)) for pos in range(0, prompt, CHUNK)]
    steps += [(prompt + token, 1) for token in range(new - 1)]
    sent = sum(STEP_BYTES + up.payload_bytes(pos, rows) for pos, rows in steps)
    back = sum(STEP_BYTES + down.payload_bytes(pos, rows) for pos, rows in steps)
    return {"up": controls["up"] + sent, "down": controls["down"] + back}


def prompt_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise the prompt of a data row; the chat template writes BOS itself, which is not added twice."""
    asked = chat(tokenizer, row["instruction"], row["input"]).text
    return bounds_of(tokenizer, "chat").begun(tokenizer(asked, add_special_tokens=False)["input_ids"])


def session(
    make: Callable[[Channel], SplitTokenSource], channel: Channel, prompt: Sequence[int], new: int
) -> tuple[list[int], list[bytes]]:
    """Generate once over a captured channel; return the new tokens and the messages that were sent."""
    captured = CapturingChannel(channel)
    made = list(make(captured).stream(prompt, new))
    return made, captured.trace


def run(*, new: int = NEW, text: int = TEXT) -> Measured:
    """Run one session of ``new`` tokens per codec and check its traffic; codecs are calibrated on ``text`` tokens."""
    plans = PlanSet.of(SplitPlan(FIRST, SECOND))
    edge = load_edge(SMOLLM2, plans, device="cpu", dtype="float32")
    engine = InferenceEngine(load_cloud(SMOLLM2, plans, device="cpu", dtype="float32"), threads=torch.get_num_threads())
    tokenizer = load_tokenizer(resolve(SMOLLM2))
    row = max(load_rows("builtin:instruct", "test")[:200], key=lambda row: len(row["input"]))
    prompt = prompt_of(row, tokenizer)
    with scratch() as folder:
        codecs = CutCodecs(edge.config.hidden_size, Calibration.load(calibrated(FIRST, SECOND, folder, text)))
    host = InferenceServer(engine, codecs)
    result: dict[str, Any] = {"codecs": {}, "header_bytes": STEP_BYTES, "rows": len(prompt) + new - 1}
    rows = []
    with closing(Loopback(lambda connection: host.serve(connection, "benchmark"))) as cloud:
        for codec in CODECS:
            meter = Meter()
            terms = SessionConfig(edge.fingerprint, plans, codecs, codec, 2048)

            def make(channel: Channel, terms: SessionConfig = terms) -> SplitTokenSource:
                return SplitTokenSource(
                    edge.first, edge.last, lambda: RemoteBlocks(lambda _: channel, terms), plans, chunk=CHUNK
                )

            with timed(f"a session with {codec}"):
                made, trace = session(make, MeteredChannel(cloud.connect(), meter), prompt, new)
            frames = [unpack(message, InferenceKind) for message in trace]
            opened = {
                frame.kind: frame.size for frame in frames if frame.kind in (SessionKind.OPEN, SessionKind.OPEN_OK)
            }
            # CLOSE is a header alone, each way.
            controls = {
                "up": opened[SessionKind.OPEN] + HEADER_BYTES,
                "down": opened[SessionKind.OPEN_OK] + HEADER_BYTES,
            }
            wanted = formula(codecs, codec, len(prompt), new, controls)
            counted = {way: meter.payload[way] for way in ("up", "down")}
            sought = needles([*prompt, *made], tokenizer)
            found = leaks(b"".join(trace), sought)
            # Positive control: one run of the text in each encoding, planted in the middle of the trace, must be found.
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
    title = (
        f"A session of SmolLM2: {len(prompt)} prompt and {new} new tokens, {STEP_BYTES} bytes of a step without them"
    )
    header = ["codec", "bytes up", "bytes down", "equals formula", "runs searched", "found", "controls found"]
    return Measured(title, header, rows, result)
