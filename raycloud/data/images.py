"""Images of a folder: a folder of images for each class, in a folder for each domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from raycloud.data.splits import Row
from raycloud.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def image_rows(folder: Path) -> list[Row]:
    """Rows of the images ``folder/DOMAIN/CLASS/NAME``, sorted: domain, label and path.

    Raises:
        DataError: the folder has no such images.
    """
    rows = [
        {"domain": path.parent.parent.name, "label": path.parent.name, "text": str(path.relative_to(folder))}
        for path in sorted(folder.glob("*/*/*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not rows:
        raise DataError(
            f"'{folder}' has no images; allowed: {folder}/DOMAIN/CLASS/NAME with NAME in {', '.join(IMAGE_SUFFIXES)}"
        )
    return rows


def read_images(paths: Sequence[Path], size: int, channels: int) -> Tensor:
    """Images (n, channels, size, size) with values from 0 to 1, resized.

    Args:
        paths: files of images.
        size: height and width.
        channels: 1 for grey, 3 for red, green and blue.

    Raises:
        DataError: a file is no image.
    """
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB").resize((size, size)))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image '{path}': {str(error).splitlines()[0]}") from None
        found.append(torch.tensor(pixels).reshape(size, size, channels).permute(2, 0, 1))
    return torch.stack(found).float() / 255
