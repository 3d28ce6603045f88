"""Evaluation job from recipe to result directory, stopped and resumed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2Config, GPT2LMHeadModel

from raycloud.data.prompts import Format, alpaca
from raycloud.data.sources import load_rows
from raycloud.data.splits import evenly_spread_indices
from raycloud.errors import DataError, Interrupted, ModelError, RecipeError, ResultError
from raycloud.evaluation.questions import EvaluationQuestion, build_questions, references
from raycloud.evaluation.recipe import EvaluateRecipe
from raycloud.evaluation.rouge import rouge_l
from raycloud.jobs import evaluate as protocol
from raycloud.jobs.evaluate import grade, run, summarise
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.texts import Bos
from raycloud.report.evaluate import print_evaluation
from raycloud.results import Mode
from tests.models.families import tiny
from tests.tokenizers import tokenizer_of

ROWS = [
    {"instruction": f"Say {word}.", "input": "", "output": [word, f"{word}, not red"]}
    for word in ("red", "green", "blue", "black", "white", "grey")
]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words" / "valid.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def red(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make some answers of a random model end with the word red, so that they are right."""
    ids = load_tokenizer(str(tiny_llama))(" red")["input_ids"]
    answer = protocol.generate_answers

    def reddened(*args: Any, seed: int, **options: Any) -> list[list[int]]:
        made = answer(*args, seed=seed, **options)
        return [one[: seed // 10 * number] + ids for number, one in enumerate(made)]

    monkeypatch.setattr(protocol, "generate_answers", reddened)


def recipe(model: Path, source: Path, **changes: Any) -> EvaluateRecipe:
    values: dict[str, Any] = {
        "models": [str(model)],
        "data": [str(source)],
        "split": "all",
        "seeds": [10, 20, 30],
        "generation": {"max_new_tokens": 12, "batch_size": 4},
    }
    return EvaluateRecipe.parse({**values, **changes})


@pytest.mark.usefixtures("red")
def test_a_result_directory_says_what_was_answered(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run(recipe(tiny_llama, words, output=str(out), teacher=str(tiny_llama)))
    (name,) = summary["average"]
    assert name.endswith("tiny-llama") and "/" not in name
    found = summary["sets"]["words-valid"][name]
    folder = out / "eval" / "words-valid" / name
    means = []
    for seed in (10, 20, 30):
        lines = [json.loads(line) for line in (folder / f"seed={seed}" / "predictions.jsonl").read_text().splitlines()]
        assert [line["references"] for line in lines] == [row["output"] for row in ROWS]
        assert all("### Instruction:\nSay " in line["prompt"] for line in lines)
        assert all(line["rougeL"] == rouge_l(line["prediction"], line["references"]) for line in lines)
        assert [line["exact"] for line in lines] == [True] + 5 * [False]
        means.append(statistics.fmean(line["rougeL"] for line in lines))
        metrics = json.loads((folder / f"seed={seed}" / "metrics.json").read_text())
        assert metrics == {"rougeL": means[-1], "exact": pytest.approx(100 / 6), "examples": 6}
        assert metrics == found["seeds"][str(seed)]
    assert len(set(means)) == 3
    assert len({(folder / f"seed={seed}" / "predictions.jsonl").read_text() for seed in (10, 20, 30)}) == 3
    assert found["rougeL"] == {"mean": pytest.approx(statistics.fmean(means)), "sd": statistics.stdev(means)}
    assert summary["average"][name] == found["rougeL"]["mean"]
    assert found["agreement"] == 100.0
    assert json.loads((out / "summary.json").read_text()) == summary
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), load_tokenizer(str(tiny_llama))
    samples = references(build_questions(ROWS, tokenizer, "alpaca", max_prompt_length=256), tokenizer, "alpaca", 512)
    nll = []
    with torch.no_grad():
        for sample in samples:
            log_p = model(torch.tensor([sample.ids])).logits[0].double().log_softmax(-1)
            nll += [-float(log_p[at - 1, sample.ids[at]]) for at in range(sample.prompt, len(sample.ids))]
    assert len(samples) == 12 and found["tokens"] == len(nll)
    assert found["perplexity"] == pytest.approx(math.exp(statistics.fmean(nll)), rel=1e-5)


def stock_perplexity(model: Any, ids: Sequence[Sequence[int]], prompts: Sequence[int]) -> float:
    """Compute the perplexity of all tokens after each prompt, with transformers only."""
    nll = []
    with torch.no_grad():
        for some, prompt in zip(ids, prompts, strict=True):
            log_p = model(torch.tensor([some])).logits[0].double().log_softmax(-1)
            nll += [-float(log_p[at - 1, some[at]]) for at in range(max(prompt, 1), len(some))]
    return math.exp(statistics.fmean(nll))


def test_of_plain_texts_the_perplexity_is_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tokenizer that adds BOS: token ids and perplexity of stock transformers."""
    tokenizer = tokenizer_of(begin=["<bos>"])
    model = tiny("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["A film.", "Another one, longer."]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    summary = run(recipe(tmp_path / "model", tmp_path / "texts.jsonl", format="plain", output=str(tmp_path / "out")))
    print_evaluation(summary)
    assert "BOS added: yes" in capsys.readouterr().out
    (found,) = summary["sets"].popitem()[1].values()
    stock = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = [stock(text)["input_ids"] for text in texts]
    assert all(some[0] == stock.bos_token_id for some in ids)
    assert found["perplexity"] == pytest.approx(stock_perplexity(model, ids, [1, 1]), rel=1e-5)
    assert (found["rougeL"], found["tokens"], list(summary["questions"].values())) == (None, sum(map(len, texts)), [2])
    assert list(summary["average"].values()) == [None]
    assert list(summary["bos"].values()) == ["yes (the tokenizer's own post-processor)"]
    assert not list((tmp_path / "out").rglob("predictions.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a busy machine
@pytest.mark.parametrize(
    ("form", "source", "times"), [("plain", "builtin:reviews", 20), ("alpaca", "builtin:instruct", 2)]
)
def test_gemma_is_evaluated_with_bos_as_transformers_does(form: Format, source: str, times: float) -> None:
    """Regression: without BOS, perplexity was 4,300 instead of 79 on these sentences."""

    def perplexity(bos: Bos) -> float:
        how = {
            "format": form,
            "limit": 16,
            "seeds": [1],
            "generation": {"max_new_tokens": 1, "batch_size": 4},
            "bos": bos,
        }
        summary = run(recipe(Path("builtin:gemma3-270m"), Path(source), split="test", **how))
        assert summary["bos"]["gemma3-270m"].startswith("yes" if bos == "auto" else "no")
        return float(summary["sets"].popitem()[1]["gemma3-270m"]["perplexity"])

    where = resolve("builtin:gemma3-270m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    rows = load_rows(source, "test")
    ids, prompts = [], []
    for row in (rows[index] for index in evenly_spread_indices(len(rows), 16)):
        if form == "plain":
            ids.append(tokenizer(row["text"])["input_ids"])
            prompts.append(1)
        else:
            prompt = tokenizer(alpaca(row["instruction"], row["input"]).text)["input_ids"]
            answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
            ids.append([*prompt, *answer, tokenizer.eos_token_id])
            prompts.append(len(prompt))
    assert all(some[:2].count(tokenizer.bos_token_id) == 1 for some in ids)
    found = perplexity("auto")
    assert found == pytest.approx(stock_perplexity(model, ids, prompts), rel=1e-3)
    assert perplexity(False) >= times * found


@pytest.mark.usefixtures("red")
def test_a_stopped_evaluation_resumes_where_it_stood(
    tiny_llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(recipe(tiny_llama, words))
    mine = recipe(tiny_llama, words, output=str(tmp_path / "out"))
    answer, asked = protocol.generate_answers, list[int]()

    def stopped(*args: Any, seed: int, **options: Any) -> list[list[int]]:
        asked.append(seed)
        if asked == [10, 20]:
            raise KeyboardInterrupt
        return answer(*args, seed=seed, **options)

    monkeypatch.setattr(protocol, "generate_answers", stopped)
    with pytest.raises(Interrupted, match="--resume"):
        run(mine)
    kept = next((tmp_path / "out").rglob("seed=10/predictions.jsonl"))
    assert not list((tmp_path / "out").rglob("seed=20"))
    before = kept.stat().st_mtime_ns

    def mistakes(mode: Mode, **changes: Any) -> str:
        with pytest.raises(ResultError) as raised:
            run(recipe(tiny_llama, words, output=mine.output, **changes), mode)
        return str(raised.value)

    assert "pass --resume to continue it or --overwrite" in mistakes("new")
    assert "changed: generation" in mistakes("resume", generation={"max_new_tokens": 13, "batch_size": 4})
    lines = words.read_text()
    words.write_text(lines.replace("not red", "or red"))
    assert "valid.jsonl' has changed" in mistakes("resume")
    inputs = tmp_path / "out" / "inputs.json"
    inputs.unlink()
    assert "answers to other questions" in mistakes("resume")
    inputs.unlink()
    words.write_text(lines)

    with (tmp_path / "out" / "metrics.jsonl").open("a") as log:  # of a seed killed before its folder was there
        log.write(json.dumps({"folder": f"eval/words-valid/{next(iter(whole['average']))}/seed=20"}) + "\n")
    asked.append(0)
    resumed = run(mine, "resume")
    assert asked == [10, 20, 0, 20, 30]
    assert kept.stat().st_mtime_ns == before
    assert resumed["sets"] == whole["sets"]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3
    assert run(mine, "resume") == resumed and asked[-1] == 30
    again = run(recipe(tiny_llama, words, output=mine.output, seeds=[20]), "overwrite")
    assert asked[-1] == 20 and not kept.exists()
    assert again["sets"]["words-valid"].popitem()[1]["rougeL"]["sd"] is None


@pytest.mark.usefixtures("red")
def test_models_of_two_vocabularies_and_two_sets(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    """Agreement needs the teacher's vocabulary; every pair of model and set has a row."""
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.add_tokens(["<another>"])
    other = tmp_path / "models" / "other"
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(1)
    GPT2LMHeadModel(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(words.read_text().splitlines(keepends=True)[:2]))
    both = recipe(
        tiny_llama,
        words,
        models=[str(tiny_llama), str(other)],
        data=[str(words), str(few)],
        seeds=[10],
        teacher=str(tiny_llama),
    )
    summary = run(both)
    assert list(summary["questions"].values()) == [6, 2]
    assert [len(models) for models in summary["sets"].values()] == [2, 2]
    for models in summary["sets"].values():
        llama, gpt2 = models.values()
        assert llama["agreement"] == 100.0 and gpt2["agreement"] is None
    for name, mean in summary["average"].items():
        scores = [models[name]["rougeL"]["mean"] for models in summary["sets"].values()]
        assert mean == pytest.approx(sum(scores) / 2)


def test_a_limit_changes_no_answer(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    said = {}
    for limit in (None, 2):
        run(recipe(tiny_llama, words, limit=limit, seeds=[10], output=str(tmp_path / f"limit={limit}")))
        (path,) = (tmp_path / f"limit={limit}").rglob("predictions.jsonl")
        said[limit] = path.read_text().splitlines()
    assert said[2] == [said[None][0], said[None][3]]


def test_an_end_of_text_ends_an_answer_beside_eos(tiny_llama: Path, words: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    model = protocol._Model.load("tiny", str(tiny_llama), recipe(tiny_llama, words))
    assert model.ends == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    assert len(model.ends) == 2


def test_a_real_model_answers(tmp_path: Path) -> None:
    row = {"instruction": "What is the capital of France?", "input": "", "output": "the capital of France is Paris"}
    (tmp_path / "france.jsonl").write_text(json.dumps(row) + "\n")
    summary = run(
        recipe(
            Path("builtin:smollm2-135m-instruct"),
            tmp_path / "france.jsonl",
            format="chat",
            seeds=[10],
            generation={"max_new_tokens": 16, "temperature": 0},
        )
    )
    (models,) = summary["sets"].values()
    assert models["smollm2-135m-instruct"]["exact"] == {"mean": 100.0, "sd": None}
    assert models["smollm2-135m-instruct"]["rougeL"]["mean"] == 100.0


def test_answers_and_questions_must_be_as_many() -> None:
    question = EvaluationQuestion(0, "p", (1,), ("a b",))
    (one,) = grade([question], ["A, b"])
    assert one == {"prompt": "p", "prediction": "A, b", "references": ["a b"], "rougeL": 100.0, "exact": True}
    with pytest.raises(ValueError, match="shorter"):
        grade([question, question], ["a"])
    with pytest.raises(ValueError, match="longer"):
        grade([question], ["a", "b"])


def test_spread_is_the_sample_standard_deviation() -> None:
    found = summarise({1: {"rougeL": 10.0, "exact": 0.0}, 2: {"rougeL": 14.0, "exact": 50.0}})
    assert found["rougeL"] == {"mean": 12.0, "sd": pytest.approx(8**0.5)}
    assert found["exact"]["sd"] == pytest.approx(1250**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: '1' is given twice"),
        ({"data": ["a/b/c.jsonl", "b/c.parquet"]}, "data: 'b-c' is given twice, or two of them would have this name"),
        ({"models": ["x"], "generation": {"temperature": 0}}, "seeds: at temperature 0 every seed gives the same"),
        ({"generation": {"top_p": 0}}, "generation.top_p: input should be greater than 0, got 0"),
        ({"max_length": 256}, "max_length must be above max_prompt_length=256, got 256"),
        ({"split": "dev"}, "split: input should be 'train', 'valid', 'test' or 'all', got 'dev'"),
    ],
)
def test_recipes_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        recipe(Path("m"), Path("d.jsonl"), **changes)
    assert message in str(raised.value)


def test_mistakes_leave_nothing_behind(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    """Everything that can be checked is checked before old results are removed."""
    BertConfig().save_pretrained(tmp_path / "encoder")
    out = tmp_path / "out"
    run(recipe(tiny_llama, words, output=str(out), seeds=[1], generation={"max_new_tokens": 1}))
    for changes, kind, message in [
        ({"models": [str(tmp_path / "none")]}, ModelError, "no model at"),
        ({"teacher": str(tmp_path / "none")}, ModelError, "no model at"),
        ({"teacher": str(tmp_path / "encoder")}, ModelError, "teacher: .* is an encoder"),
        ({"models": [str(tmp_path / "encoder")]}, ModelError, "models: .* is an encoder"),
        ({"data": [str(tmp_path / "none.jsonl")]}, DataError, "no data file"),
        ({"generation": {"max_new_tokens": 2_020}}, ModelError, "takes 2048 tokens; a prompt has"),
    ]:
        with pytest.raises(kind, match=message):
            run(recipe(tiny_llama, words, **{"output": str(out), **changes}), "overwrite")
        with pytest.raises(kind, match=message):
            run(recipe(tiny_llama, words, **{"output": str(tmp_path / "new"), **changes}))
    assert (out / "summary.json").is_file()
    assert not (tmp_path / "new").exists()
