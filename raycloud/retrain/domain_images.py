"""Images of several domains as samples of a model: shifts of ``builtin:digits``, or a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from raycloud.data.digits import digits
from raycloud.data.image_shifts import DIGITS_SHIFTS, SIMULATED_SHIFTS, ImageShift
from raycloud.data.images import image_rows, read_images
from raycloud.errors import DataError
from raycloud.retrain.domain_data import DataPart, part_of
from raycloud.retrain.samples import Samples
from raycloud.training.seeding import derive_seed

DIGITS, DIGITS_SOURCE = "builtin:digits", "source"
_PARTS: dict[DataPart, tuple[int, int]] = {
    "source": (0, 697),
    "clean": (697, 897),
    "window": (897, 1297),
    "test": (1297, 1797),
}
_SHIFTS: dict[str, ImageShift] = {
    DIGITS_SOURCE: lambda images, classes, generator: (images, classes),
    **DIGITS_SHIFTS,
    **{f"{kind}/{name}": shift for kind, shifts in SIMULATED_SHIFTS.items() for name, shift in shifts.items()},
}


class DigitsDomains:
    """Handwritten digits and their shifts; the same images never appear in two parts.

    Args:
        config: configuration of the model.
        seed: seed of the division of the images and of random shifts.
    """

    classes = list(range(10))

    def __init__(self, config: PretrainedConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._images, self._classes = digits()
        self._order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(seed))

    def samples(self, domain: str, part: DataPart) -> Samples:
        """Samples of a part of a domain; see :class:`~raycloud.retrain.domain_data.DomainData`."""
        if domain not in _SHIFTS:
            raise DataError(f"no domain '{domain}' in {DIGITS}; there are: {', '.join(_SHIFTS)}")
        rows = self._order[slice(*_PARTS[part])]
        generator = torch.Generator().manual_seed(derive_seed("shift", domain, part, self._seed))
        images, classes = _SHIFTS[domain](self._images[rows], self._classes[rows], generator)
        return Samples({"pixel_values": _fitted(images[:, None], self._config)}, classes)


class FolderDomains:
    """Images of a folder.

    Args:
        folder: folder ``DOMAIN/CLASS/NAME``.
        config: configuration of the model.
        classes: classes in the order of the model's outputs.
        source: domain whose images have trained the source model in part; None if it was trained on others.
    """

    def __init__(self, folder: Path, config: PretrainedConfig, classes: list[Any], source: str | None) -> None:
        self._folder, self._config, self._classes = folder, config, classes
        self._rows: dict[tuple[str, DataPart], list[dict[str, Any]]] = {}
        for row in image_rows(folder):
            self._rows.setdefault((row["domain"], part_of(row, row["domain"] == source)), []).append(row)

    def samples(self, domain: str, part: DataPart) -> Samples:
        """Samples of a part of a domain; see :class:`~raycloud.retrain.domain_data.DomainData`."""
        rows = self._rows.get((domain, part))
        if not rows:
            known = ", ".join(sorted({one for one, _ in self._rows}))
            raise DataError(f"domain '{domain}' has no images in its part '{part}'; domains: {known}")
        odd = sorted({row["label"] for row in rows} - set(self._classes))
        if odd:
            allowed = ", ".join(map(str, self._classes))
            raise DataError(f"domain '{domain}' has the class '{odd[0]}'; allowed: {allowed}")
        size, channels = _shape(self._config)
        images = read_images([self._folder / row["text"] for row in rows], size, channels)
        labels = torch.tensor([self._classes.index(row["label"]) for row in rows])
        return Samples({"pixel_values": _fitted(images, self._config)}, labels)


def _shape(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width, and channels of a model's images."""
    size = config.image_size
    return int(size if isinstance(size, int) else size[0]), int(config.num_channels)


def _fitted(images: Tensor, config: PretrainedConfig) -> Tensor:
    """Images (n, c, h, w) of values from 0 to 1, in the size of a model, from −1 to 1."""
    size, channels = _shape(config)
    if images.shape[-1] != size:
        images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return ((images - 0.5) / 0.5).expand(-1, channels, -1, -1).contiguous()
