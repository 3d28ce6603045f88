"""The attacks recover what they must from tiny models of every decoder family, and nothing from shuffled rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.errors import DataError, ModelError
from raycloud.evaluation.privacy.affine import ridge
from raycloud.evaluation.privacy.cut import CutModel, Trace, record
from raycloud.evaluation.privacy.inverters import MlpInverter, RidgeInverter
from raycloud.evaluation.privacy.lens import Lens
from raycloud.evaluation.privacy.matching import Matching
from raycloud.evaluation.privacy.metrics import recovery
from raycloud.evaluation.privacy.victims import LONGEST, victims
from raycloud.evaluation.privacy.vocabulary import EmbeddingMatch, Vocabulary
from raycloud.link.codecs.boundary import Boundary, plain_boundary
from raycloud.link.codecs.quantised import Int8
from raycloud.models.generation import greedy
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.segments import Segment
from tests.models.families import FAMILIES, tiny

DECODERS = [name for name in FAMILIES if name != "bert"]
SOME = ["llama", "gemma3", "gpt2", "opt-projected"]
WORDS, WIDTH = 97, 32


def cut_of(family: str, first: int, second: int, code: Boundary | None = None) -> CutModel:
    return CutModel(tiny(family, dtype=torch.float32), first, second, code, code)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, WORDS, (length,), generator=generator).tolist() for length in lengths]


def sessions(cut: CutModel) -> list[Trace]:
    return record(cut, prompts(5, 20, 11), limit=8)


def short_sessions(cut: CutModel) -> list[Trace]:
    """For attacks that pay by the token."""
    return record(cut, prompts(4, 9), limit=3)


def hits(guesses: Tensor, truth: Tensor) -> float:
    return float((guesses[:, 0] == truth).double().mean())


def no_idea(rows: Tensor, count: int) -> Tensor:
    """Proposals that know nothing."""
    return torch.arange(min(count, WORDS)).expand(len(rows), -1)


def matching(cut: CutModel) -> Matching:
    public = record(cut, prompts(9, 20), limit=1)
    scale = torch.cat([trace.up for trace in public]).std(dim=0)
    return Matching.fit(cut, no_idea, scale, [(trace.ids, trace.up) for trace in public])


@pytest.mark.parametrize("family", SOME)
def test_a_recorded_session_is_the_unsplit_models(family: str) -> None:
    cut = cut_of(family, 2, 4)
    asked = prompts(5, 20, 11)
    answers = greedy(Segment(tiny(family, dtype=torch.float32)), asked, 8)
    for trace, prompt, answer in zip(sessions(cut), asked, answers, strict=True):
        assert trace.ids.tolist() == prompt + answer[:-1]
        assert trace.said.tolist() == answer
        alone = cut.run(trace.ids[None])
        assert torch.allclose(trace.up, alone.up[0], atol=1e-4)
        assert torch.allclose(trace.down, alone.down[0], atol=1e-3)


def test_an_ended_answer_sends_nothing_more() -> None:
    cut = cut_of("llama", 2, 4)
    whole = sessions(cut)[0]
    ended = record(cut, prompts(5, 20, 11), limit=8, eos={int(whole.said[3])})[0]
    stop = whole.said.tolist().index(int(whole.said[3])) + 1
    assert ended.said.tolist() == whole.said[:stop].tolist()
    assert ended.ids.tolist() == whole.ids[: whole.prompt + stop - 1].tolist()
    assert len(ended.up) == len(ended.down) == len(ended.ids)


def test_first_positions_cross_apart_wherever_a_text_stands_in_its_batch() -> None:
    """As on a real link: each text counts its own positions, behind padding and from a cache on."""
    code = Boundary(Int8(WIDTH, WIDTH), WIDTH, first=7)
    clear, coded = cut_of("llama", 2, 4), cut_of("llama", 2, 4, code)
    for trace in sessions(coded):
        rows = clear.send(trace.ids[None])[0]
        alone = code.decode(code.encode(rows, 0), 0, len(rows))
        assert torch.allclose(trace.up[:7], alone[:7], rtol=2**-6, atol=1e-4)
        assert torch.allclose(trace.up, alone, atol=0.05)
        assert not torch.allclose(trace.up[7:], rows[7:], rtol=2**-9, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_embeddings_are_read_off_completely(family: str) -> None:
    cut = cut_of(family, 0, 6)
    attack = EmbeddingMatch(Vocabulary.of(cut.edge, WORDS))
    for trace in sessions(cut):
        assert hits(attack.guess(trace.up, 5), trace.ids) == 1.0


@pytest.mark.parametrize("family", DECODERS)
def test_the_last_block_in_the_cloud_gives_the_answer_away(family: str) -> None:
    cut = cut_of(family, 2, 6)
    for trace in sessions(cut):
        assert hits(Lens.plain(cut.last).guess(trace.down[trace.prompt - 1 :], 5), trace.said) == 1.0


@pytest.mark.parametrize("first", [2, 6])
@pytest.mark.parametrize("family", SOME)
def test_matching_recovers_every_token_at_any_depth(family: str, first: int) -> None:
    cut = cut_of(family, first, 6)
    attack = matching(cut)
    for trace in short_sessions(cut):
        assert hits(attack.guess(trace.up), trace.ids) == 1.0


@pytest.mark.parametrize("code", [plain_boundary("bfloat16", WIDTH), Boundary(Int8(WIDTH, WIDTH), WIDTH, first=2)])
def test_a_lossy_wire_does_not_stop_matching(code: Boundary) -> None:
    cut = cut_of("llama", 4, 6, code)
    attack = matching(cut)
    for trace in short_sessions(cut):
        assert hits(attack.guess(trace.up), trace.ids) == 1.0


def test_shuffled_rows_bring_every_attack_down() -> None:
    """The metric can fail."""
    cut = cut_of("llama", 0, 6)
    trace = record(cut, prompts(60), limit=8)[0]
    mixed = trace.up[torch.randperm(len(trace.up), generator=torch.Generator().manual_seed(0))]
    down = trace.down.flip(0)
    attack = EmbeddingMatch(Vocabulary.of(cut.edge, WORDS))
    assert hits(attack.guess(mixed, 5), trace.ids) < 0.2
    assert hits(matching(cut).guess(mixed[:20]), trace.ids[:20]) < 0.2
    assert hits(Lens.plain(cut.last).guess(down, 5)[trace.prompt - 1 :], trace.said) < 0.5


def test_learned_attacks_learn() -> None:
    """On texts they have not seen, far above chance; the hidden layer does not forget what the affine path knew."""
    cut = cut_of("llama", 1, 4)
    ids = torch.tensor(prompts(*[40] * 60))
    with torch.no_grad():
        seen = cut.run(ids)
    train, test = slice(0, 40), slice(40, 60)
    up, final, down = (rows[train].flatten(0, 1) for rows in (seen.up, seen.final, seen.down))
    vocabulary = Vocabulary.of(cut.edge, WORDS)
    linear = RidgeInverter.fit(up, ids[train].flatten(), vocabulary)
    deep = MlpInverter.fit(up, ids[train].flatten(), linear, steps=40, batch=128)
    rows, truth = seen.up[test].flatten(0, 1), ids[test].flatten()
    assert hits(linear.guess(rows, 5), truth) > 0.2
    assert hits(deep.guess(rows, 5), truth) > 0.2
    says = cut.last.logits(seen.final[test]).argmax(-1).flatten()
    below = seen.down[test].flatten(0, 1)
    tuned = hits(Lens.tuned(cut.last, down, final).guess(below, 5), says)
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
    assert all(secret in private for secret in one[0].secrets) and len(one[0].private) <= LONGEST
    with pytest.raises(DataError, match=r"texts: 2 asked for, 1 found"):
        victims(rows, tokenizer, 2, seed=4)
    asked = [{"instruction": "Say it.", "input": "the private part", "output": "said"}]
    chat = victims(asked, tokenizer, 1, seed=0)[0]
    inside = tokenizer.decode([chat.ids[at] for at in chat.private])
    assert "the private part" in inside and "Say it." not in inside
    assert "Say it." in tokenizer.decode(list(chat.ids))


@pytest.mark.parametrize(("first", "second"), [(-1, 3), (4, 3), (0, 7)])
def test_cuts_are_checked(first: int, second: int) -> None:
    with pytest.raises(ModelError, match=f"0 <= first <= second <= 6, got first={first}, second={second}"):
        cut_of("llama", first, second)


def test_encoders_are_refused() -> None:
    with pytest.raises(ModelError, match="encoder"):
        CutModel(tiny("bert"), 0, 6)
