"""Attacks recover tokens from tiny models of every decoder family, and none from shuffled hidden states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.errors import DataError, ModelError
from raycloud.evaluation.privacy.affine import ridge
from raycloud.evaluation.privacy.inverters import MlpInverter, RidgeInverter
from raycloud.evaluation.privacy.lens import Lens
from raycloud.evaluation.privacy.matching import Matching
from raycloud.evaluation.privacy.metrics import recovery
from raycloud.evaluation.privacy.split_decoder import SessionTrace, SplitDecoder, record_sessions
from raycloud.evaluation.privacy.token_directions import EmbeddingMatch, TokenDirections
from raycloud.evaluation.privacy.victims import MAX_PRIVATE, victims
from raycloud.link.codecs.cut_codec import CutCodec, float_cut_codec
from raycloud.link.codecs.quantised import Int8
from raycloud.models.generation import greedy
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.segments import Segment
from tests.models.families import FAMILIES, tiny
from tests.tokenizers import BOS, GEMMA, tokenizer_of

DECODERS = [name for name in FAMILIES if name != "bert"]
SOME = ["llama", "gemma3", "gpt2", "opt-projected"]
VOCAB_SIZE, WIDTH = 97, 32


def cut_of(family: str, first: int, second: int, codec: CutCodec | None = None) -> SplitDecoder:
    return SplitDecoder(tiny(family, dtype=torch.float32), first, second, codec, codec)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def sessions(cut: SplitDecoder) -> list[SessionTrace]:
    return record_sessions(cut, prompts(5, 20, 11), limit=8)


def short_sessions(cut: SplitDecoder) -> list[SessionTrace]:
    """Record a few short sessions, for attacks whose cost grows with the number of tokens."""
    return record_sessions(cut, prompts(4, 9), limit=3)


def hits(guesses: Tensor, truth: Tensor) -> float:
    return float((guesses[:, 0] == truth).double().mean())


def no_idea(hidden: Tensor, count: int) -> Tensor:
    """Propose the same tokens for every hidden state."""
    return torch.arange(min(count, VOCAB_SIZE)).expand(len(hidden), -1)


def matching(cut: SplitDecoder) -> Matching:
    public = record_sessions(cut, prompts(9, 20), limit=1)
    scale = torch.cat([trace.uplink for trace in public]).std(dim=0)
    return Matching.fit(cut, no_idea, scale, [(trace.ids, trace.uplink) for trace in public])


@pytest.mark.parametrize("family", SOME)
def test_a_recorded_session_is_the_unsplit_models(family: str) -> None:
    cut = cut_of(family, 2, 4)
    asked = prompts(5, 20, 11)
    answers = greedy(Segment(tiny(family, dtype=torch.float32)), asked, 8)
    for trace, prompt, answer in zip(sessions(cut), asked, answers, strict=True):
        assert trace.ids.tolist() == prompt + answer[:-1]
        assert trace.said.tolist() == answer
        alone = cut.run(trace.ids[None])
        assert torch.allclose(trace.uplink, alone.uplink[0], atol=1e-4)
        assert torch.allclose(trace.downlink, alone.downlink[0], atol=1e-3)


def test_an_ended_answer_sends_nothing_more() -> None:
    cut = cut_of("llama", 2, 4)
    whole = sessions(cut)[0]
    ended = record_sessions(cut, prompts(5, 20, 11), limit=8, eos={int(whole.said[3])})[0]
    stop = whole.said.tolist().index(int(whole.said[3])) + 1
    assert ended.said.tolist() == whole.said[:stop].tolist()
    assert ended.ids.tolist() == whole.ids[: whole.prompt + stop - 1].tolist()
    assert len(ended.uplink) == len(ended.downlink) == len(ended.ids)


def test_first_positions_cross_apart_wherever_a_text_stands_in_its_batch() -> None:
    """Positions are counted per text, also with padding and from a cache, as on a real link."""
    codec = CutCodec(Int8(WIDTH, WIDTH), WIDTH, first=7)
    clear, coded = cut_of("llama", 2, 4), cut_of("llama", 2, 4, codec)
    for trace in sessions(coded):
        hidden = clear.send(trace.ids[None])[0]
        alone = codec.decode(codec.encode(hidden, 0), 0, len(hidden))
        assert torch.allclose(trace.uplink[:7], alone[:7], rtol=2**-6, atol=1e-4)
        assert torch.allclose(trace.uplink, alone, atol=0.05)
        assert not torch.allclose(trace.uplink[7:], hidden[7:], rtol=2**-9, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_embeddings_are_read_off_completely(family: str) -> None:
    cut = cut_of(family, 0, 6)
    attack = EmbeddingMatch(TokenDirections.of(cut.edge, VOCAB_SIZE))
    for trace in sessions(cut):
        assert hits(attack.guess(trace.uplink, 5), trace.ids) == 1.0


@pytest.mark.parametrize("family", DECODERS)
def test_the_last_block_in_the_cloud_gives_the_answer_away(family: str) -> None:
    cut = cut_of(family, 2, 6)
    for trace in sessions(cut):
        assert hits(Lens.plain(cut.last).guess(trace.downlink[trace.prompt - 1 :], 5), trace.said) == 1.0


@pytest.mark.parametrize("first", [2, 6])
@pytest.mark.parametrize("family", SOME)
def test_matching_recovers_every_token_at_any_depth(family: str, first: int) -> None:
    cut = cut_of(family, first, 6)
    attack = matching(cut)
    for trace in short_sessions(cut):
        assert hits(attack.guess(trace.uplink), trace.ids) == 1.0


@pytest.mark.parametrize("codec", [float_cut_codec("bfloat16", WIDTH), CutCodec(Int8(WIDTH, WIDTH), WIDTH, first=2)])
def test_a_lossy_wire_does_not_stop_matching(codec: CutCodec) -> None:
    cut = cut_of("llama", 4, 6, codec)
    attack = matching(cut)
    for trace in short_sessions(cut):
        assert hits(attack.guess(trace.uplink), trace.ids) == 1.0


def test_shuffled_hidden_states_bring_every_attack_down() -> None:
    """Attacks on shuffled hidden states fail, so the metric is not always high."""
    cut = cut_of("llama", 0, 6)
    trace = record_sessions(cut, prompts(60), limit=8)[0]
    mixed = trace.uplink[torch.randperm(len(trace.uplink), generator=torch.Generator().manual_seed(0))]
    downlink = trace.downlink.flip(0)
    attack = EmbeddingMatch(TokenDirections.of(cut.edge, VOCAB_SIZE))
    assert hits(attack.guess(mixed, 5), trace.ids) < 0.2
    assert hits(matching(cut).guess(mixed[:20]), trace.ids[:20]) < 0.2
    assert hits(Lens.plain(cut.last).guess(downlink, 5)[trace.prompt - 1 :], trace.said) < 0.5


def test_learned_attacks_learn() -> None:
    """Trained attacks score far above chance on unseen texts; the hidden layer is no worse than the affine map."""
    cut = cut_of("llama", 1, 4)
    ids = torch.tensor(prompts(*[40] * 60))
    with torch.no_grad():
        seen = cut.run(ids)
    train, test = slice(0, 40), slice(40, 60)
    uplink, final, downlink = (hidden[train].flatten(0, 1) for hidden in (seen.uplink, seen.final, seen.downlink))
    vocabulary = TokenDirections.of(cut.edge, VOCAB_SIZE)
    linear = RidgeInverter.fit(uplink, ids[train].flatten(), vocabulary)
    deep = MlpInverter.fit(uplink, ids[train].flatten(), linear, steps=40, batch=128)
    hidden, truth = seen.uplink[test].flatten(0, 1), ids[test].flatten()
    assert hits(linear.guess(hidden, 5), truth) > 0.2
    assert hits(deep.guess(hidden, 5), truth) > 0.2
    says = cut.last.logits(seen.final[test]).argmax(-1).flatten()
    below = seen.downlink[test].flatten(0, 1)
    tuned = hits(Lens.tuned(cut.last, downlink, final).guess(below, 5), says)
    assert tuned > max(0.2, hits(Lens.plain(cut.last).guess(below, 5), says))


def test_ridge_finds_an_affine_map_whatever_the_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 7, generator=generator) * torch.tensor([1.0, 1, 1, 1, 1, 1, 300]) + 5
    weight, bias = torch.randn(7, 3, generator=generator), torch.randn(3, generator=generator)
    found = ridge(x, x @ weight + bias, penalty=1e-9, chunk=64)
    assert torch.allclose(found(x), x @ weight + bias, atol=1e-2)
    assert torch.allclose(found(x), ridge(x, x @ weight + bias, penalty=1e-9)(x), atol=1e-3)


def test_recovery_by_hand() -> None:
    def decode(ids: list[int]) -> str:
        return " ".join("abcdefgh"[i] * 3 for i in ids)

    guesses = [torch.tensor([[0, 1], [2, 1], [3, 0], [4, 0]]), torch.tensor([[5, 0]]), torch.empty(0, 2)]
    truths = [torch.tensor([0, 1, 3, 7]), torch.tensor([5]), torch.empty(0)]
    found = recovery(guesses, truths, decode, 2.0, [("aaa", "hhh"), ("fff",), ("bbb",)])
    assert (found.top1, found.top5, found.exact, found.seconds) == (0.6, 0.8, 0.5, 2.0)
    assert found.rouge_l == pytest.approx((0.5 + 1.0) / 2)
    assert found.secrets == pytest.approx(2 / 3)
    assert recovery(guesses, truths, decode, 2.0).secrets is None
    with pytest.raises(ValueError, match="no text"):
        recovery([torch.empty(0, 1)], [torch.empty(0)], decode, 0.0)


def test_victims_are_a_pure_function_and_hold_their_secrets() -> None:
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    rows = [
        {"text": f"a sentence about {thing}" + " and more" * 9 * (thing == "long" and 9)} for thing in ("x", "long")
    ]
    one, again = (victims(rows, tokenizer, 1, seed=4) for _ in range(2))
    assert one == again
    private = tokenizer.decode([one[0].ids[at] for at in one[0].private])
    assert all(secret in private for secret in one[0].secrets) and len(one[0].private) <= MAX_PRIVATE
    with pytest.raises(DataError, match=r"texts: 2 asked for, 1 found"):
        victims(rows, tokenizer, 2, seed=4)
    asked = [{"instruction": "Say it.", "input": "the private part", "output": "said"}]
    chat = victims(asked, tokenizer, 1, seed=0)[0]
    inside = tokenizer.decode([chat.ids[at] for at in chat.private])
    assert "the private part" in inside and "Say it." not in inside
    assert "Say it." in tokenizer.decode(list(chat.ids))


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (4, 3), (0, 7)])
def test_cuts_are_checked(start: int, end: int) -> None:
    with pytest.raises(
        ModelError, match=f"0 <= start_block <= end_block <= 6, got start_block={start}, end_block={end}"
    ):
        cut_of("llama", start, end)


def test_encoders_are_refused() -> None:
    with pytest.raises(ModelError, match="encoder"):
        SplitDecoder(tiny("bert"), 0, 6)


def test_victims_begin_as_texts_of_their_tokenizer_do() -> None:
    """Prompts begin with BOS, which Gemma needs; the private part is still the user's own text."""
    rows = [{"text": "Hi."}, {"instruction": "Hi.", "input": "", "output": "It."}]
    for row, template in zip(rows, (None, GEMMA), strict=True):
        tokenizer = tokenizer_of(begin=["<bos>"], template=template)
        (victim,) = victims([row] * 9, tokenizer, 1, seed=4)
        assert victim.ids[0] == BOS and victim.ids.count(BOS) == 1
        own = tokenizer.decode(victim.ids[victim.private.start : victim.private.stop])
        assert "Hi." in own and all(secret in own for secret in victim.secrets)
