"""Student and teacher on held-out text, against the stock models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raycloud.data.batches import encode
from raycloud.distill.evaluation import ALL, StudentEvaluator
from raycloud.errors import ModelError
from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.models.loading import load
from tests.tokenizers import trained

ROWS = {
    "short": [{"text": "The film is fine."}, {"text": "A phone that works."}],
    "long": [{"text": "The president said that taxes would not be raised before the summer."}],
}
LENGTHS = {"max_length": 24, "max_prompt_length": 8}


def test_scores_are_those_of_the_stock_models(tiny_llama: Path) -> None:
    teacher, student = load(str(tiny_llama), device="cpu"), load(str(tiny_llama), device="cpu")
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter, generator=torch.Generator().manual_seed(1)))
    evaluated = StudentEvaluator(teacher, None, ROWS, "plain", **LENGTHS).evaluate_student(student.model)
    nll, kl, agree, tokens = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for sample in encode([row for rows in ROWS.values() for row in rows], teacher.tokenizer, "plain", **LENGTHS):
            ids = torch.tensor([sample.ids])
            p, q = (one.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for one in (teacher, student))
            nll -= float(q.gather(-1, ids[0, 1:, None]).sum())
            kl += float((p.exp() * (p - q)).sum())
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(sample.ids) - 1
    score = evaluated.scores[ALL]
    assert score.tokens == tokens
    assert score.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert score.kl == pytest.approx(kl / tokens, rel=1e-3)
    assert score.agreement == agree / tokens
    assert [(text.group, text.text) for text in evaluated.texts] == [("short", 0), ("short", 1), ("long", 0)]
    assert sum(text.kl for text in evaluated.texts) == pytest.approx(kl, rel=1e-3)


def test_a_teacher_is_no_distance_from_itself(tiny_llama: Path) -> None:
    teacher = load(str(tiny_llama), device="cpu")
    evaluator = StudentEvaluator(teacher, None, ROWS, "plain", **LENGTHS)
    score = evaluator.evaluate_student(teacher.model).scores[ALL]
    assert score.kl == pytest.approx(0.0, abs=1e-5)
    assert score.agreement == 1.0
    assert score.perplexity == pytest.approx(evaluator.evaluate_teacher()[ALL].perplexity)


def test_a_student_with_its_own_tokenizer_is_compared_where_both_have_a_token(tiny_llama: Path) -> None:
    teacher = load(str(tiny_llama), device="cpu")
    own = trained(300, ["the phone film is summer"] * 20)
    student = load(str(tiny_llama), device="cpu").model
    evaluated = StudentEvaluator(teacher, own, ROWS, "plain", **LENGTHS).evaluate_student(student)
    compared = sum(text.compared for text in evaluated.texts)
    assert 0 < compared < sum(text.tokens for text in evaluated.texts)
    assert evaluated.scores[ALL].kl > 0
    assert 0 <= evaluated.scores[ALL].agreement <= 1


@pytest.mark.parametrize("own", [None, ["the phone film is summer"] * 20], ids=["one tokenizer", "two"])
def test_what_the_teacher_makes_of_the_texts_is_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: list[str] | None
) -> None:
    teacher, other = load(str(tiny_llama), device="cpu"), None if own is None else trained(300, own)
    keeping = {**LENGTHS, "cache": tmp_path, "name": "teacher"}
    first = StudentEvaluator(teacher, other, ROWS, "plain", **keeping)
    assert len(list(tmp_path.iterdir())) == len(ROWS)
    monkeypatch.setattr("raycloud.distill.evaluation.final_hidden", lambda *_: pytest.fail("asked again"))
    again = StudentEvaluator(teacher, other, ROWS, "plain", **keeping)
    assert again.evaluate_teacher() == first.evaluate_teacher()
    assert again.evaluate_student(teacher.model) == first.evaluate_student(teacher.model)
    monkeypatch.undo()
    for path in tmp_path.iterdir():
        path.write_bytes(b"x")
    assert StudentEvaluator(teacher, other, ROWS, "plain", **keeping).evaluate_teacher() == first.evaluate_teacher()
    StudentEvaluator(teacher, other, ROWS, "plain", **{**keeping, "name": "another"})
    assert len(list(tmp_path.iterdir())) == 2 * len(ROWS)


def test_answers_are_scored_against_references(tiny_llama: Path) -> None:
    teacher = load(str(tiny_llama), device="cpu")
    rows = [{"instruction": "Say it.", "input": "", "output": "The answer."}] * 3
    evaluator = StudentEvaluator(teacher, None, {"all": rows}, "alpaca", max_length=96, max_prompt_length=64)
    how = GenerationRecipe(max_new_tokens=4)
    assert evaluator.rouge_l(None, rows, 2, how, 1) == evaluator.rouge_l(teacher.model, rows, 2, how, 1)


def test_which_model_says_nothing_finite_is_named(tiny_llama: Path) -> None:
    """Regression: completions of a diverged student repeated the first token of the vocabulary."""
    teacher, student = load(str(tiny_llama), device="cpu"), load(str(tiny_llama), device="cpu").model
    torch.nn.init.constant_(student.get_input_embeddings().weight, math.nan)
    rows = [{"instruction": "Say it.", "input": "", "output": "It."}]
    evaluator = StudentEvaluator(teacher, None, {"all": rows}, "alpaca", max_length=256, max_prompt_length=200)
    with pytest.raises(ModelError, match=r"^student: the model's logits are not finite \(nan\)"):
        evaluator.compare(student, ["The film"], 2)
    with pytest.raises(ModelError, match=r"^student: the model's logits are not finite \(nan\)"):
        evaluator.rouge_l(student, rows, 1, GenerationRecipe(max_new_tokens=2), seed=1)
