"""Generation over a link: the tokens of the unsplit model, and the requests that an edge may make."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum

import pytest
import torch

from raycloud.data.batches import Sample
from raycloud.errors import LinkError
from raycloud.link.frames import SessionKind, unpack
from raycloud.models.generation import Decoding
from raycloud.models.segments import Segment
from raycloud.split.calibration import calibrate
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.blocks import LocalBlocks, StepRequest, cloud_stage
from raycloud.split.inference.client import RemoteBlocks
from raycloud.split.inference.messages import InferenceKind, StepMessage
from raycloud.split.inference.pipeline import SplitPipeline
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import tiny
from tests.split.wiring import (
    BLOCKS,
    DRAWN,
    FIXED,
    NEW,
    PLANS,
    PROMPT,
    WIDTH,
    Cloud,
    Script,
    cloud,
    name,
    stock,
)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_those_of_the_unsplit_model(family: str) -> None:
    with cloud(family) as there:
        for plans in PLANS:
            for chunk in (1, 7, 16):
                assert list(there.edge(plans, chunk=chunk).stream(PROMPT, NEW)) == stock(family), (plans, chunk)
        assert there.settled() == 0


@torch.no_grad()
def test_scores_are_those_of_the_unsplit_model() -> None:
    """With logits of all prompt tokens requested, all hidden states of the prompt are returned."""
    with cloud() as there:
        for plans in PLANS:
            for chunk in (1, 7, 64):
                edge = there.edge(plans, chunk=chunk)
                end = stock()[5]
                how = Decoding(ends=frozenset({end}), top=3, echo=True)
                tokens = list(edge.tokens(PROMPT, NEW, how))
                said = stock()[: stock().index(end) + 1]
                ids = [*PROMPT, *said]
                assert [token.id for token in tokens] == ids
                parts = ["prompt"] * len(PROMPT) + ["text"] * (len(said) - 1) + ["end"]
                assert [token.part for token in tokens] == parts and tokens[0].scores is None
                logs = there.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                for at, token in enumerate(tokens[1:]):
                    assert token.scores is not None
                    assert token.scores.logprob == pytest.approx(float(logs[at, token.id]), abs=1e-4)
                    best = logs[at].topk(3)
                    assert [logprob for _, logprob in token.scores.top] == pytest.approx(best.values.tolist(), abs=1e-4)
                alone = list(edge.tokens(PROMPT, 0, Decoding(top=0, echo=True)))
                assert [token.id for token in alone] == PROMPT
        assert there.settled() == 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rows", [5, 16])
def test_prompts_longer_than_a_step_go_in_several(rows: int, seed: int) -> None:
    with cloud(step_tokens=rows) as there:
        for plans in PLANS:
            assert list(there.edge(plans, chunk=64, seed=seed).stream(PROMPT, NEW)) == stock(), plans


def test_hidden_states_that_no_message_can_hold_go_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cloud accepts 64 hidden states per step, but a message holds only 5."""
    monkeypatch.setattr("raycloud.split.inference.client.MAX_MESSAGE", 5 * WIDTH * 4 + 100)
    with cloud(step_tokens=64) as there:
        for plans in (FIXED, DRAWN):
            assert list(there.edge(plans, chunk=20).stream(PROMPT, NEW)) == stock()


@pytest.mark.parametrize("plans", PLANS, ids=name)
@pytest.mark.parametrize("rows", [5, 16])
def test_logits_of_several_tokens_come_back(plans: PlanSet, rows: int) -> None:
    model, ids = tiny("llama", dtype=torch.float32, seed=4), torch.tensor([PROMPT])
    with torch.no_grad():
        right = model(input_ids=ids).logits
    with cloud(step_tokens=rows) as there:
        triad = there.edge(plans).open()
        for start, stop in ((0, 1), (1, 14), (14, 33)):
            logits = triad.advance(ids[:, start:stop], logits=stop - start)
            torch.testing.assert_close(logits, right[:, start:stop], rtol=1e-4, atol=1e-4)
        triad.close()


def test_two_generations_at_once_do_not_mix(there: Cloud) -> None:
    made: dict[int, list[int]] = {}

    def run(number: int) -> None:
        plans, length = PLANS[number % len(PLANS)], 20 + number
        made[number] = list(there.edge(plans, seed=number).stream(PROMPT[:length], NEW))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == {number: stock(length=20 + number) for number in range(5)}


def test_closing_frees_the_session_even_in_the_middle(there: Cloud) -> None:
    stream = there.edge(FIXED).stream(PROMPT, NEW)
    assert [next(stream) for _ in range(3)] == stock()[:3]
    assert there.host.sessions == 1
    stream.close()  # type: ignore[attr-defined]
    assert there.settled() == 0


def test_the_cloud_hangs_up_first(there: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the answer to CLOSE would arrive at a closed socket."""
    monkeypatch.setattr("raycloud.link.client._FAREWELL_S", 60.0)
    crossed = list[tuple[str, IntEnum | None]]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        crossed.append((what, unpack(data, InferenceKind).kind if data else None))
        return data

    list(there.edge(FIXED, Script(there.connect, hook)).stream(PROMPT[:4], 2))
    farewell = [
        ("send", SessionKind.CLOSE),
        ("sent", SessionKind.CLOSE),
        ("receive", None),
        ("received", SessionKind.CLOSE),
    ]
    assert crossed[-5:] == [*farewell, ("receive", None)]
    assert there.host.sessions == 0


def test_a_batch_is_refused(there: Cloud) -> None:
    middle = RemoteBlocks(there.connect, there.terms(FIXED))
    rows = torch.zeros(2, 3, WIDTH)
    with pytest.raises(ValueError, match="one text per session, got a batch of 2"):
        middle.send(StepRequest(SplitPlan(2, 4), rows, 0, 3, 0))
    with pytest.raises(ValueError, match="one text per session"):
        middle.send(StepRequest(SplitPlan(2, 4), rows[:1], 0, 3, 0, valid=torch.ones(1, 3, dtype=torch.bool)))
    middle.close()
    with pytest.raises(ValueError, match="batch of 2"):
        there.edge(FIXED).generate([PROMPT[:4], PROMPT[:4]], 2)
    assert there.settled() == 0


def test_rows_have_to_follow(there: Cloud) -> None:
    middle = RemoteBlocks(there.connect, there.terms(FIXED))
    rows = torch.randn(1, 4, WIDTH)
    middle.send(StepRequest(SplitPlan(2, 4), rows, 0, 4, 0))
    assert middle.receive().shape == (1, 4, WIDTH)
    assert middle.held(2) == 4
    for start in (3, 5):
        with pytest.raises(ValueError, match=f"hidden states begin at token {start} where 4 should follow"):
            middle.send(StepRequest(SplitPlan(2, 4), rows, start, 4, 4))
    middle.close()


def test_tokens_to_keep_that_the_cloud_never_had_are_an_error(there: Cloud) -> None:
    middle = RemoteBlocks(there.connect, there.terms(FIXED))
    middle.send(StepRequest(SplitPlan(2, 4), torch.randn(1, 4, WIDTH), 0, 4, 9))
    with pytest.raises(LinkError, match="do not follow 9 of 0 tokens"):
        middle.receive()
    middle.close()
    assert there.settled() == 0


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("plans", PLANS, ids=name)
def test_forgotten_tokens_are_forgotten_on_both_sides(there: Cloud, plans: PlanSet, loses: bool) -> None:
    ids = torch.tensor([PROMPT])
    other = (ids + 5) % 90 + 3
    with torch.no_grad():
        right = there.model(input_ids=ids).logits
    for seed in range(1 if plans.fixed else 3):
        triad = there.edge(plans, seed=seed).open()
        triad.advance(ids[:, :10])
        for keep, stop in ((10, 15), (12, 20), (4, 30), (30, 33), (0, 33)):
            triad.advance(other[:, :3])
            triad.rollback(min(keep, triad.tokens - 3) if triad.tokens > keep else triad.tokens)
            if loses:
                there.forget()
            logits = triad.advance(ids[:, triad.tokens : stop])
            torch.testing.assert_close(logits[:, -1], right[:, stop - 1], rtol=1e-4, atol=1e-4)
        triad.close()
    there.forget()


def test_int8_over_a_link_is_int8_in_the_same_process_and_survives_replays() -> None:
    model = tiny("llama", dtype=torch.float32, seed=4)
    texts = torch.randint(3, 97, (8, 48), generator=torch.Generator().manual_seed(9))
    calibration = calibrate(model, [Sample(tuple(row.tolist()), len(row)) for row in texts], [2, 4])
    codecs = CutCodecs(WIDTH, calibration)

    class Lossy(LocalBlocks):
        """Apply the codec without a link."""

        def send(self, request: StepRequest) -> None:
            up = codecs.cut_codec("int8", request.plan.start_block)
            rows = up.decode(up.encode(request.hidden[0], request.start), request.start, request.hidden.shape[1])
            super().send(StepRequest(request.plan, rows[None], request.start, request.wanted, request.keep))
            down, back = codecs.cut_codec("int8", request.plan.end_block), self._results.pop()[0]
            at = request.stop - request.wanted
            self._results.append(down.decode(down.encode(back, at), at, request.wanted)[None])

    def logits(triad: SplitPipeline, lose: Callable[[int], None]) -> list[torch.Tensor]:
        ids, made = torch.tensor([PROMPT]), []
        for at in range(0, 33, 3):
            lose(at)
            made.append(triad.advance(ids[:, at : at + 3], logits=3))
        triad.close()
        return made

    middle = Lossy(cloud_stage(Segment(model, 2, 4, embed=False, head=False), FIXED, BLOCKS))
    first, last = Segment(model, 0, 2, head=False), Segment(model, 4, BLOCKS, embed=False)
    right = logits(SplitPipeline(first, last, middle, FIXED), lambda at: None)
    sent, replayed = bytearray(), list[bytes]()

    def watch(what: str, number: int, data: bytes) -> bytes:
        if what != "send" or not isinstance((frame := unpack(data, InferenceKind)).kind, InferenceKind):
            return data
        begin = codecs.cut_codec("int8", 2).payload_bytes(0, StepMessage.parse(frame).start)
        if frame.kind is InferenceKind.REPLAY:
            replayed.append(frame.raw)
            assert sent[begin : begin + len(frame.raw)] == frame.raw
        elif len(sent) == begin:
            sent.extend(frame.raw)
        return data

    with cloud(codecs=codecs) as there:
        clean = logits(there.edge(FIXED, codec="int8").open(), lambda at: None)
        edge = there.edge(FIXED, Script(there.connect, watch), codec="int8")
        mended = logits(edge.open(), lambda at: there.forget() if at in (3, 15, 30) else None)
    assert len(replayed) == 1 + 1 + 2
    for ours, local in zip(clean, right, strict=True):
        assert torch.equal(ours, local)
    # The same bytes in pieces of other sizes: sums differ in their last bits, and so may a code by one level.
    for ours, local in zip(mended, right, strict=True):
        torch.testing.assert_close(ours, local, rtol=0, atol=0.1)
