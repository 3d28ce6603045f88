"""Scenario of the benchmark of block retraining: a small language model of bytes, whose texts change.

The source is CPython's own documentation, ``pydoc_data.topics``. Domains are files that every installation has: code of
the standard library, licences of installed packages, C++ headers of torch; and the source in rot13, in capitals, and
without spaces. Texts are divided by pieces of 2 KB. The model is a Llama of 6 blocks of width 64 over 128 ASCII
characters, with windows of 96. A window has 16 KB of text and the operations of 20 full steps.
"""

from __future__ import annotations

import codecs
import importlib.metadata
import math
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raycloud.benchmarks.retrain_cases import DomainWindow, Regime
from raycloud.fetch import cache_dir, cached_folder
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import IGNORE, Samples
from raycloud.retrain.tasks import TASKS

LENGTH, CHARACTERS, PIECE = 96, 128, 2048
SOURCE_STEPS, SOURCE_BATCH = 700, 32
WINDOW, TEST = 16 * 1024, 48 * 1024
"""Number of characters of a window, and at most of a test."""
NATURAL = ("code", "licence", "header")


def _stdlib() -> str:
    return _read(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))


def _licences() -> str:
    found = {
        str(file.locate())
        for distribution in importlib.metadata.distributions()
        for file in distribution.files or ()
        if "licen" in file.name.lower() and file.suffix in ("", ".txt", ".md")
    }
    return _read(map(Path, sorted(found)))


def _headers() -> str:
    return _read(sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h")))


def _read(files: Iterable[Path]) -> str:
    """Texts of files, up to what a window and a test need, each once."""
    texts, total = dict[str, None](), 0
    for file in files:
        if file.is_file() and (text := file.read_text(errors="ignore")) not in texts:
            texts[text], total = None, total + len(text)
        if total > 4 * (WINDOW + TEST):
            break
    return "\n".join(texts)


def _source() -> str:
    return "\n".join(pydoc_data.topics.topics.values())


DOMAINS: Mapping[str, Callable[[], str]] = {
    "code": _stdlib,
    "licence": _licences,
    "header": _headers,
    "rot13": lambda: codecs.encode(_source(), "rot13"),
    "upper": lambda: _source().upper(),
    "no spaces": lambda: _source().replace(" ", ""),
}
"""Texts of the domains."""


SIMULATED: Mapping[str, Callable[[str], str]] = {
    "reversed": lambda text: " ".join(word[::-1] for word in text.split(" ")),
    "no vowels": lambda text: text.translate(dict.fromkeys(map(ord, "aeiouAEIOU"))),
    "doubled": lambda text: "".join(character * 2 for character in text),
    "vowels moved": lambda text: text.translate(str.maketrans("aeiou", "eioua")),
    "letters": lambda text: "".join(character for character in text if character.isalpha() or character == " "),
    "commas": lambda text: text.replace(" ", ","),
}
"""Changes of the source that a cloud simulates; none of them is a domain."""


class TextScenario:
    """Source model and domains of one seed.

    Args:
        seed: seed of the division of texts, of the model and of its training.
        steps: number of steps of the source model's training.
    """

    name = "text"
    task, settings = TASKS["language_modelling"], RetrainTraining(batch_size=16)
    regimes: Mapping[str, Regime] = {"C": Regime(WINDOW // LENGTH, 20, 200)}
    domains: Sequence[str] = tuple(DOMAINS)
    simulated: Mapping[str, Sequence[str]] = {kind: [kind] for kind in SIMULATED}

    def __init__(self, seed: int, steps: int = SOURCE_STEPS) -> None:
        self.seed = seed
        folder = cache_dir() / "benchmarks" / f"text-llama-{seed}-{steps}"
        self._file = cached_folder(folder, lambda scratch: self._train(scratch, steps)) / "model.safetensors"

    def model(self) -> PreTrainedModel:
        """Source model, a new copy."""
        made = _new_model(self.seed)
        made.load_state_dict(load_file(self._file))
        return made.eval()

    def window(self, domain: str, samples: int) -> DomainWindow:
        """Window and test of a domain."""
        made = domain not in NATURAL
        pieces = _pieces(SIMULATED[domain](_source()) if domain in SIMULATED else DOMAINS[domain](), self.seed)
        if made:  # the source model has read the first half as it was
            pieces = pieces[len(pieces) // 2 :]
        train = _samples("".join(pieces[: -(-samples * LENGTH // PIECE)]))
        test = _samples("".join(pieces[-(-samples * LENGTH // PIECE) :])[:TEST])
        return DomainWindow(train.select(slice(0, samples)), test)

    def figure(self, error: float) -> float:
        """Bits per byte for nats per byte."""
        return error / math.log(2)

    def _train(self, folder: Path, steps: int) -> None:
        model = _new_model(self.seed).train()
        pieces = _pieces(_source(), self.seed)
        samples = _samples("".join(pieces[: len(pieces) // 2]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(steps):
            batch = samples.select(torch.randint(len(samples), (SOURCE_BATCH,), generator=generator))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = self.task.loss(model(**batch.inputs, use_cache=False).logits, batch.labels)
            (loss.sum / loss.count).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_file(model.state_dict(), folder / "model.safetensors")


def _pieces(text: str, seed: int) -> list[str]:
    """Pieces of a text in a random order."""
    text = text.encode("ascii", errors="ignore").decode()
    pieces = [text[at : at + PIECE] for at in range(0, len(text) - PIECE + 1, PIECE)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pieces[index] for index in order]


def _samples(text: str) -> Samples:
    """Windows of a text, with the next characters as labels."""
    ids: Tensor = torch.tensor(list(text.encode("ascii")))
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), IGNORE)], dim=1)
    return Samples({"input_ids": ids}, labels)


def _new_model(seed: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
