"""What becomes of centred rows before they are coded: some coordinates dropped, all rotated, or the main ones kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A linear map to the numbers that are coded, and the way back. Coordinates that are sent apart are zero here."""

    @property
    def size(self) -> int:
        """Numbers that are coded."""
        ...

    def forward(self, rows: Tensor) -> Tensor:
        """(n, width) to (n, size)."""
        ...

    def back(self, numbers: Tensor) -> Tensor:
        """(n, size) to (n, width)."""
        ...


@dataclass(frozen=True, eq=False)
class Keep:
    """The coordinates of a row that are not sent apart.

    Args:
        width: numbers of a row.
        kept: which of them are coded, ascending.
    """

    width: int
    kept: Tensor

    @property
    def size(self) -> int:
        """Numbers that are coded."""
        return len(self.kept)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, width) to (n, size)."""
        return rows[:, self.kept]

    def back(self, numbers: Tensor) -> Tensor:
        """(n, size) to (n, width), zeros elsewhere."""
        return numbers.new_zeros(len(numbers), self.width).index_copy_(1, self.kept, numbers)


@dataclass(frozen=True, eq=False)
class Rotate:
    """A rotation that spreads every coordinate over all of them.

    It is the Kronecker product of two orthogonal matrices of about √width each, which mixes as well as a full matrix
    and costs about 2/√width of its time and almost none of its memory, at any width that is not prime.

    Args:
        left: (p, p) orthogonal.
        right: (q, q) orthogonal; rows have p · q numbers.

    Raises:
        ValueError: they are no square matrices.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            if side.dtype != torch.float32 or side.ndim != 2 or side.shape[0] != side.shape[1] or not side.numel():
                raise ValueError("the factors of a rotation must be square float32 matrices")

    @property
    def size(self) -> int:
        """Numbers that are coded: the row's width."""
        return len(self.left) * len(self.right)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, width) to (n, width)."""
        return (self.left @ self._as_matrices(rows) @ self.right).flatten(1)

    def back(self, numbers: Tensor) -> Tensor:
        """(n, width) to (n, width)."""
        return (self.left.T @ self._as_matrices(numbers) @ self.right.T).flatten(1)

    def _as_matrices(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, (len(self.left), len(self.right)))


@dataclass(frozen=True, eq=False)
class Project:
    """The coefficients of a row in an orthonormal basis.

    Args:
        basis: (width, rank) with orthonormal columns.
    """

    basis: Tensor

    @property
    def size(self) -> int:
        """Numbers that are coded: the rank."""
        return self.basis.shape[1]

    def forward(self, rows: Tensor) -> Tensor:
        """(n, width) to (n, rank)."""
        return rows @ self.basis

    def back(self, numbers: Tensor) -> Tensor:
        """(n, rank) to (n, width)."""
        return numbers @ self.basis.T


def keep_all_but(coordinates: Tensor, width: int) -> Keep:
    """The transform that only leaves out ``coordinates``."""
    ordinary = torch.ones(width, dtype=torch.bool)
    ordinary[coordinates] = False
    return Keep(width, ordinary.nonzero()[:, 0])
