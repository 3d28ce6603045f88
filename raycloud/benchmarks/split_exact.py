"""Does a model cut in three say what the whole one says? Every pair of cuts, fixed and drawn anew for each token."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.benchmarks.measure import SMOLLM2, show
from raycloud.models.loading import load, quiet_transformers
from raycloud.models.segments import Segment
from raycloud.report.console import bars
from raycloud.split.generation import SplitModel
from raycloud.split.middle import LocalMiddle, Middle, middle_state
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
    # Gemma scales its embeddings by the root of the width: a wide one with tied weights only repeats itself.
    "gemma3": ("gemma3_text", {**_ROTARY, **_WINDOW, "hidden_size": 32, "sliding_window_pattern": 3}),
    "gpt2": ("gpt2", {**_SMALL, "n_positions": 256}),
    "opt": ("opt", {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 256}),
}


@dataclass
class Tally:
    """What one model under one attention implementation came to."""

    pairs: int = 0
    runs: int = 0
    mismatches: int = 0

    def add(self, other: Tally) -> None:
        """Count another's, too."""
        self.pairs += other.pairs
        self.runs += other.runs
        self.mismatches += other.mismatches


@dataclass
class Reference:
    """A whole model with a text and what stock greedy decoding makes of its prompt."""

    model: PreTrainedModel
    text: Tensor
    """(1, TEXT) token ids."""
    logits: Tensor
    """(1, TEXT, V) of the text."""
    continuation: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """The text's beginning, which is continued."""
        return self.text[0, :PROMPT].tolist()

    @property
    def blocks(self) -> int:
        """Of the model."""
        return Segment(self.model).hi


def random_model(family: str, tied: bool, attention: Attention, seed: int) -> PreTrainedModel:
    """A random model with weights wide enough that its greedy text is not constant."""
    model_type, options = RANDOM_MODELS[family]
    wide = "init_std" if model_type == "opt" else "initializer_range"
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made: Any = CONFIG_MAPPING[model_type]
    config = made(**options, **special, **{wide: 0.15}, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def reference(model: PreTrainedModel, text: Tensor) -> Reference | None:
    """The reference of a text, or None if its continuation is too dull or too close a call to prove anything."""
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
    """The first of many random models whose greedy text is worth comparing.

    Raises:
        RuntimeError: there is none among them.
    """
    for seed in range(_SEEDS):
        text = torch.randint(3, _SMALL["vocab_size"], (1, TEXT), generator=torch.Generator().manual_seed(seed))
        if (found := reference(random_model(family, tied, attention, seed), text)) is not None:
            return found
    raise RuntimeError(f"no random {family} out of {_SEEDS} generates varied text")


def real_reference(attention: Attention = "sdpa") -> Reference:
    """SmolLM2 with the beginning of a real text."""
    loaded = load(SMOLLM2, device="cpu", dtype="float32", attention=attention)
    ids = loaded.tokenizer(_STORY, return_tensors="pt")["input_ids"][:, :TEXT]
    found = reference(loaded.model, ids)
    if found is None:
        raise RuntimeError("the real model's continuation is too dull to compare")
    return found


_STORY = (
    "The old lighthouse keeper had not spoken to anyone for three weeks when the boat came. It was a small boat, "
    "painted green, and the woman at the oars looked as if she had rowed all the way from the mainland. He put down "
    "his lamp and"
)


def cut(model: PreTrainedModel, plans: PlanSet, *, chunk: int = 128, seed: int = 0) -> SplitModel:
    """The model cut in three within this process."""
    blocks = Segment(model).hi
    ahead, behind = plans.edge(blocks)
    middle = Segment(model, plans.cloud.start, max(plans.cloud.start, plans.cloud.stop), embed=False, head=False)

    def connect() -> Middle:
        return LocalMiddle(middle_state(middle, plans, blocks))

    first = Segment(model, 0, ahead.stop, embed=True, head=False)
    last = Segment(model, behind.start, blocks, embed=False, head=True)
    return SplitModel(first, last, connect, plans, chunk=chunk, seed=seed)


Cut = Callable[..., SplitModel]


def logits_agree(known: Reference, plans: PlanSet, make: Cut = cut) -> bool:
    """Whether a text fed in uneven chunks has the unsplit model's logits at every token."""
    triad = make(known.model, plans).open()
    parts = [triad.advance(part, logits=part.shape[1]) for part in known.text.split(CHUNKS, dim=1)]
    triad.close()
    logits = torch.cat(parts, dim=1)
    error = (logits - known.logits).norm() / known.logits.norm()
    return bool(error <= _TOLERANCE) and bool((logits.argmax(-1) == known.logits.argmax(-1)).all())


def text_agrees(known: Reference, plans: PlanSet, seed: int = 0, make: Cut = cut) -> bool:
    """Whether greedy decoding with these plans, prompt in uneven chunks, gives stock ``generate``'s tokens."""
    return list(make(known.model, plans, chunk=9, seed=seed).stream(known.prompt, NEW)) == known.continuation


def all_plans(blocks: int) -> list[PlanSet]:
    """Every pair of cuts."""
    pairs = itertools.combinations_with_replacement(range(blocks + 1), 2)
    return [PlanSet.of(SplitPlan(first, second)) for first, second in pairs]


def drawn_plans(blocks: int, count: int) -> list[PlanSet]:
    """Sets of cuts to draw from for each token, ends of the model included."""
    found: list[PlanSet] = []
    for seed in itertools.count():
        if len(found) == count:
            return found
        source = random.Random(seed)
        firsts, seconds = (tuple(sorted(source.sample(range(blocks + 1), 3))) for _ in range(2))
        if min(firsts) <= max(seconds):
            found.append(PlanSet(firsts, seconds))
    return found


def examine(known: Reference, step: Callable[[], None], pairs: int = PAIRS, drawn: int = RANDOM_RUNS) -> Tally:
    """Logits at every pair of cuts, text at some of them and with plans drawn for each token."""
    plans, tally = all_plans(known.blocks), Tally()
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


def _references(family: str, attention: Attention) -> Iterable[Reference]:
    if family == "smollm2":
        return (real_reference(attention),)
    return (random_reference(family, tied, attention) for tied in (True, False))


def run(as_json: bool) -> dict[str, Any]:
    """Examine all models, print the table, and return what went into it."""
    jobs: list[tuple[str, Attention]] = list(itertools.product(RANDOM_MODELS, ("eager", "sdpa")))
    jobs.append(("smollm2", "sdpa"))
    by_family: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    total, rows = Tally(), []
    with bars(100) as shown:
        for family, attention in jobs:
            tally = Tally()
            for known in _references(family, attention):
                done = itertools.count(1)
                steps = len(all_plans(known.blocks)) + min(PAIRS, len(all_plans(known.blocks))) + RANDOM_RUNS
                name = f"{family} {attention} ({'tied' if known.model.config.tie_word_embeddings else 'untied'})"

                def step(name: str = name, done: Iterator[int] = done, steps: int = steps) -> None:
                    shown.move(name, 100 * next(done) // steps, "%")

                tally.add(examine(known, step))
            by_family[family][attention] = {"pairs": tally.pairs, "runs": tally.runs, "mismatches": tally.mismatches}
            rows.append([family, attention, str(tally.pairs), str(tally.runs), str(tally.mismatches)])
            total.add(tally)
    result = {"families": by_family, "pairs": total.pairs, "runs": total.runs, "mismatches": total.mismatches}
    rows.append(["all", "", str(total.pairs), str(total.runs), str(total.mismatches)])
    header = ["family", "attention", "pairs (logits)", "runs (text)", "mismatches"]
    show("A model cut in three against the whole one", header, rows, result, as_json)
    return result
