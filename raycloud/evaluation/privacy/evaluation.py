"""Privacy evaluation of one cut: sessions on held-out text, attacks fitted on public text, recovery of each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from raycloud.data.batches import Sample, encode, length_sorted_batches
from raycloud.data.prompts import default_format
from raycloud.data.sources import load_rows
from raycloud.errors import DataError
from raycloud.evaluation.privacy.inverters import MlpInverter, RidgeInverter
from raycloud.evaluation.privacy.lens import Lens
from raycloud.evaluation.privacy.matching import Matching
from raycloud.evaluation.privacy.metrics import Decode, Recovery, recovery
from raycloud.evaluation.privacy.split_decoder import SessionTrace, SplitDecoder, record_sessions
from raycloud.evaluation.privacy.token_directions import EmbeddingMatch, TokenDirections
from raycloud.evaluation.privacy.victims import Victim, victims
from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.models.loading import Pretrained
from raycloud.models.texts import end_ids

PUBLIC_TEXTS = 192
"""Number of texts of the train split that the attacks are fitted on."""

MAX_ANSWER = 24
"""Maximum number of tokens of an answer."""

_MAX_LENGTH, _MAX_PROMPT = 128, 96
_BATCH = 16
_CALIBRATION = 8
"""Number of public texts that calibrate the tolerance of :class:`Matching`."""

ProgressContext = Callable[[str], AbstractContextManager[object]]
"""Function from the name of a stage to a context that lasts as long as the stage."""


class Attack(Protocol):
    """Attack that guesses the tokens of one text from the hidden states that the cloud saw."""

    def guess(self, hidden: Tensor, count: int) -> Tensor:
        """Guess at most ``count`` tokens (T, k), best first, for each of the hidden states (T, d)."""
        ...


AnAttack = TypeVar("AnAttack", bound=Attack)


@dataclass(frozen=True)
class PublicTexts:
    """Data of the attacker on public text: token ids (n,), hidden states (n, d) and the texts' lengths.

    ``uplink`` enters the cloud, ``downlink`` leaves it, ``final`` enters the head.
    """

    ids: Tensor
    uplink: Tensor
    downlink: Tensor
    final: Tensor
    lengths: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, cut: SplitDecoder, samples: list[Sample], pad: int) -> PublicTexts:
        """Run the whole public model over the samples and collect its hidden states."""
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        lengths: list[int] = []
        for batch in length_sorted_batches(samples, _BATCH, pad):
            ids, valid = batch.ids.to(cut.device), batch.valid.to(cut.device)
            seen = cut.run(ids, valid)
            parts.append((ids[valid], seen.uplink[valid], seen.downlink[valid], seen.final[valid].float()))
            lengths += valid.sum(dim=1).tolist()
        ids, uplink, downlink, final = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(ids, uplink, downlink, final, tuple(lengths))

    def texts(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Token ids (T,) and uplink hidden states (T, d) of the ``count`` longest texts."""
        pairs = zip(self.ids.split(self.lengths), self.uplink.split(self.lengths), strict=True)
        return list(pairs)[-count:]


@dataclass(frozen=True)
class PrivacyResult:
    """Recovery by attack name: ``input`` of the prompts' private tokens, ``output`` of the answers' tokens."""

    start_block: int
    end_block: int
    input: dict[str, Recovery]
    output: dict[str, Recovery]

    @property
    def max_input(self) -> float:
        """Largest share of the prompts' private tokens that one attack recovers."""
        return max(one.top1 for one in self.input.values())

    @property
    def max_output(self) -> float:
        """Largest share of the answers' tokens that one attack recovers."""
        return max(one.top1 for one in self.output.values())

    def summary(self) -> dict[str, Any]:
        """All results as one JSON object."""
        return {**asdict(self), "max_input": self.max_input, "max_output": self.max_output}


def evaluate_privacy(
    pretrained: Pretrained,
    start_block: int,
    end_block: int,
    *,
    uplink: CutCodec | None = None,
    downlink: CutCodec | None = None,
    source: str = "builtin:instruct",
    texts: int = 24,
    seed: int = 0,
    stage: ProgressContext = nullcontext,
) -> PrivacyResult:
    """Attack ``texts`` sessions of a cut model, as an honest-but-curious cloud with the public model can.

    Args:
        pretrained: a decoder with its tokenizer.
        start_block: the first block in the cloud.
        end_block: the block after the cloud's last.
        uplink: codec of the uplink; float32 if None.
        downlink: codec of the downlink; float32 if None.
        source: data set whose train split is the attacker's public text and whose test split is attacked.
        texts: number of sessions.
        seed: seed of the victims, the public texts and the attacks' training.
        stage: called with the name of each stage, see :data:`ProgressContext`.

    Raises:
        ModelError: the cut does not fit the model.
        DataError: the data cannot be loaded or has too few texts.
    """
    cut, tokenizer = SplitDecoder(pretrained.model, start_block, end_block, uplink, downlink), pretrained.tokenizer
    attacked = victims(load_rows(source, "test"), tokenizer, texts, seed)
    known = load_rows(source, "train")
    known = random.Random(seed).sample(known, min(PUBLIC_TEXTS, len(known)))
    form = default_format(known, tokenizer)
    samples = encode(known, tokenizer, form, max_length=_MAX_LENGTH, max_prompt_length=_MAX_PROMPT)
    if len(samples) < 2:
        raise DataError(f"data set '{source}' leaves the attacks fewer than 2 texts to prepare with")
    with stage(f"{texts} sessions recorded"):
        ends = end_ids(tokenizer, pretrained.model.config, pretrained.model.generation_config)
        traces = record_sessions(cut, [victim.ids for victim in attacked], MAX_ANSWER, ends)
    with stage(f"{len(samples)} public texts run"):
        public = PublicTexts.of(cut, samples, tokenizer.pad_token_id)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    return PrivacyResult(start_block, end_block, *_attacks(cut, public, traces, attacked, decode, seed, stage))


def _attacks(
    cut: SplitDecoder,
    public: PublicTexts,
    traces: list[SessionTrace],
    attacked: list[Victim],
    decode: Decode,
    seed: int,
    stage: ProgressContext,
) -> tuple[dict[str, Recovery], dict[str, Recovery]]:
    inputs: dict[str, Recovery] = {}
    outputs: dict[str, Recovery] = {}
    secrets = [victim.secrets for victim in attacked]

    def said(name: str, prepare: Callable[[], Attack]) -> None:
        """Run an attack on the downlink hidden states, which guesses the next tokens."""
        with stage(name):
            start = time.perf_counter()
            attack = prepare()
            guesses = [attack.guess(trace.downlink[trace.prompt - 1 :], 5) for trace in traces]
            seconds = time.perf_counter() - start
        outputs[name] = recovery(guesses, [trace.said for trace in traces], decode, seconds)

    def sent(name: str, prepare: Callable[[], AnAttack]) -> AnAttack:
        """Run an attack on the uplink hidden states: the prompt, then each token of the answer except the last."""
        with stage(name):
            start = time.perf_counter()
            attack = prepare()
            guesses = [attack.guess(trace.uplink, 5) for trace in traces]
            seconds = time.perf_counter() - start
        own = [slice(victim.private.start, victim.private.stop) for victim in attacked]
        asked = [guess[part] for guess, part in zip(guesses, own, strict=True)]
        truths = [trace.ids[part] for trace, part in zip(traces, own, strict=True)]
        inputs[name] = recovery(asked, truths, decode, seconds, secrets)
        answers = [guess[trace.prompt :] for guess, trace in zip(guesses, traces, strict=True)]
        outputs[name] = recovery(answers, [trace.ids[trace.prompt :] for trace in traces], decode, seconds)
        return attack

    said("a1_plain_lens", lambda: Lens.plain(cut.last))
    said("a1_tuned_lens", lambda: Lens.tuned(cut.last, public.downlink, public.final))
    vocabulary = TokenDirections.of(cut.edge, cut.vocab_size)
    sent("a0_embedding", lambda: EmbeddingMatch(vocabulary))
    linear = sent("a2_ridge", lambda: RidgeInverter.fit(public.uplink, public.ids, vocabulary))
    deep = sent("a3_mlp", lambda: MlpInverter.fit(public.uplink, public.ids, linear, seed=seed))
    sent("a5_matching", lambda: Matching.fit(cut, deep.guess, linear.affine.scale, public.texts(_CALIBRATION)))
    return inputs, outputs
