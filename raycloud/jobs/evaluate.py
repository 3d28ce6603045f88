"""Evaluation job: each model answers each set once per seed; ROUGE-L, exact match, perplexity, agreement.

A result directory holds ``eval/<set>/<model>/seed=<s>/`` with ``predictions.jsonl`` and ``metrics.json``, and next to
these folders ``references.json`` with the scores that do not depend on the seed. Each is written atomically, and a
resumed run keeps it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample, encode, length_sorted_batches
from raycloud.data.checks import check_eos
from raycloud.data.fingerprint import fingerprints
from raycloud.data.prompts import bounds_of
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row, evenly_spread_indices
from raycloud.durable import write_atomically, write_folder
from raycloud.errors import ModelError, ResultError, about
from raycloud.evaluation.answers import answer_end_ids, answer_text, generate_answers
from raycloud.evaluation.perplexity import TokenPredictions, predict
from raycloud.evaluation.questions import EvaluationQuestion, build_questions, references
from raycloud.evaluation.recipe import EvaluateRecipe, GenerationRecipe, folders
from raycloud.evaluation.rouge import exact, rouge_l
from raycloud.models.configuration import context_length
from raycloud.models.loading import load, load_config, load_tokenizer, resolve
from raycloud.models.segments import Segment, set_segment_attention
from raycloud.models.verdict import structure_of
from raycloud.report.console import console, progress_bars, timed
from raycloud.results import Mode, ResultDir, plain_json, record_inputs, resumable

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"
REFERENCES = "references.json"

Summary = dict[str, Any]


def run(recipe: EvaluateRecipe, mode: Mode = "new") -> Summary:
    """Run an evaluation.

    Args:
        recipe: recipe of the evaluation; without ``output`` nothing is stored.
        mode: ``new``, ``resume`` (finished seeds are kept) or ``overwrite``.

    Returns:
        The headline numbers, as in ``summary.json``.

    Raises:
        RaycloudError: an error that the user can fix, raised before the first answer where possible.
        Interrupted: Ctrl-C; with ``output``, the directory can be resumed.
    """
    if recipe.output is not None:
        ResultDir.check(recipe.output, recipe, mode)
    with resumable(recipe.output):
        candidates = _candidates(recipe)
        if recipe.output is None:
            return _evaluate(recipe, candidates, None)
        with ResultDir.open(recipe.output, recipe, mode) as results:
            record_inputs(results.path, fingerprints(recipe.data))
            if (kept := results.summary()) is not None:
                console.print(f"'{results.path}' is complete")
                return kept
            if mode == "resume":
                results.filter_metrics(lambda record: (results.path / record["folder"] / METRICS).is_file())
            summary = _evaluate(recipe, candidates, results)
            results.write_summary(summary)
            return summary


@dataclass(frozen=True)
class _ModelInputs:
    """Questions of one set for one model, and the tokenised references; sets of plain texts have samples only."""

    questions: list[EvaluationQuestion]
    samples: list[Sample]

    @property
    def rows(self) -> int:
        """Number of questions, or of texts where there are no questions."""
        return len(self.questions) or len(self.samples)


@dataclass(frozen=True)
class _Candidate:
    """Model to evaluate, before its weights are loaded."""

    name: str
    where: str
    tokenizer: PreTrainedTokenizerBase
    inputs_by_set: dict[str, _ModelInputs]
    bos: str
    """Reason why prompts begin with BOS or do not, see :class:`~raycloud.models.texts.TextBounds`."""


def _candidates(recipe: EvaluateRecipe) -> list[_Candidate]:
    """Return the models to evaluate; all errors in models and questions are raised here, before anything is written."""
    if recipe.teacher is not None:
        _causal("teacher", recipe.teacher)
    named = zip(folders(recipe.data), recipe.data, strict=True)
    sets = {name: load_rows(source, recipe.split, console.print) for name, source in named}
    models = zip(folders(recipe.models), recipe.models, strict=True)
    return [_candidate(name, source, sets, recipe) for name, source in models]


def _candidate(name: str, source: str, sets: Mapping[str, Sequence[Row]], recipe: EvaluateRecipe) -> _Candidate:
    where = _causal("models", source)
    tokenizer = load_tokenizer(where)
    check_eos("models", source, tokenizer)
    inputs_by_set = {set_: _model_inputs(rows, tokenizer, recipe) for set_, rows in sets.items()}
    prompt = max((len(question.ids) for inputs in inputs_by_set.values() for question in inputs.questions), default=0)
    both = max(len(sample.ids) for inputs in inputs_by_set.values() for sample in inputs.samples)
    positions = _positions(where)
    if max(prompt + recipe.generation.max_new_tokens, both) > positions:
        raise ModelError(
            f"models: '{source}' takes {positions} tokens; a prompt has {prompt} and generation.max_new_tokens is "
            f"{recipe.generation.max_new_tokens}; a prompt with its reference has {both}"
        )
    bounds = bounds_of(tokenizer, recipe.format, recipe.bos)
    return _Candidate(name, where, tokenizer, inputs_by_set, bounds.bos)


def _model_inputs(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, recipe: EvaluateRecipe) -> _ModelInputs:
    form, most, bos = recipe.format, recipe.max_prompt_length, recipe.bos
    if form == "plain" and "instruction" not in rows[0]:
        texts = [rows[index] for index in evenly_spread_indices(len(rows), recipe.limit)]
        return _ModelInputs(
            [], encode(texts, tokenizer, form, max_length=recipe.max_length, max_prompt_length=most, bos=bos)
        )
    questions = build_questions(rows, tokenizer, form, max_prompt_length=most, limit=recipe.limit, bos=bos)
    return _ModelInputs(questions, references(questions, tokenizer, form, recipe.max_length))


def _causal(field: str, source: str) -> str:
    """Return the path of a causal language model.

    Raises:
        ModelError: the model is an encoder.
    """
    where = resolve(source, console.print)
    if not structure_of(load_config(where)).causal:
        raise ModelError(f"{field}: '{source}' is an encoder; allowed: causal language models")
    return where


def _positions(where: str) -> int:
    return context_length(load_config(where))


@dataclass(frozen=True)
class _Model:
    """Whole model with its tokenizer and the token ids that end an answer."""

    segment: Segment
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]

    @classmethod
    def load(cls, name: str, where: str, recipe: EvaluateRecipe) -> _Model:
        with timed(f"{name} loaded"):
            loaded = load(where, device=recipe.device, dtype=recipe.dtype, notify=console.print)
        model, tokenizer = loaded.model, loaded.tokenizer
        set_segment_attention(model)
        return cls(Segment(model), tokenizer, answer_end_ids(model, tokenizer))

    def predict(self, samples: Sequence[Sample], batch_size: int) -> TokenPredictions:
        device = next(self.segment.parameters()).device
        batches = length_sorted_batches(samples, batch_size, self.tokenizer.pad_token_id)
        return predict(self.segment, (batch.to(device) for batch in batches))

    def answer(
        self, inputs: _ModelInputs, seed: int, how: GenerationRecipe, progress: Callable[[int], None]
    ) -> list[str]:
        made = generate_answers(
            self.segment,
            [question.ids for question in inputs.questions],
            how,
            seed=seed,
            ends=self.ends,
            numbers=[question.number for question in inputs.questions],
            progress=progress,
        )
        return [answer_text(ids, self.tokenizer) for ids in made]


def _evaluate(recipe: EvaluateRecipe, candidates: Sequence[_Candidate], results: ResultDir | None) -> Summary:
    taught = _teacher_predictions(recipe, candidates)
    found: dict[str, dict[str, Any]] = {name: {} for name in candidates[0].inputs_by_set}
    for candidate in candidates:
        model = _Model.load(candidate.name, candidate.where, recipe)
        for name, inputs in candidate.inputs_by_set.items():
            folder = f"eval/{name}/{candidate.name}"
            language = _perplexity(results, folder, model, inputs, taught.get((candidate.name, name)), recipe)
            asked = recipe.seeds if inputs.questions else []
            with about(f"models: '{candidate.name}'"):
                seeds = {seed: _seed(results, f"{folder}/seed={seed}", model, inputs, seed, recipe) for seed in asked}
            found[name][candidate.name] = summarise(seeds) | language
    return {
        "recipe": recipe.model_dump(mode="json"),
        "bos": {candidate.name: candidate.bos for candidate in candidates},
        "questions": {name: inputs.rows for name, inputs in candidates[0].inputs_by_set.items()},
        "sets": found,
        "average": {
            candidate.name: _average([models[candidate.name]["rougeL"] for models in found.values()])
            for candidate in candidates
        },
    }


def _average(scores: Sequence[Mapping[str, float] | None]) -> float | None:
    """Return the mean over the sets with questions; None if there are none."""
    means = [score["mean"] for score in scores if score is not None]
    return statistics.fmean(means) if means else None


def _teacher_predictions(
    recipe: EvaluateRecipe, candidates: Sequence[_Candidate]
) -> dict[tuple[str, str], TokenPredictions]:
    """Return the teacher's predictions on the references, by (model, set); only for models with its vocabulary."""
    if recipe.teacher is None:
        return {}
    where = _causal("teacher", recipe.teacher)
    vocabulary = load_tokenizer(where).get_vocab()
    wanted: dict[tuple[str, str], tuple[Sample, ...]] = {}
    for candidate in candidates:
        if candidate.tokenizer.get_vocab() == vocabulary:
            wanted |= {
                (candidate.name, set_): tuple(inputs.samples) for set_, inputs in candidate.inputs_by_set.items()
            }
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
    with timed("references predicted by the teacher"):
        # Models with the same tokenizer have the same samples.
        predictions = {
            samples: teacher.predict(samples, recipe.generation.batch_size) for samples in set(wanted.values())
        }
    return {key: predictions[samples] for key, samples in wanted.items()}


def _perplexity(
    results: ResultDir | None,
    folder: str,
    model: _Model,
    inputs: _ModelInputs,
    teacher: TokenPredictions | None,
    recipe: EvaluateRecipe,
) -> dict[str, Any]:
    """Return the perplexity of the references and the agreement with the teacher on them in percent."""
    path = results and results.path / folder / REFERENCES
    if path and path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    predictions = model.predict(inputs.samples, recipe.generation.batch_size)
    agreement = None if teacher is None else 100 * predictions.agreement(teacher)
    found = {"perplexity": predictions.perplexity, "agreement": agreement, "tokens": len(predictions.nll)}
    if path:
        write_atomically(path, plain_json(found, indent=2) + "\n")
    return found


def _seed(
    results: ResultDir | None, folder: str, model: _Model, inputs: _ModelInputs, seed: int, recipe: EvaluateRecipe
) -> dict[str, float]:
    """Return the scores of one seed: the stored ones, or those of answers generated now."""
    what = folder.removeprefix("eval/")
    path = results and results.path / folder
    if path and (path / METRICS).is_file():
        console.print(f"{what}: kept")
        return _finished_seed(path, inputs.questions)
    with progress_bars(len(inputs.questions)) as shown:
        texts = model.answer(inputs, seed, recipe.generation, lambda done: shown.move(what, done))
    predictions = grade(inputs.questions, texts)
    metrics = scores(predictions)
    console.print(f"{what}: ROUGE-L {metrics['rougeL']:.2f}, exact {metrics['exact']:.2f} %")
    if results and path:
        # Logged first: on resume, a record without its folder is dropped.
        results.log_metrics({"kind": "seed", "folder": folder, **metrics})
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions)

        def fill(scratch: Path) -> None:
            (scratch / PREDICTIONS).write_text(lines, encoding="utf-8")
            (scratch / METRICS).write_text(plain_json(metrics, indent=2) + "\n", encoding="utf-8")

        write_folder(path, fill)
    return metrics


def _finished_seed(folder: Path, questions: Sequence[EvaluationQuestion]) -> dict[str, float]:
    """Return the stored scores of a finished seed.

    Raises:
        ResultError: its answers are to other questions.
    """
    lines = (folder / PREDICTIONS).read_text(encoding="utf-8").split("\n")[:-1]
    answered = [(one["prompt"], tuple(one["references"])) for one in map(json.loads, lines)]
    if answered != [(question.prompt, question.references) for question in questions]:
        raise ResultError(f"cannot resume: '{folder}' holds answers to other questions; pass --overwrite")
    metrics: dict[str, float] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return metrics


def grade(questions: Sequence[EvaluationQuestion], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return one record per question: prompt, prediction, references, ROUGE-L and exact match.

    Raises:
        ValueError: the numbers of answers and questions differ.
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
    """Return the means over all predictions, in percent, and their number (``examples``)."""
    return {
        "rougeL": statistics.fmean(one["rougeL"] for one in predictions),
        "exact": 100 * statistics.fmean(one["exact"] for one in predictions),
        "examples": len(predictions),
    }


def summarise(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return mean and sample standard deviation (None for one seed) of each score, and the scores of each seed.

    Scores are None where there are no questions.
    """
    if not seeds:
        return {"rougeL": None, "exact": None, "seeds": {}}
    found: dict[str, Any] = {}
    for score in ("rougeL", "exact"):
        values = [metrics[score] for metrics in seeds.values()]
        found[score] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
    return found | {"seeds": {str(seed): dict(metrics) for seed, metrics in seeds.items()}}
