"""Equality of a model cut in three with the whole model, at every pair of cuts, fixed or drawn for each token."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.benchmarks.measure import SMOLLM2, Measured
from raycloud.models.loading import load, quiet_transformers
from raycloud.models.segments import Segment
from raycloud.models.texts import TextBounds
from raycloud.report.console import progress_bars
from raycloud.split.inference.blocks import CloudBlocks, LocalBlocks, cloud_stage
from raycloud.split.inference.generation import SplitTokenSource
from raycloud.split.plan import PlanSet, SplitPlan

Attention = Literal["eager", "sdpa"]
TEXT, NEW, PROMPT = 48, 48, 24
CHUNKS = (7, 1, 1, 16, 2, 1, 20)
PAIRS, RANDOM_RUNS = 40, 10
_TOLERANCE, _LEAST_MARGIN, _LEAST_DISTINCT, _SEEDS = 1e-3, 1e-3, 10, 60

_SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 199}
_ROTARY = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256}
_WINDOW = {"head_dim": 16, "sliding_window": 16}
RANDOM_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _ROTARY),
    "qwen3": ("qwen3", {**_ROTARY, **_WINDOW, "use_sliding_window": True, "max_window_layers": 4}),
    # Gemma scales its embeddings by the root of the hidden size: a wide model with tied weights repeats one token.
    "gemma3": ("gemma3_text", {**_ROTARY, **_WINDOW, "hidden_size": 32, "sliding_window_pattern": 3}),
    "gpt2": ("gpt2", {**_SMALL, "n_positions": 256}),
    "opt": ("opt", {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 256}),
}


FAMILIES = (*RANDOM_MODELS, "smollm2")
QUICK = {"families": tuple(RANDOM_MODELS), "attentions": ("sdpa",), "ties": (True,), "pairs": 2, "drawn": 2}


@dataclass
class ComparisonCounts:
    """Counts of one model with one attention implementation."""

    pairs: int = 0
    runs: int = 0
    mismatches: int = 0

    def add(self, other: ComparisonCounts) -> None:
        """Add the counts of another model."""
        self.pairs += other.pairs
        self.runs += other.runs
        self.mismatches += other.mismatches


@dataclass
class Reference:
    """Whole model with a text, its logits, and the greedy continuation of its prompt by ``transformers``."""

    model: PreTrainedModel
    text: Tensor
    """(1, TEXT) token ids."""
    logits: Tensor
    """(1, TEXT, V) logits of the text."""
    continuation: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """First tokens of the text, which are continued."""
        return self.text[0, :PROMPT].tolist()

    @property
    def blocks(self) -> int:
        """Number of blocks of the model."""
        return Segment(self.model).hi


def random_model(family: str, tied: bool, attention: Attention, seed: int) -> PreTrainedModel:
    """Make a random model whose weights vary enough that its greedy text is not constant."""
    model_type, options = RANDOM_MODELS[family]
    wide = "init_std" if model_type == "opt" else "initializer_range"
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made: Any = CONFIG_MAPPING[model_type]
    config = made(**options, **special, **{wide: 0.15}, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def reference(model: PreTrainedModel, text: Tensor) -> Reference | None:
    """Compute the reference of a text.

    Returns:
        None if a comparison would prove nothing: the continuation has too few distinct tokens, or the two largest
        logits at a step are too close.
    """
    prompt = text[:, :PROMPT]
    with quiet_transformers():
        stock: Any = model
        whole = stock.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            pad_token_id=0,
            eos_token_id=None,
        )
    continuation = whole[0, PROMPT:].tolist()
    top = model(input_ids=whole).logits[0, PROMPT - 1 : -1].topk(2).values
    if len(set(continuation)) < _LEAST_DISTINCT or float((top[:, 0] - top[:, 1]).min()) <= _LEAST_MARGIN:
        return None
    return Reference(model, text, model(input_ids=text).logits, continuation)


def random_reference(family: str, tied: bool, attention: Attention) -> Reference:
    """Find the first of several random models for which :func:`reference` is not None.

    Raises:
        RuntimeError: there is none.
    """
    for seed in range(_SEEDS):
        text = torch.randint(3, _SMALL["vocab_size"], (1, TEXT), generator=torch.Generator().manual_seed(seed))
        if (found := reference(random_model(family, tied, attention, seed), text)) is not None:
            return found
    raise RuntimeError(f"no random {family} out of {_SEEDS} generates varied text")


def real_reference(attention: Attention = "sdpa") -> Reference:
    """Compute the reference of SmolLM2 with the beginning of a real text.

    Raises:
        RuntimeError: :func:`reference` is None.
    """
    loaded = load(SMOLLM2, device="cpu", dtype="float32", attention=attention)
    bare = loaded.tokenizer(_STORY, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([TextBounds.of(loaded.tokenizer).begun(bare)[:TEXT]])
    found = reference(loaded.model, ids)
    if found is None:
        raise RuntimeError("the real model's continuation varies too little to compare")
    return found


_STORY = (
    "The old lighthouse keeper had not spoken to anyone for three weeks when the boat came. It was a small boat, "
    "painted green, and the woman at the oars looked as if she had rowed all the way from the mainland. He put down "
    "his lamp and"
)


def cut(model: PreTrainedModel, plans: PlanSet, *, chunk: int = 128, seed: int = 0) -> SplitTokenSource:
    """Cut a model in three parts that run in this process."""
    blocks = Segment(model).hi
    ahead, behind = plans.edge(blocks)
    middle = Segment(model, plans.cloud.start, max(plans.cloud.start, plans.cloud.stop), embed=False, head=False)

    def connect() -> CloudBlocks:
        return LocalBlocks(cloud_stage(middle, plans, blocks))

    first = Segment(model, 0, ahead.stop, embed=True, head=False)
    last = Segment(model, behind.start, blocks, embed=False, head=True)
    return SplitTokenSource(first, last, connect, plans, chunk=chunk, seed=seed)


Cut = Callable[..., SplitTokenSource]


def logits_agree(known: Reference, plans: PlanSet, make: Cut = cut) -> bool:
    """Tell whether a text fed in uneven chunks gives the unsplit model's logits at every token."""
    triad = make(known.model, plans).open()
    parts = [triad.advance(part, logits=part.shape[1]) for part in known.text.split(CHUNKS, dim=1)]
    triad.close()
    logits = torch.cat(parts, dim=1)
    error = (logits - known.logits).norm() / known.logits.norm()
    return bool(error <= _TOLERANCE) and bool((logits.argmax(-1) == known.logits.argmax(-1)).all())


def text_agrees(known: Reference, plans: PlanSet, seed: int = 0, make: Cut = cut) -> bool:
    """Tell whether greedy decoding with these plans, the prompt fed in chunks, gives the tokens of ``generate``."""
    return list(make(known.model, plans, chunk=9, seed=seed).stream(known.prompt, NEW)) == known.continuation


def all_plans(blocks: int) -> list[PlanSet]:
    """Make a plan for every pair of cuts."""
    pairs = itertools.combinations_with_replacement(range(blocks + 1), 2)
    return [PlanSet.of(SplitPlan(first, second)) for first, second in pairs]


def drawn_plans(blocks: int, count: int) -> list[PlanSet]:
    """Make random sets of cuts from which each token draws; they may include both ends of the model."""
    found: list[PlanSet] = []
    for seed in itertools.count():
        if len(found) == count:
            return found
        source = random.Random(seed)
        firsts, seconds = (tuple(sorted(source.sample(range(blocks + 1), 3))) for _ in range(2))
        if min(firsts) <= max(seconds):
            found.append(PlanSet(firsts, seconds))
    return found


def compare_plans(
    known: Reference, step: Callable[[], None], pairs: int = PAIRS, drawn: int = RANDOM_RUNS
) -> ComparisonCounts:
    """Compare logits at every pair of cuts, and text at some of them and with plans drawn for each token.

    Args:
        known: whole model and its outputs.
        step: called after each comparison.
        pairs: number of pairs of cuts at which text is compared.
        drawn: number of sets of cuts from which each token draws.
    """
    plans, tally = all_plans(known.blocks), ComparisonCounts()
    for plan in plans:
        tally.pairs += 1
        tally.mismatches += not logits_agree(known, plan)
        step()
    some = random.Random(0).sample(plans, min(pairs, len(plans)))
    for seed, plan in enumerate([*some, *drawn_plans(known.blocks, drawn)]):
        tally.runs += 1
        tally.mismatches += not text_agrees(known, plan, seed)
        step()
    return tally


def _references(family: str, attention: Attention, ties: Sequence[bool]) -> Iterable[Reference]:
    if family == "smollm2":
        return (real_reference(attention),)
    return (random_reference(family, tied, attention) for tied in ties)


def run(
    *,
    families: Sequence[str] = FAMILIES,
    attentions: Sequence[Attention] = ("eager", "sdpa"),
    ties: Sequence[bool] = (True, False),
    pairs: int = PAIRS,
    drawn: int = RANDOM_RUNS,
) -> Measured:
    """Compare random models, tied and untied, with each attention implementation, and SmolLM2 with the last one."""
    jobs: list[tuple[str, Attention]] = [
        (family, attention)
        for family in families
        for attention in (attentions[-1:] if family == "smollm2" else attentions)
    ]
    by_family: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    total, rows = ComparisonCounts(), []
    with progress_bars(100) as shown:
        for family, attention in jobs:
            tally = ComparisonCounts()
            for known in _references(family, attention, ties):
                done = itertools.count(1)
                steps = len(all_plans(known.blocks)) + min(pairs, len(all_plans(known.blocks))) + drawn
                name = f"{family} {attention} ({'tied' if known.model.config.tie_word_embeddings else 'untied'})"

                def step(name: str = name, done: Iterator[int] = done, steps: int = steps) -> None:
                    shown.move(name, 100 * next(done) // steps, "%")

                tally.add(compare_plans(known, step, pairs, drawn))
            by_family[family][attention] = {"pairs": tally.pairs, "runs": tally.runs, "mismatches": tally.mismatches}
            rows.append([family, attention, str(tally.pairs), str(tally.runs), str(tally.mismatches)])
            total.add(tally)
    result = {"families": by_family, "pairs": total.pairs, "runs": total.runs, "mismatches": total.mismatches}
    rows.append(["all", "", str(total.pairs), str(total.runs), str(total.mismatches)])
    header = ["family", "attention", "pairs (logits)", "runs (text)", "mismatches"]
    return Measured("A model cut in three against the whole one", header, rows, result)
