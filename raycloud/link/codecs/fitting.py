"""The codecs of one cut, fitted to rows of a real model.

Both ends build their codecs from the same :class:`Fitted`: nothing is drawn or computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from raycloud.link.codecs.codec import Codec
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.quantised import Int4, Int8, extremes, grouped
from raycloud.link.codecs.relative import Baseline, Relative
from raycloud.link.codecs.transforms import Project, Rotate, keep_all_but

FittedName = Literal["int8", "int4", "low-rank", "low-rank-int8"]
FITTED: tuple[FittedName, ...] = get_args(FittedName)
"""The codecs that need a calibration."""

OUTLIERS = (0, 2, 4, 8, 16)
"""How many coordinates may be sent apart."""
GROUPS = (32, 64)
"""How many neighbours may share a scale in int4."""
LEVELS = 16
_COEFFICIENT_GROUP = 32
_SAMPLES = 2**18
_ROUNDS = 100

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Choices(BaseModel):
    """What calibration chose for one cut, and how well it did.

    ``unit`` is the root mean square of the centred rows, ``first`` the number of positions at the beginning of a text
    that are sent as bfloat16. ``int8_outliers`` are also those of the low-rank codecs. ``errors`` are those of
    :func:`relative_error` on rows that nothing was fitted to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    first: Annotated[int, Field(ge=0)]
    int8_outliers: Annotated[int, Field(ge=0)]
    int4_outliers: Annotated[int, Field(ge=0)]
    int4_group: Annotated[int, Field(ge=1)]
    errors: dict[FittedName, Finite]


@dataclass(frozen=True, eq=False)
class Fitted:
    """The choices and the tensors of one cut.

    Args:
        choices: what calibration chose.
        mean: (d,) of the rows.
        outliers: coordinates in order of their largest magnitude, at least as many as are sent apart.
        levels: (16,) of int4, ascending.
        basis: (d, rank) orthonormal, main direction first.

    Raises:
        ValueError: these do not fit each other.
    """

    choices: Choices
    mean: Tensor
    outliers: Tensor
    levels: Tensor
    basis: Tensor

    def __post_init__(self) -> None:
        chosen, width = self.choices, len(self.mean)
        floats = (self.mean, self.levels, self.basis)
        if not (
            all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in floats)
            and (self.mean.ndim, self.levels.shape, self.basis.ndim) == (1, (LEVELS,), 2)
            and 1 <= self.basis.shape[1] <= self.basis.shape[0] == width
            and self.outliers.dtype == torch.int64
            and max(chosen.int8_outliers, chosen.int4_outliers) <= len(self.outliers) < width
            and set(self.outliers.tolist()) <= set(range(width))
        ):
            raise ValueError("the tensors of a cut do not fit each other")

    def codec(self, name: FittedName, rotation: Rotate) -> Codec:
        """One codec of this cut; ``rotation`` is the calibration's, shared by its cuts."""
        chosen = self.choices
        if name == "int4":
            return _int4(self._baseline(chosen.int4_outliers), rotation, chosen.int4_group, self.levels)
        baseline = self._baseline(chosen.int8_outliers)
        return _int8(baseline) if name == "int8" else _low_rank(baseline, self.basis, name)

    def _baseline(self, outliers: int) -> Baseline:
        return Baseline(self.mean, self.choices.unit, self.outliers[:outliers])


def fit(rows: Tensor, first: int, rotation: Rotate, rank: int) -> Fitted:
    """Fit one cut to its rows.

    Outliers and groups are those of the least error times 2 to the bits per number: at best one more bit halves the
    error, so what costs bytes has to do as well. Every eighth row is kept aside to judge that.

    Args:
        rows: (n, d) float32, positions from ``first`` on.
        first: see :class:`Choices`.
        rotation: of rows of this width.
        rank: of the low-rank codecs, at most d.
    """
    aside = torch.arange(len(rows)) % 8 == 0
    unseen, rows = rows[aside], rows[~aside]
    mean = rows.mean(dim=0)
    centred = rows - mean
    # Rows that never change would make it zero; any other unit does for them.
    unit = float(centred.square().mean().sqrt()) or 1.0
    counts = [count for count in OUTLIERS if count <= len(mean) // 2]
    order = centred.abs().amax(dim=0).argsort(descending=True, stable=True)[: counts[-1]]

    def price(codec: Codec) -> float:
        return relative_error(codec, unseen) * 2 ** (8 * codec.bytes_per_row(len(mean)) / len(mean))

    def baseline(outliers: int) -> Baseline:
        return Baseline(mean, unit, order[:outliers])

    int8_outliers = min(counts, key=lambda count: price(_int8(baseline(count))))
    rotated = rotation.forward((centred / unit).index_fill(1, order, 0.0))
    levels = {group: fit_levels(grouped(rotated, group)) for group in GROUPS}
    int4_outliers, int4_group = min(
        product(counts, GROUPS), key=lambda it: price(_int4(baseline(it[0]), rotation, it[1], levels[it[1]]))
    )
    basis = principal_directions(centred.index_fill(1, order[:int8_outliers], 0.0), rank)
    chosen = Choices(
        unit=unit,
        first=first,
        int8_outliers=int8_outliers,
        int4_outliers=int4_outliers,
        int4_group=int4_group,
        errors={},
    )
    fitted = Fitted(chosen, mean, order, levels[int4_group], basis)
    errors = {name: relative_error(fitted.codec(name, rotation), unseen) for name in FITTED}
    return Fitted(chosen.model_copy(update={"errors": errors}), mean, order, levels[int4_group], basis)


def relative_error(codec: Codec, rows: Tensor) -> float:
    """Root mean square over rows of ‖decoded - row‖ / ‖row‖: the next norm makes all rows equally long."""
    lost = (codec.decode(codec.encode(rows)) - rows).norm(dim=1)
    return float((lost / rows.norm(dim=1).clamp_min(1e-30)).square().mean().sqrt())


def rotation_of(width: int, seed: int = 0) -> Rotate:
    """A random rotation of rows of this width, as near to square factors as the width allows."""
    left = next(p for p in range(int(width**0.5), 0, -1) if width % p == 0)
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(size: int) -> Tensor:
        drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
        # In row-major order, as a file gives it back: products round differently in another.
        return torch.linalg.qr(drawn)[0].float().contiguous()

    return Rotate(orthogonal(left), orthogonal(width // left))


def principal_directions(centred: Tensor, rank: int) -> Tensor:
    """The orthonormal basis (d, rank) in which centred rows (n, d) lose the least."""
    rows = centred.double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :rank].float().contiguous()


def fit_levels(groups: Tensor) -> Tensor:
    """The 16 levels (in units of a group's extreme number) that lose the least squared error on (n, groups, group).

    Lloyd's algorithm; groups count by the square of their scale, as their errors do.
    """
    groups = groups[:: max(1, groups.numel() // _SAMPLES)]
    scales = extremes(groups).expand_as(groups).flatten()
    numbers, order = (groups.flatten() / torch.where(scales == 0, 1.0, scales)).double().sort()
    weights = scales.double().square()[order]
    # Sums over any cell are differences of two running sums, so that a round costs next to nothing.
    mass, moment = (pad(sums.cumsum(dim=0), (1, 0)) for sums in (weights, weights * numbers))
    levels = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
    for _ in range(_ROUNDS):
        borders = pad(torch.searchsorted(numbers, (levels[1:] + levels[:-1]) / 2), (1, 0))
        borders = pad(borders, (0, 1), value=len(numbers))
        held = mass[borders].diff()
        levels = torch.where(held > 0, moment[borders].diff() / held, levels)
    return levels.float()


def _int8(baseline: Baseline) -> Codec:
    kept = keep_all_but(baseline.outliers, len(baseline.mean))
    return Relative("int8", baseline, kept, Int8(kept.size, kept.size))


def _int4(baseline: Baseline, rotation: Rotate, group: int, levels: Tensor) -> Codec:
    return Relative("int4", baseline, rotation, Int4(rotation.size, group, levels))


def _low_rank(baseline: Baseline, basis: Tensor, name: FittedName) -> Codec:
    rank = basis.shape[1]
    inner = Int8(rank, _COEFFICIENT_GROUP) if name == "low-rank-int8" else CODECS["float16"]
    return Relative(name, baseline, Project(basis), inner)
