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
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    shape = [len(images), 1, *images.shape[1:]]
    grid = functional.affine_grid(turn.expand(len(images), 2, 3), shape, align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


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
