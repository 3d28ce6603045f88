"""The objectives, one file each. Importing this package registers them."""

from __future__ import annotations

from collections.abc import Callable

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import OBJECTIVES, build_objective
from raycloud.distill.objective_options import OPTIONS, DivergenceOptions
from raycloud.distill.objectives import (  # noqa: F401 (registers them)
    adaptive_kl,
    dskd,
    dskd_cma,
    forward_kl,
    js_divergence,
    mcw_kd,
    mined,
    multi_level_ot,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    uld,
)
from raycloud.distill.objectives.cross_entropy import CrossEntropy

DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    name: OBJECTIVES[name]  # type: ignore[misc]
    for name, options in OPTIONS.items()
    if issubclass(options, DivergenceOptions)
}
"""The registered divergences."""

__all__ = ["DIVERGENCES", "OBJECTIVES", "CrossEntropy", "build_objective"]
