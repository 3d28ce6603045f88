"""One text in two tokenizers' tokens, up to a loss."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from raycloud.data.batches import IGNORE
from raycloud.data.prompts import Format
from raycloud.distill.objective import Objective, Sizes, StudentOutput, weighted_sum
from raycloud.distill.objectives import DIVERGENCES, OBJECTIVES
from raycloud.distill.pairs import Pairs, Words
from raycloud.distill.signals import SignalRecipe, frozen_head, observe
from raycloud.models.segments import Segment
from tests.models.families import tiny
from tests.tokenizers import trained

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


def paired(tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], form: Format = "alpaca") -> Pairs:
    return Pairs(ROWS, *tokenizers, form, max_length=400, max_prompt=300)


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
        words = [side.convert_ids_to_tokens(int(label)) for side, label in zip(tokenizers, labels, strict=True)]
        assert words[0] == words[1]


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
    signal = observe(teacher, "t", theirs, SignalRecipe(codec="float32"), [2.0])
    words = Words(pairs.map, CPU)
    head = frozen_head(teacher, "float32")
    said = pairs.output(which, signal, head, words, sides[1].get_input_embeddings().weight.detach())
    objective: Objective = OBJECTIVES[name]()
    torch.manual_seed(0)
    extras = objective.extras(Sizes(32, 32, student.head.weight.detach(), head.weight, words))
    modules = {} if extras is None else {name: extras}
    loss = weighted_sum([(1.0, objective)], StudentOutput.of(student, ours), said, modules)
    loss.sum.backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert float(loss.sum.detach()) > 0
    assert all(torch.isfinite(one).all() for one in gradients) and any(one.abs().sum() > 0 for one in gradients)
