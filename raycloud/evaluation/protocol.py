"""The evaluation job: every model answers every set once per seed; ROUGE-L, exact match, perplexity, agreement.

A result directory holds ``eval/<set>/<model>/seed=<s>/`` with ``predictions.jsonl`` and ``metrics.json``, beside them
``references.json`` with what no seed changes. Each appears as a whole or not at all, and a resumed run keeps it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample, in_length_order
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row
from raycloud.errors import ModelError, ResultError
from raycloud.evaluation.answers import answers, ends_of, text_of
from raycloud.evaluation.language import Judgement, judge
from raycloud.evaluation.questions import Question, ask, references
from raycloud.evaluation.recipe import EvaluateRecipe, GenerationRecipe, folders
from raycloud.evaluation.rouge import exact, rouge_l
from raycloud.models.anatomy import anatomy_of
from raycloud.models.attention import PLAIN
from raycloud.models.loading import load, load_config, load_tokenizer, resolve
from raycloud.models.segments import Segment
from raycloud.report.console import bars, console, working
from raycloud.results import Mode, ResultDir, resumable, write_atomically, write_folder

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"
REFERENCES = "references.json"

Summary = dict[str, Any]


def run(recipe: EvaluateRecipe, mode: Mode = "new") -> Summary:
    """Evaluate as the recipe says.

    Args:
        recipe: what to do; without ``output`` nothing is kept.
        mode: ``new``, ``resume`` (finished seeds are kept) or ``overwrite``.

    Returns:
        The headline numbers, as in ``summary.json``.

    Raises:
        RaycloudError: whatever the user can mend, before the first answer where possible.
        Interrupted: Ctrl-C; with ``output``, the directory can be resumed.
    """
    if recipe.output is not None:
        ResultDir.check(recipe.output, recipe, mode)
    with resumable(recipe.output):
        candidates = _candidates(recipe)
        if recipe.output is None:
            return _evaluate(recipe, candidates, None)
        with ResultDir.open(recipe.output, recipe, mode) as results:
            if (kept := results.summary()) is not None:
                console.print(f"'{results.path}' is complete")
                return kept
            if mode == "resume":
                results.keep_metrics(lambda record: (results.path / record["folder"] / METRICS).is_file())
            summary = _evaluate(recipe, candidates, results)
            results.write_summary(summary)
            return summary


@dataclass(frozen=True)
class _Exam:
    """What one model is asked in one set, and the references as it reads them."""

    questions: list[Question]
    samples: list[Sample]


@dataclass(frozen=True)
class _Candidate:
    """A model to evaluate, before its weights are loaded."""

    name: str
    where: str
    tokenizer: PreTrainedTokenizerBase
    exams: dict[str, _Exam]


def _candidates(recipe: EvaluateRecipe) -> list[_Candidate]:
    """Everything that can be wrong with models and questions is found here, while nothing is written yet."""
    if recipe.teacher is not None:
        _causal("teacher", recipe.teacher)
    named = zip(folders(recipe.data), recipe.data, strict=True)
    sets = {name: load_rows(source, recipe.split, console.print) for name, source in named}
    models = zip(folders(recipe.models), recipe.models, strict=True)
    return [_candidate(name, source, sets, recipe) for name, source in models]


def _candidate(name: str, source: str, sets: Mapping[str, Sequence[Row]], recipe: EvaluateRecipe) -> _Candidate:
    where = _causal("models", source)
    tokenizer = load_tokenizer(where)
    exams = {}
    for set_, rows in sets.items():
        questions = ask(rows, tokenizer, recipe.format, max_prompt=recipe.max_prompt, limit=recipe.limit)
        exams[set_] = _Exam(questions, references(questions, tokenizer, recipe.max_length))
    prompt = max(len(question.ids) for exam in exams.values() for question in exam.questions)
    both = max(len(sample.ids) for exam in exams.values() for sample in exam.samples)
    positions = _positions(where)
    if max(prompt + recipe.generation.new_tokens, both) > positions:
        raise ModelError(
            f"models: '{source}' takes {positions} tokens; a prompt has {prompt} and generation.new_tokens is "
            f"{recipe.generation.new_tokens}; a prompt with its reference has {both}"
        )
    return _Candidate(name, where, tokenizer, exams)


def _causal(field: str, source: str) -> str:
    """Where a model is that predicts the next token."""
    where = resolve(source, console.print)
    if not anatomy_of(load_config(where)).causal:
        raise ModelError(f"{field}: '{source}' is an encoder; allowed: causal language models")
    return where


def _positions(where: str) -> int:
    return int(load_config(where).max_position_embeddings)


@dataclass(frozen=True)
class _Model:
    """A whole model with its tokenizer."""

    segment: Segment
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]

    @classmethod
    def load(cls, name: str, where: str, recipe: EvaluateRecipe) -> _Model:
        with working(f"{name} loaded"):
            loaded = load(where, device=recipe.device, dtype=recipe.dtype, notify=console.print)
        model, tokenizer = loaded.model, loaded.tokenizer
        model.set_attn_implementation(PLAIN)
        return cls(Segment(model), tokenizer, ends_of(model, tokenizer))

    def judge(self, samples: Sequence[Sample], batch_size: int) -> Judgement:
        device = next(self.segment.parameters()).device
        batches = in_length_order(samples, batch_size, self.tokenizer.pad_token_id)
        return judge(self.segment, (batch.to(device) for batch in batches))

    def answer(self, exam: _Exam, seed: int, how: GenerationRecipe, progress: Callable[[int], None]) -> list[str]:
        made = answers(
            self.segment,
            [question.ids for question in exam.questions],
            how,
            seed=seed,
            ends=self.ends,
            numbers=[question.number for question in exam.questions],
            progress=progress,
        )
        return [text_of(ids, self.tokenizer) for ids in made]


def _evaluate(recipe: EvaluateRecipe, candidates: Sequence[_Candidate], results: ResultDir | None) -> Summary:
    taught = _taught(recipe, candidates)
    found: dict[str, dict[str, Any]] = {name: {} for name in candidates[0].exams}
    for candidate in candidates:
        model = _Model.load(candidate.name, candidate.where, recipe)
        for name, exam in candidate.exams.items():
            folder = f"eval/{name}/{candidate.name}"
            language = _language(results, folder, model, exam, taught.get((candidate.name, name)), recipe)
            seeds = {seed: _seed(results, f"{folder}/seed={seed}", model, exam, seed, recipe) for seed in recipe.seeds}
            found[name][candidate.name] = summarise(seeds) | language
    return {
        "recipe": recipe.model_dump(mode="json"),
        "questions": {name: len(exam.questions) for name, exam in candidates[0].exams.items()},
        "sets": found,
        "average": {
            candidate.name: statistics.fmean(models[candidate.name]["rougeL"]["mean"] for models in found.values())
            for candidate in candidates
        },
    }


def _taught(recipe: EvaluateRecipe, candidates: Sequence[_Candidate]) -> dict[tuple[str, str], Judgement]:
    """What the teacher makes of the references, by candidate of its vocabulary and set."""
    if recipe.teacher is None:
        return {}
    where = _causal("teacher", recipe.teacher)
    vocabulary = load_tokenizer(where).get_vocab()
    wanted: dict[tuple[str, str], tuple[Sample, ...]] = {}
    for candidate in candidates:
        if candidate.tokenizer.get_vocab() == vocabulary:
            wanted |= {(candidate.name, set_): tuple(exam.samples) for set_, exam in candidate.exams.items()}
        else:
            console.print(f"{candidate.name}: no agreement with the teacher, their vocabularies differ")
    if not wanted:
        return {}
    longest, positions = max(len(sample.ids) for samples in wanted.values() for sample in samples), _positions(where)
    if longest > positions:
        raise ModelError(
            f"teacher: '{recipe.teacher}' takes {positions} tokens; a prompt with its reference has {longest}"
        )
    teacher = _Model.load("teacher", where, recipe)
    with working("references judged by the teacher"):
        # Models of one tokenizer read the same tokens.
        judged = {samples: teacher.judge(samples, recipe.generation.batch_size) for samples in set(wanted.values())}
    return {place: judged[samples] for place, samples in wanted.items()}


def _language(
    results: ResultDir | None,
    folder: str,
    model: _Model,
    exam: _Exam,
    teacher: Judgement | None,
    recipe: EvaluateRecipe,
) -> dict[str, Any]:
    """Perplexity of the references, and agreement with the teacher on them, in percent."""
    path = results and results.path / folder / REFERENCES
    if path and path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    judged = model.judge(exam.samples, recipe.generation.batch_size)
    agreement = None if teacher is None else 100 * judged.agreement(teacher)
    found = {"perplexity": judged.perplexity, "agreement": agreement, "tokens": len(judged.nll)}
    if path:
        write_atomically(path, json.dumps(found, indent=2) + "\n")
    return found


def _seed(
    results: ResultDir | None, folder: str, model: _Model, exam: _Exam, seed: int, recipe: EvaluateRecipe
) -> dict[str, float]:
    """The scores of one seed: those kept, or those of answers written now."""
    what = folder.removeprefix("eval/")
    path = results and results.path / folder
    if path and (path / METRICS).is_file():
        console.print(f"{what}: kept")
        return _kept(path, exam.questions)
    with bars(len(exam.questions)) as shown:
        texts = model.answer(exam, seed, recipe.generation, lambda done: shown.move(what, done))
    predictions = grade(exam.questions, texts)
    metrics = scores(predictions)
    console.print(f"{what}: ROUGE-L {metrics['rougeL']:.2f}, exact {metrics['exact']:.2f} %")
    if results and path:
        # Logged first: a record without its folder is dropped when the run is resumed.
        results.log({"kind": "seed", "folder": folder, **metrics})
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions)

        def fill(scratch: Path) -> None:
            (scratch / PREDICTIONS).write_text(lines, encoding="utf-8")
            (scratch / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

        write_folder(path, fill)
    return metrics


def _kept(folder: Path, questions: Sequence[Question]) -> dict[str, float]:
    """The scores of a finished seed.

    Raises:
        ResultError: it answered other questions.
    """
    lines = (folder / PREDICTIONS).read_text(encoding="utf-8").split("\n")[:-1]
    answered = [(one["prompt"], tuple(one["references"])) for one in map(json.loads, lines)]
    if answered != [(question.prompt, question.references) for question in questions]:
        raise ResultError(f"cannot resume: '{folder}' holds answers to other questions; pass --overwrite")
    metrics: dict[str, float] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return metrics


def grade(questions: Sequence[Question], texts: Sequence[str]) -> list[dict[str, Any]]:
    """One record per question: prompt, prediction, references, ROUGE-L and whether it is exact.

    Raises:
        ValueError: there are not as many answers as questions.
    """
    return [
        {
            "prompt": question.prompt,
            "prediction": text,
            "references": list(question.references),
            "rougeL": rouge_l(text, question.references),
            "exact": exact(text, question.references),
        }
        for question, text in zip(questions, texts, strict=True)
    ]


def scores(predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over all predictions, in percent."""
    return {
        "rougeL": statistics.fmean(one["rougeL"] for one in predictions),
        "exact": 100 * statistics.fmean(one["exact"] for one in predictions),
        "examples": len(predictions),
    }


def summarise(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one seed) of each score over the seeds, and the scores of each."""
    found: dict[str, Any] = {}
    for score in ("rougeL", "exact"):
        values = [metrics[score] for metrics in seeds.values()]
        found[score] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
    return found | {"seeds": {str(seed): dict(metrics) for seed, metrics in seeds.items()}}
