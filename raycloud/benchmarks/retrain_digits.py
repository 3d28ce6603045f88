"""Scenario of the benchmark of block retraining: a small ViT on handwritten digits, whose images or classes change.

Of the 1,797 images of ``builtin:digits``, 897 train the source model, 400 are for windows, and 500 are tests. The ViT
has 6 blocks of width 64 and patches of 2 × 2 pixels. Regime A: a window of 100 labelled images and the operations of 40
full steps. Regime B: 300 images and 120 full steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from raycloud.benchmarks.retrain_cases import DomainWindow, Regime
from raycloud.data.digits import digits
from raycloud.data.image_shifts import DIGITS_SHIFTS, SIMULATED_SHIFTS
from raycloud.fetch import cache_dir, cached_folder
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import TASKS

BLOCKS, WIDTH, CLASSES = 6, 64, 10
SOURCE_STEPS, SOURCE_BATCH = 1500, 64
SOURCE, WINDOWS = 897, 400
"""Number of images that train the source model, and that windows are drawn from; the other 500 are for tests."""
_MEAN, _DEVIATION = 0.3, 0.37


class DigitsScenario:
    """Source model and domains of one seed.

    Args:
        seed: seed of the split of the images, of the model and of its training.
        steps: number of steps of the source model's training.
    """

    name = "digits"
    task, settings = TASKS["classification"], RetrainTraining()
    regimes: Mapping[str, Regime] = {"A": Regime(100, 40, 200), "B": Regime(300, 120, 600)}
    domains: Sequence[str] = tuple(DIGITS_SHIFTS)
    simulated: Mapping[str, Sequence[str]] = {
        kind: [f"{kind}/{name}" for name in shifts] for kind, shifts in SIMULATED_SHIFTS.items()
    }

    def __init__(self, seed: int, steps: int = SOURCE_STEPS) -> None:
        self.seed = seed
        images, classes = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        self._source, self._windows, self._test = order.split([SOURCE, WINDOWS, len(images) - SOURCE - WINDOWS])
        self._images, self._classes = images, classes
        folder = cache_dir() / "benchmarks" / f"digits-vit-{seed}-{steps}"
        self._file = cached_folder(folder, lambda scratch: self._train(scratch, steps)) / "model.safetensors"

    def model(self) -> PreTrainedModel:
        """Source model, a new copy."""
        made = _new_model(self.seed)
        made.load_state_dict(load_file(self._file))
        return made.eval()

    def window(self, domain: str, samples: int) -> DomainWindow:
        """Window and test of a domain."""
        kind, _, name = domain.partition("/")
        shift = SIMULATED_SHIFTS[kind][name] if name else DIGITS_SHIFTS[kind]
        generator = torch.Generator().manual_seed(1000 + self.seed)
        window, test = (
            samples_of(*shift(self._images[rows], self._classes[rows], generator))
            for rows in (self._windows[:samples], self._test)
        )
        return DomainWindow(window, test)

    def figure(self, error: float) -> float:
        """Accuracy for a share of errors."""
        return 1 - error

    def _train(self, folder: Path, steps: int) -> None:
        model = _new_model(self.seed).train()
        samples = samples_of(self._images[self._source], self._classes[self._source])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(steps):
            batch = samples.select(torch.randint(len(samples), (SOURCE_BATCH,), generator=generator))
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            functional.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_file(model.state_dict(), folder / "model.safetensors")


def samples_of(images: Tensor, classes: Tensor) -> Samples:
    """Samples of grey images (n, h, w) with values from 0 to 1."""
    return Samples({"pixel_values": ((images - _MEAN) / _DEVIATION)[:, None].contiguous()}, classes)


def _new_model(seed: int) -> PreTrainedModel:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
    )
    config.num_labels = CLASSES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)
