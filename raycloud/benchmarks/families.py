"""Text models of the library in segments: tiny random models of every type, checked as a user's model is.

A model is accepted if the self-check accepts it. Then another random model of the same configuration must give the same
logits in segments, and the same greedy text as the library's ``generate``; an accepted model that does not is silently
wrong. Its parts must also load from a checkpoint as the library loads them (:mod:`raycloud.benchmarks.family_parts`).
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.benchmarks.family_configs import DECODERS, ENCODERS, tiny_model
from raycloud.benchmarks.family_parts import compare_parts
from raycloud.benchmarks.measure import Measured
from raycloud.errors import ModelError
from raycloud.models.chain import find_chain
from raycloud.models.loading import quiet_transformers
from raycloud.models.self_check import CheckedStructure, check_structure, cut_model, new_caches, run_segments
from raycloud.models.trace import final_of, trace
from raycloud.models.verdict import structure_verdict
from raycloud.report.console import progress_bars

ATTENTIONS = ("sdpa", "eager")
CUTS = ((0, 2), (1, 3), (2, 2), (3, 4), (0, 4))
PROMPT, NEW = 9, 12
QUICK = {
    "names": ("llama", "gpt_oss", "qwen3_moe", "gemma2", "mamba", "zamba2", "roberta"),
    "attentions": ("sdpa", "eager"),
}
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_TEXT = 24


@dataclass
class FamilyResult:
    """Result of one configuration, over its attention implementations."""

    accepted: bool = True
    composed: bool = False
    generated: bool | None = None
    """True if the greedy text was that of the whole; None for a model that keeps no cache."""
    wrong: list[str] = field(default_factory=list)
    """Errors of an accepted model."""
    refusal: str = ""
    path: str = ""
    parts: list[str] = field(default_factory=list)
    """Differences of its parts, loaded from a checkpoint, from the library's loading of the whole."""

    def figures(self) -> dict[str, Any]:
        """Figures of the configuration."""
        return {
            "accepted": self.accepted,
            "composed": self.composed,
            "generated": self.generated,
            "wrong": self.wrong,
            "refusal": self.refusal,
            "path": self.path,
            "parts": self.parts,
        }


def examine(name: str, attentions: Sequence[str] = ATTENTIONS) -> FamilyResult:
    """Check one configuration with each attention implementation that it has."""
    result, built = FamilyResult(), False
    for attention in attentions:
        try:
            model = tiny_model(name, attention)
        except ValueError:  # the library's own refusal of this implementation
            continue
        built = True
        try:
            checked = check_structure(model, tolerance=_TOLERANCE[model.dtype])
        except ModelError as error:
            return FamilyResult(accepted=False, refusal=str(error))
        result.path = checked.structure.chain.path
        other = tiny_model(name, attention, seed=1)
        _compare(other, checked, result, attention)
    if not built:
        return FamilyResult(accepted=False, refusal=f"no attention implementation of {', '.join(attentions)}")
    result.composed = not any("logits" in one for one in result.wrong)
    return result


@torch.no_grad()
def _compare(model: PreTrainedModel, checked: CheckedStructure, result: FamilyResult, attention: str) -> None:
    """Compare segments of another model of the configuration with the whole, by the facts that were found."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 96, (3, _TEXT), generator=generator)
    structure = trace(model, find_chain(model), ids)
    facts = [(one.causal, one.tuple_size, dict(one.token_leaves)) for one in (structure, checked.structure)]
    if facts[0][:2] != facts[1][:2] or facts[0][2].keys() != facts[1][2].keys():
        result.wrong.append(f"{attention}: another structure with other weights")
    whole = final_of(model(input_ids=ids))
    scale, tolerance = float(whole.abs().max()), _TOLERANCE[model.dtype]
    for pair in CUTS:
        found = run_segments(cut_model(model, structure, pair), ids)
        if not float((found - whole).abs().max()) <= tolerance * scale:
            result.wrong.append(f"{attention}: logits at {pair}")
    if checked.decode is None or model.get_output_embeddings() is None:
        return
    prompt = ids[:1, :PROMPT]
    text = _stock(model, prompt)
    same = all(_greedy(model, structure, pair, prompt) == text for pair in CUTS)
    result.generated = same and result.generated is not False
    if not same:
        result.wrong.append(f"{attention}: text")


def _greedy(model: PreTrainedModel, structure: Any, pair: tuple[int, int], prompt: Tensor) -> list[int]:
    """Greedy continuation by three segments with a cache each."""
    segments = cut_model(model, structure, pair)
    caches = new_caches(model, segments)
    tokens, x = list[int](), prompt
    for _ in range(NEW):
        tokens.append(int(run_segments(segments, x, caches)[0, -1].argmax()))
        x = torch.tensor([[tokens[-1]]])
    return tokens


def _stock(model: PreTrainedModel, prompt: Tensor) -> list[int]:
    """Greedy continuation by the library."""
    stock: Any = model
    with quiet_transformers():
        whole = stock.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            pad_token_id=0,
            eos_token_id=None,
        )
    found: list[int] = whole[0, prompt.shape[1] :].tolist()
    return found


@dataclass(frozen=True)
class TwinResult:
    """Verdict on a type's default configuration by its twin, and how long it took."""

    accepted: bool
    first_s: float
    again_s: float
    """Seconds to read the verdict that was kept."""


def judge(kind: str, *, causal: bool, folder: Path) -> TwinResult:
    """Take the verdict on a type's default configuration twice, with the first attention implementation that it has."""
    config = CONFIG_MAPPING[kind]()
    seconds: list[float] = []
    for attention in ATTENTIONS:
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            verdict = structure_verdict(config, attention, causal=causal, folder=folder)
            seconds.append(time.perf_counter() - began)
        if verdict.accepted:
            break
    return TwinResult(verdict.accepted, *seconds)


def parts_of(name: str) -> list[str]:
    """Differences of a configuration's parts from the library's loading, see :func:`~.family_parts.compare_parts`."""
    for attention in ATTENTIONS:
        with suppress(ValueError):  # the library's own refusal of this implementation
            return compare_parts(tiny_model(name, attention))
    return [f"no attention implementation of {', '.join(ATTENTIONS)}"]


def _judge_types(names: Sequence[str]) -> dict[str, TwinResult]:
    """Take the verdicts on the default configurations of the types that have these names."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            kind: judge(kind, causal=name in DECODERS, folder=Path(folder))
            for name, (kind, _) in (DECODERS | ENCODERS).items()
            if name == kind and name in names
        }


def run(*, names: Sequence[str] = (*DECODERS, *ENCODERS), attentions: Sequence[str] = ATTENTIONS) -> Measured:
    """Examine configurations of all types."""
    results: dict[str, FamilyResult] = {}
    done = itertools.count(1)
    with progress_bars(len(names)) as shown, quiet_transformers():
        for name in names:
            results[name] = examine(name, attentions)
            results[name].parts = parts_of(name)
            shown.move("configurations", next(done), name)
    twins = _judge_types(names)
    types = {(DECODERS | ENCODERS)[name][0] for name in names}
    accepted = [name for name, one in results.items() if one.accepted]
    figures = {
        "types": len(types),
        "configurations": len(names),
        "accepted": len({(DECODERS | ENCODERS)[name][0] for name in accepted}),
        "silently_wrong": sum(bool(one.wrong) for one in results.values()),
        "compose": sum(one.accepted and one.composed for one in results.values()),
        "generate": sum(bool(one.generated) for one in results.values()),
        "loads_parts": len({(DECODERS | ENCODERS)[name][0] for name, one in results.items() if not one.parts}),
        "twins": sum(twin.accepted for twin in twins.values()),
        "self_check_s": max(twin.first_s for twin in twins.values()),
        "self_check_again_s": max(twin.again_s for twin in twins.values()),
        "families": {name: one.figures() for name, one in results.items()},
    }
    rows = [
        [
            name,
            "yes" if one.accepted else "no",
            "yes" if one.accepted and one.composed else "-",
            {True: "yes", False: "no", None: "-"}[one.generated],
            "no" if one.parts else "yes",
            "; ".join(one.wrong) or one.refusal or "; ".join(one.parts),
        ]
        for name, one in results.items()
    ]
    header = ["configuration", "accepted", "composes", "generates", "loads parts", "remark"]
    return Measured("Text models in segments, by the library's own forward", header, rows, figures)
