"""The whole examination of one cut: sessions on held-out text, attacks prepared on public text, recovery of each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from raycloud.data.batches import Sample, encode, in_length_order
from raycloud.data.sources import load_rows
from raycloud.errors import DataError
from raycloud.evaluation.privacy.cut import CutModel, Trace, record
from raycloud.evaluation.privacy.inverters import MlpInverter, RidgeInverter
from raycloud.evaluation.privacy.lens import Lens
from raycloud.evaluation.privacy.matching import Matching
from raycloud.evaluation.privacy.metrics import Decode, Recovery, recovery
from raycloud.evaluation.privacy.victims import Victim, format_of, victims
from raycloud.evaluation.privacy.vocabulary import EmbeddingMatch, Vocabulary
from raycloud.link.codecs.boundary import Boundary
from raycloud.models.loading import Pretrained

PUBLIC_TEXTS = 192
"""Texts of the train split the attacker prepares with."""

ANSWER = 24
"""Tokens of an answer at most."""

_MAX_LENGTH, _MAX_PROMPT = 128, 96
_BATCH = 16
_CALIBRATION = 8
"""Public texts that say how close a match is."""

Stage = Callable[[str], AbstractContextManager[object]]
"""Told what begins; its exit is the end of it."""


class Attack(Protocol):
    """Names tokens from what the cloud saw of one text."""

    def guess(self, rows: Tensor, count: int) -> Tensor:
        """At most ``count`` tokens (T, k), best first, for each of the rows (T, d)."""
        ...


AnAttack = TypeVar("AnAttack", bound=Attack)


@dataclass(frozen=True)
class Public:
    """What the attacker computed on public text: tokens (n,), rows (n, d) and the texts' lengths."""

    ids: Tensor
    up: Tensor
    down: Tensor
    final: Tensor
    lengths: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, cut: CutModel, samples: list[Sample], pad: int) -> Public:
        """Run the whole public model over samples."""
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        lengths: list[int] = []
        for batch in in_length_order(samples, _BATCH, pad):
            ids, valid = batch.ids.to(cut.device), batch.valid.to(cut.device)
            seen = cut.run(ids, valid)
            parts.append((ids[valid], seen.up[valid], seen.down[valid], seen.final[valid].float()))
            lengths += valid.sum(dim=1).tolist()
        ids, up, down, final = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(ids, up, down, final, tuple(lengths))

    def texts(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Tokens (T,) and up-going rows (T, d) of ``count`` of the longest texts."""
        pairs = zip(self.ids.split(self.lengths), self.up.split(self.lengths), strict=True)
        return list(pairs)[-count:]


@dataclass(frozen=True)
class Findings:
    """Recovery by attack: ``input`` of the prompts' private tokens, ``output`` of the answers'."""

    first: int
    second: int
    input: dict[str, Recovery]
    output: dict[str, Recovery]

    @property
    def max_input(self) -> float:
        """The best attack's share of the prompts' private tokens."""
        return max(one.top1 for one in self.input.values())

    @property
    def max_output(self) -> float:
        """The best attack's share of the answers' tokens."""
        return max(one.top1 for one in self.output.values())

    def summary(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return {**asdict(self), "max_input": self.max_input, "max_output": self.max_output}


def examine(
    pretrained: Pretrained,
    first: int,
    second: int,
    *,
    up: Boundary | None = None,
    down: Boundary | None = None,
    source: str = "builtin:instruct",
    texts: int = 24,
    seed: int = 0,
    stage: Stage = nullcontext,
) -> Findings:
    """Attack ``texts`` sessions of a cut model as an honest-but-curious cloud that knows the public model would.

    Args:
        pretrained: a decoder with its tokenizer.
        first: the first block in the cloud.
        second: the block after the cloud's last.
        up: what rows are coded with on the way to the cloud; float32 if None.
        down: the same on the way back.
        source: its train split is the attacker's public text, its test split the victims'.
        texts: how many sessions.
        seed: of the victims, the public texts and the attacks' training.
        stage: told what goes on.

    Raises:
        ModelError: the cut does not fit the model.
        DataError: the data cannot be had or is too little.
    """
    cut, tokenizer = CutModel(pretrained.model, first, second, up, down), pretrained.tokenizer
    attacked = victims(load_rows(source, "test"), tokenizer, texts, seed)
    known = load_rows(source, "train")
    known = random.Random(seed).sample(known, min(PUBLIC_TEXTS, len(known)))
    form = format_of(known, tokenizer)
    samples = encode(known, tokenizer, form, max_length=_MAX_LENGTH, max_prompt=_MAX_PROMPT)
    if len(samples) < 2:
        raise DataError(f"data set '{source}' leaves the attacks fewer than 2 texts to prepare with")
    with stage(f"{texts} sessions recorded"):
        endings = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        traces = record(cut, [victim.ids for victim in attacked], ANSWER, endings)
    with stage(f"{len(samples)} public texts run"):
        public = Public.of(cut, samples, tokenizer.pad_token_id)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    return Findings(first, second, *_attacks(cut, public, traces, attacked, decode, seed, stage))


def _attacks(
    cut: CutModel,
    public: Public,
    traces: list[Trace],
    attacked: list[Victim],
    decode: Decode,
    seed: int,
    stage: Stage,
) -> tuple[dict[str, Recovery], dict[str, Recovery]]:
    inputs: dict[str, Recovery] = {}
    outputs: dict[str, Recovery] = {}
    secrets = [victim.secrets for victim in attacked]

    def said(name: str, prepare: Callable[[], Attack]) -> None:
        """An attack on the rows that come down: what they say next."""
        with stage(name):
            start = time.perf_counter()
            attack = prepare()
            guesses = [attack.guess(trace.down[trace.prompt - 1 :], 5) for trace in traces]
            seconds = time.perf_counter() - start
        outputs[name] = recovery(guesses, [trace.said for trace in traces], decode, seconds)

    def sent(name: str, prepare: Callable[[], AnAttack]) -> AnAttack:
        """An attack on the rows that go up: the prompt first, then each token of the answer but the last."""
        with stage(name):
            start = time.perf_counter()
            attack = prepare()
            guesses = [attack.guess(trace.up, 5) for trace in traces]
            seconds = time.perf_counter() - start
        own = [slice(victim.private.start, victim.private.stop) for victim in attacked]
        asked = [guess[part] for guess, part in zip(guesses, own, strict=True)]
        truths = [trace.ids[part] for trace, part in zip(traces, own, strict=True)]
        inputs[name] = recovery(asked, truths, decode, seconds, secrets)
        answers = [guess[trace.prompt :] for guess, trace in zip(guesses, traces, strict=True)]
        outputs[name] = recovery(answers, [trace.ids[trace.prompt :] for trace in traces], decode, seconds)
        return attack

    said("a1_plain_lens", lambda: Lens.plain(cut.last))
    said("a1_tuned_lens", lambda: Lens.tuned(cut.last, public.down, public.final))
    vocabulary = Vocabulary.of(cut.edge, cut.words)
    sent("a0_embedding", lambda: EmbeddingMatch(vocabulary))
    linear = sent("a2_ridge", lambda: RidgeInverter.fit(public.up, public.ids, vocabulary))
    deep = sent("a3_mlp", lambda: MlpInverter.fit(public.up, public.ids, linear, seed=seed))
    sent("a5_matching", lambda: Matching.fit(cut, deep.guess, linear.affine.scale, public.texts(_CALIBRATION)))
    return inputs, outputs
