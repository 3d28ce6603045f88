"""Shifts of image domains: functions from images and classes of the source to those of another domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

ImageShift = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Shift of grey images (n, h, w) with values from 0 to 1, and of classes (n,)."""


def blurred(images: Tensor, deviation: float = 1.0) -> Tensor:
    """Images after a Gaussian filter of five by five pixels."""
    weights = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * deviation**2))
    kernel = weights.outer(weights) / weights.sum().square()
    return functional.conv2d(functional.pad(images[:, None], (2, 2, 2, 2)), kernel[None, None])[:, 0]


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images turned about their centre."""
    angle = math.radians(degrees)
    return _warped(
        images, torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    )


def permuted(images: Tensor, seed: int = 5) -> Tensor:
    """Images with their pixels in one other order."""
    pixels = images.flatten(1)
    order = torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(seed))
    return pixels[:, order].view_as(images)


def occluded(images: Tensor) -> Tensor:
    """Images without the middle quarter."""
    height, width = images.shape[1:]
    hidden = images.clone()
    hidden[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    return hidden


def moved(images: Tensor, pixels: int = 2) -> Tensor:
    """Images moved to the right; what leaves is lost."""
    return functional.pad(images, (pixels, 0))[..., : images.shape[-1]]


DIGITS_SHIFTS: Mapping[str, ImageShift] = {
    "invert": lambda images, classes, generator: (1 - images, classes),
    "noise": lambda images, classes, generator: (
        images + 0.35 * torch.randn(images.shape, generator=generator),
        classes,
    ),
    "contrast": lambda images, classes, generator: (0.35 + 0.3 * images, classes),
    "blur": lambda images, classes, generator: (blurred(images), classes),
    "shift": lambda images, classes, generator: (moved(images), classes),
    "rot45": lambda images, classes, generator: (rotated(images, 45), classes),
    "rot90": lambda images, classes, generator: (images.rot90(1, (1, 2)), classes),
    "flip": lambda images, classes, generator: (images.flip(-1), classes),
    "permute": lambda images, classes, generator: (permuted(images), classes),
    "occlude": lambda images, classes, generator: (occluded(images), classes),
    "relabel": lambda images, classes, generator: (images, (classes + 3) % 10),
}
"""Domains of the benchmark of block retraining on ``builtin:digits``."""


def zoomed(images: Tensor, factor: float) -> Tensor:
    """Images enlarged about their centre, or made smaller with a factor below 1."""
    scale = torch.tensor([[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]])
    return _warped(images, scale)


def sheared(images: Tensor, amount: float) -> Tensor:
    """Images whose rows are moved in proportion to their height."""
    return _warped(images, torch.tensor([[1.0, amount, 0.0], [0.0, 1.0, 0.0]]))


def _warped(images: Tensor, matrix: Tensor) -> Tensor:
    shape = [len(images), 1, *images.shape[1:]]
    grid = functional.affine_grid(matrix.expand(len(images), 2, 3), shape, align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _salted(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(images.shape, generator=generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, images))


def _renamed(classes: Tensor, count: int, seed: int) -> Tensor:
    """Classes of which some have changed their names among each other."""
    names = torch.arange(10)
    some = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:count]
    names[some] = some.roll(1)
    return names[classes]


SIMULATED_SHIFTS: Mapping[str, Mapping[str, ImageShift]] = {
    "zoom": {
        "small": lambda images, classes, generator: (zoomed(images, 0.6), classes),
        "large": lambda images, classes, generator: (zoomed(images, 1.6), classes),
    },
    "shear": {
        "left": lambda images, classes, generator: (sheared(images, -0.7), classes),
        "right": lambda images, classes, generator: (sheared(images, 0.7), classes),
    },
    "tone": {
        "dark": lambda images, classes, generator: (images.clamp(0, 1) ** 3, classes),
        "light": lambda images, classes, generator: (images.clamp(0, 1) ** 0.3, classes),
        "sawtooth": lambda images, classes, generator: ((1 - (2 * images - 1).abs()), classes),
    },
    "salt": {
        "some": lambda images, classes, generator: (_salted(images, 0.2, generator), classes),
        "much": lambda images, classes, generator: (_salted(images, 0.4, generator), classes),
    },
    "mirror": {
        "down": lambda images, classes, generator: (images.flip(1), classes),
        "turned": lambda images, classes, generator: (images.transpose(1, 2), classes),
    },
    "quarters": {
        "rolled": lambda images, classes, generator: (images.roll((4, 4), (1, 2)), classes),
        "columns": lambda images, classes, generator: (images[..., [1, 0, 3, 2, 5, 4, 7, 6]], classes),
    },
    "stripes": {
        "rows": lambda images, classes, generator: (images * (torch.arange(8) % 3 > 0)[:, None], classes),
        "columns": lambda images, classes, generator: (images * (torch.arange(8) % 3 > 0), classes),
    },
    "names": {
        "few": lambda images, classes, generator: (images, _renamed(classes, 4, 1)),
        "all": lambda images, classes, generator: (images, _renamed(classes, 10, 2)),
    },
    "names_and_tone": {
        "few": lambda images, classes, generator: (images.clamp(0, 1) ** 2, _renamed(classes, 6, 3)),
    },
}
"""Shifts by kind that a cloud simulates with source samples to learn what retraining gives. None of them is among
:data:`DIGITS_SHIFTS`."""
