"""Codecs of one cut, fitted to hidden states of a real model.

Both ends build their codecs from the same :class:`CutFit`; nothing is sampled or computed a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from raycloud.link.codecs.centred import CentredCodec, CutStatistics
from raycloud.link.codecs.codec import Codec
from raycloud.link.codecs.quantised import Int4, Int8, extremes, grouped
from raycloud.link.codecs.transforms import Rotate, random_orthogonal, without_coordinates

FittedName = Literal["int8", "int4"]
FITTED: tuple[FittedName, ...] = get_args(FittedName)
"""Names of the codecs that need a calibration."""

OUTLIERS = (0, 2, 4, 8, 16)
"""Allowed numbers of outlier coordinates sent separately."""
GROUPS = (32, 64)
"""Allowed numbers of neighbouring coordinates that share a scale in int4."""
LEVELS = 16
_SAMPLES = 2**18
_ROUNDS = 100

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FitChoices(BaseModel):
    """Choices of the calibration for one cut, and the errors measured with them.

    ``unit`` is the root mean square of the centred hidden states, ``first`` the number of positions at the beginning of
    a text that are sent as bfloat16. ``errors`` are the values of :func:`relative_error` on held-out hidden states.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    first: Annotated[int, Field(ge=0)]
    int8_outliers: Annotated[int, Field(ge=0)]
    int4_outliers: Annotated[int, Field(ge=0)]
    int4_group: Annotated[int, Field(ge=1)]
    errors: dict[FittedName, Finite]


@dataclass(frozen=True, eq=False)
class CutFit:
    """Choices and tensors of one cut.

    Args:
        choices: choices of the calibration.
        mean: (d,) mean of the hidden states.
        outliers: coordinates in descending order of their largest magnitude, at least as many as are sent separately.
        levels: (16,) levels of int4, ascending.

    Raises:
        ValueError: the tensors do not fit each other.
    """

    choices: FitChoices
    mean: Tensor
    outliers: Tensor
    levels: Tensor

    def __post_init__(self) -> None:
        chosen, width = self.choices, len(self.mean)
        if not (
            all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in (self.mean, self.levels))
            and (self.mean.ndim, self.levels.shape) == (1, (LEVELS,))
            and self.outliers.dtype == torch.int64
            and max(chosen.int8_outliers, chosen.int4_outliers) <= len(self.outliers) < width
            and set(self.outliers.tolist()) <= set(range(width))
        ):
            raise ValueError("the tensors of a cut do not fit each other")

    def codec(self, name: FittedName, rotation: Rotate) -> Codec:
        """Codec of this cut by its name; ``rotation`` is the calibration's, shared by its cuts."""
        chosen = self.choices
        match name:
            case "int8":
                return _int8(self._baseline(chosen.int8_outliers))
            case "int4":
                return _int4(self._baseline(chosen.int4_outliers), rotation, chosen.int4_group, self.levels)
        raise ValueError(f"no fitted codec '{name}'; allowed: {', '.join(FITTED)}")

    def _baseline(self, outliers: int) -> CutStatistics:
        return CutStatistics(self.mean, self.choices.unit, self.outliers[:outliers])


def fit_cut(hidden: Tensor, first: int, rotation: Rotate) -> CutFit:
    """Fit the codecs of one cut to its hidden states.

    Outliers and groups minimise the error times 2 to the power of the bits per number: at best one more bit halves the
    error, so additional bytes must reduce the error as much. Every eighth hidden state is held out to measure it.

    Args:
        hidden: hidden states (n, d) float32, at positions from ``first`` on.
        first: see :class:`FitChoices`.
        rotation: rotation for width d.
    """
    aside = torch.arange(len(hidden)) % 8 == 0
    unseen, hidden = hidden[aside], hidden[~aside]
    mean = hidden.mean(dim=0)
    centred = hidden - mean
    # Constant hidden states would make it zero; for them any other unit works.
    unit = float(centred.square().mean().sqrt()) or 1.0
    counts = [count for count in OUTLIERS if count <= len(mean) // 2]
    order = centred.abs().amax(dim=0).argsort(descending=True, stable=True)[: counts[-1]]

    def price(codec: Codec) -> float:
        return relative_error(codec, unseen) * 2 ** (8 * codec.bytes_per_row(len(mean)) / len(mean))

    def baseline(outliers: int) -> CutStatistics:
        return CutStatistics(mean, unit, order[:outliers])

    int8_outliers = min(counts, key=lambda count: price(_int8(baseline(count))))
    rotated = rotation.forward((centred / unit).index_fill(1, order, 0.0))
    levels = {group: fit_levels(grouped(rotated, group)) for group in GROUPS}
    int4_outliers, int4_group = min(
        product(counts, GROUPS), key=lambda it: price(_int4(baseline(it[0]), rotation, it[1], levels[it[1]]))
    )
    chosen = FitChoices(
        unit=unit,
        first=first,
        int8_outliers=int8_outliers,
        int4_outliers=int4_outliers,
        int4_group=int4_group,
        errors={},
    )
    fitted = CutFit(chosen, mean, order, levels[int4_group])
    errors = {name: relative_error(fitted.codec(name, rotation), unseen) for name in FITTED}
    return CutFit(chosen.model_copy(update={"errors": errors}), mean, order, levels[int4_group])


def relative_error(codec: Codec, hidden: Tensor) -> float:
    """Root mean square over tokens of ‖decoded - h‖ / ‖h‖, since the next norm gives all hidden states one length."""
    lost = (codec.decode(codec.encode(hidden)) - hidden).norm(dim=1)
    return float((lost / hidden.norm(dim=1).clamp_min(1e-30)).square().mean().sqrt())


def random_rotation(width: int, seed: int = 0) -> Rotate:
    """Random rotation for hidden states of this width, with factors as close to square as the width allows."""
    left = next(p for p in range(int(width**0.5), 0, -1) if width % p == 0)
    generator = torch.Generator().manual_seed(seed)
    # In row-major order, as when read from a file: products round differently in another order.
    factors = [random_orthogonal(size, generator).contiguous() for size in (left, width // left)]
    return Rotate(*factors)


def fit_levels(groups: Tensor) -> Tensor:
    """Levels (16,), in units of a group's extreme number, with the least squared error on (n, groups, group).

    Found by Lloyd's algorithm; groups are weighted by the square of their scale, as their squared errors are.
    """
    groups = groups[:: max(1, groups.numel() // _SAMPLES)]
    scales = extremes(groups).expand_as(groups).flatten()
    numbers, order = (groups.flatten() / torch.where(scales == 0, 1.0, scales)).double().sort()
    weights = scales.double().square()[order]
    # Sums over any cell are differences of two running sums, so that an iteration is cheap.
    mass, moment = (pad(sums.cumsum(dim=0), (1, 0)) for sums in (weights, weights * numbers))
    levels = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
    for _ in range(_ROUNDS):
        borders = pad(torch.searchsorted(numbers, (levels[1:] + levels[:-1]) / 2), (1, 0))
        borders = pad(borders, (0, 1), value=len(numbers))
        held = mass[borders].diff()
        levels = torch.where(held > 0, moment[borders].diff() / held, levels)
    return levels.float()


def _int8(baseline: CutStatistics) -> Codec:
    kept = without_coordinates(baseline.outliers, len(baseline.mean))
    return CentredCodec("int8", baseline, kept, Int8(kept.size, kept.size))


def _int4(baseline: CutStatistics, rotation: Rotate, group: int, levels: Tensor) -> Codec:
    return CentredCodec("int4", baseline, rotation, Int4(rotation.size, group, levels))
