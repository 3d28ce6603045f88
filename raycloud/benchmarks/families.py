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
from raycloud.benchmarks.family_speed import general_vs_fast
from raycloud.benchmarks.measure import PAIRS, Measured
from raycloud.errors import ModelError
from raycloud.models.loading import quiet_transformers
from raycloud.models.segments import cut_segments
from raycloud.models.self_check import CheckedStructure, check_structure, run_parts, whole_output
from raycloud.models.structure import ModelStructure
from raycloud.models.threads import torch_threads
from raycloud.models.trace import trace
from raycloud.models.verdict import forget_verdicts, structure_verdict
from raycloud.report.console import progress_bars

ATTENTIONS = ("sdpa", "eager")
CUTS = ((0, 2), (1, 3), (2, 2), (3, 4), (0, 4))
PROMPT, NEW = 9, 12
QUICK = {
    "names": ("llama", "gpt_oss", "qwen3_moe", "gemma2", "mamba", "zamba2", "roberta"),
    "attentions": ("sdpa", "eager"),
    "new": 4,
    "pairs": 1,
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
    layout: str | None = None
    """Layout of the fast path, where it was measured equal."""

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
            "layout": self.layout,
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
        result.path = checked.structure.blocks
        result.layout = checked.structure.layout
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
    found = trace(model, ids)
    if not any(_same_facts(one, checked.structure) for one in (found.structure, found.shared_structure)):
        result.wrong.append(f"{attention}: another structure with other weights")
    general = checked.structure.model_copy(update={"layout": None})
    structures = [general, checked.structure] if checked.structure.layout else [general]
    whole = whole_output(model, general, ids)
    scale, tolerance = float(whole.abs().max()), _TOLERANCE[model.dtype]
    for structure, pair in itertools.product(structures, CUTS):
        logits = run_parts(cut_segments(model, *pair, structure), ids)
        if not float((logits - whole).abs().max()) <= tolerance * scale:
            result.wrong.append(f"{attention}: logits at {pair}, {structure.layout or 'general'}")
    if checked.decode is None or model.get_output_embeddings() is None:
        return
    prompt = ids[:1, :PROMPT]
    text = _stock(model, prompt)
    same = all(
        _greedy(model, structure, pair, prompt) == text for structure, pair in itertools.product(structures, CUTS)
    )
    result.generated = same and result.generated is not False
    if not same:
        result.wrong.append(f"{attention}: text")


def _same_facts(found: ModelStructure, expected: ModelStructure) -> bool:
    """Tell whether two models of one configuration have the same structure, as far as one forward shows it."""
    names = ("blocks", "tuple_size", "early", "shared", "late", "has_norm", "causal")
    return all(getattr(found, name) == getattr(expected, name) for name in names)


def _greedy(model: PreTrainedModel, structure: ModelStructure, pair: tuple[int, int], prompt: Tensor) -> list[int]:
    """Greedy continuation by three segments with a cache each."""
    parts = cut_segments(model, *pair, structure)
    caches = [part.new_cache() for part in parts]
    tokens, x = list[int](), prompt
    for _ in range(NEW):
        tokens.append(int(run_parts(parts, x, caches)[0, -1].argmax()))
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


def judge(kind: str, folder: Path) -> TwinResult:
    """Take the verdict on a type's default configuration twice."""
    config, seconds = CONFIG_MAPPING[kind](), list[float]()
    for _ in range(2):
        forget_verdicts()
        began = time.perf_counter()
        verdict = structure_verdict(config, folder=folder)
        seconds.append(time.perf_counter() - began)
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
            kind: judge(kind, Path(folder))
            for name, (kind, _) in (DECODERS | ENCODERS).items()
            if name == kind and name in names
        }


def run(
    *,
    names: Sequence[str] = (*DECODERS, *ENCODERS),
    attentions: Sequence[str] = ATTENTIONS,
    new: int = 64,
    pairs: int = PAIRS,
) -> Measured:
    """Examine configurations of all types, and measure the general path of a segment beside the fast one.

    Args:
        names: configurations.
        attentions: attention implementations.
        new: tokens to generate for the comparison of times.
        pairs: number of interleaved measurements.
    """
    results: dict[str, FamilyResult] = {}
    done = itertools.count(1)
    # The models are too small for more than one thread.
    with progress_bars(len(names)) as shown, quiet_transformers(), torch_threads(1):
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
        "fast": sum(one.layout is not None for one in results.values()),
        "twins": sum(twin.accepted for twin in twins.values()),
        "general_vs_fast": general_vs_fast(new=new, pairs=pairs),
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
            one.layout or ("general" if one.accepted else "-"),
            "; ".join(one.wrong) or one.refusal or "; ".join(one.parts),
        ]
        for name, one in results.items()
    ]
    header = ["configuration", "accepted", "composes", "generates", "loads parts", "path", "remark"]
    return Measured("Text models in segments", header, rows, figures)
