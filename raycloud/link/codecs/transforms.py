"""Linear transforms of centred hidden states before coding: selected coordinates, or a rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """Linear map to the numbers that are coded, and its inverse. Outlier coordinates are zero in its input."""

    @property
    def size(self) -> int:
        """Number of values coded per hidden state."""
        ...

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (n, width) to (n, size)."""
        ...

    def back(self, numbers: Tensor) -> Tensor:
        """Map (n, size) back to (n, width)."""
        ...


@dataclass(frozen=True, eq=False)
class SelectCoordinates:
    """Selection of the coordinates that are not outliers.

    Args:
        width: width of a hidden state.
        kept: indices of the coordinates that are coded, ascending.
    """

    width: int
    kept: Tensor

    @property
    def size(self) -> int:
        """Number of values coded per hidden state."""
        return len(self.kept)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (n, width) to (n, size)."""
        return hidden[:, self.kept]

    def back(self, numbers: Tensor) -> Tensor:
        """Map (n, size) back to (n, width), with zeros elsewhere."""
        return numbers.new_zeros(len(numbers), self.width).index_copy_(1, self.kept, numbers)


@dataclass(frozen=True, eq=False)
class Rotate:
    """Rotation that spreads every coordinate over all of them.

    The Kronecker product of two orthogonal matrices of about √width each mixes as well as a full matrix and costs about
    2/√width of its time and almost none of its memory, at any width that is not prime.

    Args:
        left: (p, p) orthogonal matrix.
        right: (q, q) orthogonal matrix; the width is p · q.

    Raises:
        ValueError: the factors are not square float32 matrices.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            if side.dtype != torch.float32 or side.ndim != 2 or side.shape[0] != side.shape[1] or not side.numel():
                raise ValueError("the factors of a rotation must be square float32 matrices")

    @property
    def size(self) -> int:
        """Number of values coded per hidden state: its width."""
        return len(self.left) * len(self.right)

    def forward(self, hidden: Tensor) -> Tensor:
        """Rotate hidden states (n, width)."""
        return (self.left @ self._as_matrices(hidden) @ self.right).flatten(1)

    def back(self, numbers: Tensor) -> Tensor:
        """Invert the rotation of (n, width)."""
        return (self.left.T @ self._as_matrices(numbers) @ self.right.T).flatten(1)

    def _as_matrices(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(1, (len(self.left), len(self.right)))


def without_coordinates(coordinates: Tensor, width: int) -> SelectCoordinates:
    """Transform that only leaves out ``coordinates``."""
    ordinary = torch.ones(width, dtype=torch.bool)
    ordinary[coordinates] = False
    return SelectCoordinates(width, ordinary.nonzero()[:, 0])


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrix (size, size) in float32."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn)[0].float()
