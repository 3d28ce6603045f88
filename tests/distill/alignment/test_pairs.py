"""A text in the tokens of two tokenizers, from alignment to loss."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from raycloud.data.batches import IGNORE
from raycloud.data.prompts import Format
from raycloud.distill.alignment.pairs import AlignedSamples, DeviceVocabularyMap
from raycloud.distill.objective import ModelSizes, Objective, StudentOutput, weighted_sum
from raycloud.distill.objectives import DIVERGENCES, OBJECTIVES
from raycloud.distill.signals import SignalRecipe, compute_signal, frozen_head
from raycloud.models.segments import Segment
from tests.models.families import tiny
from tests.tokenizers import BOS, EOS, GEMMA, TURN, tokenizer_of, trained

ROWS = [
    {"text": text, "instruction": "Say it again.", "input": text[:9], "output": text}
    for text in (
        "The lighthouse keeper counted the ships, as he did every evening.",
        "Ein Mädchen über die Brücke — naïve café, 12.5 %",
        "one",
        "So long, and thanks for all the fish! 🐟🐟",
    )
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYCLOUD_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    texts = [row["text"] for row in ROWS] * 3
    return trained(300, texts), trained(420, texts)


def paired(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], form: Format = "alpaca"
) -> AlignedSamples:
    return AlignedSamples(ROWS, *tokenizers, form, max_length=400, max_prompt_length=300)


@pytest.mark.parametrize("form", ["plain", "alpaca"])
def test_partners_stand_for_the_same_bytes(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], form: Format
) -> None:
    pairs, which = paired(tokenizers, form), [2, 0, 1]
    ours, theirs = pairs.batches(which)
    partner = pairs.partners(which)
    mine, its = (batch.labels[batch.labels != IGNORE] for batch in (ours, theirs))
    assert len(partner) == len(mine)
    found = (partner >= 0).nonzero()[:, 0].tolist()
    assert 3 < len(found) < len(mine)
    for index in found:
        labels = (mine[index], its[partner[index]])
        tokens = [side.convert_ids_to_tokens(int(label)) for side, label in zip(tokenizers, labels, strict=True)]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("form", ["plain", "alpaca", "chat"])
def test_each_side_begins_and_ends_as_its_own_texts_do(form: Format) -> None:
    """Tokenizers of a teacher that needs BOS and ends turns with a special token, and of a student that does
    neither."""
    student = tokenizer_of(template="{% for m in messages %}<start_of_turn>{{ m.content }}<eos>{% endfor %}")
    teacher = tokenizer_of(begin=["<bos>"], template=GEMMA)
    pairs = AlignedSamples(ROWS, student, teacher, form, max_length=999, max_prompt_length=400)
    for ours, theirs in zip(pairs.student, pairs.teacher, strict=True):
        assert (ours.ids[0] == BOS, theirs.ids[0] == BOS) == (False, True)
    partner, (mine, its) = pairs.partners(range(4)), pairs.batches(range(4))
    labels = [batch.labels[batch.labels != IGNORE] for batch in (mine, its)]
    assert (partner >= 0).all()  # one byte a token: all have the same spans, ends included
    ends = (labels[0] == EOS).nonzero()[:, 0]
    assert len(ends) == (0 if form == "plain" else 4)
    assert (labels[1][partner[ends]] == (TURN if form == "chat" else EOS)).all()
    its_end = pairs.answer_ends[1]
    start, stop = pairs.map.offsets[its_end : its_end + 2].tolist()
    assert pairs.map.student_ids[start:stop].tolist() == [EOS]


@pytest.mark.parametrize("form", ["plain", "alpaca"])
def test_spans_are_where_the_tokens_stand(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], form: Format
) -> None:
    pairs, which = paired(tokenizers, form), [1, 0]
    for side, tokenizer, spans in zip(pairs.batches(which), tokenizers, pairs._spans(which), strict=True):
        labels = side.labels[side.labels != IGNORE]
        assert len(labels) == len(spans)
        begins = 0
        for index, count in zip(which, (side.labels != IGNORE).sum(1).tolist(), strict=True):
            data = ROWS[index]["text"].encode()
            for label, (start, stop) in zip(
                labels[begins : begins + count].tolist(), spans[begins : begins + count].tolist(), strict=True
            ):
                if label != tokenizer.eos_token_id:
                    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens([label])) == data[
                        start:stop
                    ].decode(errors="replace")
            begins += count


def test_with_one_tokenizer_every_token_is_its_own_partner(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    for form in ("plain", "alpaca"):
        pairs = paired((tokenizers[0], tokenizers[0]), form)  # type: ignore[arg-type]
        partner = pairs.partners([0, 3])
        assert torch.equal(partner, torch.arange(len(partner)))


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - DIVERGENCES.keys()))
def test_every_objective_between_vocabularies_learns_from_a_real_signal(
    name: str, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    pairs, which = paired(tokenizers), [0, 1, 3]
    ours, theirs = pairs.batches(which)
    sides = [tiny("llama", vocab_size=len(one), max_position_embeddings=512) for one in tokenizers]
    student, teacher = (Segment(side.float()) for side in sides)
    signal = compute_signal(teacher, "t", theirs, SignalRecipe(codec="float32"), [2.0])
    vocabulary_map = DeviceVocabularyMap(pairs.map, CPU)
    head = frozen_head(teacher, "float32")
    said = pairs.output(which, signal, head, vocabulary_map, sides[1].get_input_embeddings().weight.detach())
    objective: Objective = OBJECTIVES[name]()
    torch.manual_seed(0)
    extras = objective.extras(ModelSizes(32, 32, student.head.weight.detach(), head.weight, vocabulary_map))
    modules = {} if extras is None else {name: extras}
    loss = weighted_sum([(1.0, objective)], StudentOutput.of(student, ours), said, modules)
    loss.sum.backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert float(loss.sum.detach()) > 0
    assert all(torch.isfinite(one).all() for one in gradients) and any(one.abs().sum() > 0 for one in gradients)
