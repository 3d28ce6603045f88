"""The objectives, one file each, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from raycloud.distill.objective import Objective
from raycloud.distill.objectives.adaptive_kl import AdaptiveKL
from raycloud.distill.objectives.cross_entropy import CrossEntropy
from raycloud.distill.objectives.dskd import DSKD
from raycloud.distill.objectives.dskd_cma import DSKDCMA
from raycloud.distill.objectives.forward_kl import ForwardKL
from raycloud.distill.objectives.js_divergence import JSDivergence
from raycloud.distill.objectives.mcw_kd import MCWKD
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.objectives.multi_level_ot import MultiLevelOT
from raycloud.distill.objectives.plain import DIVERGENCES, AnyDivergence
from raycloud.distill.objectives.reverse_kl import ReverseKL
from raycloud.distill.objectives.skewed_forward_kl import SkewedForwardKL
from raycloud.distill.objectives.skewed_reverse_kl import SkewedReverseKL
from raycloud.distill.objectives.uld import ULD

AnyObjective = Annotated[
    ForwardKL
    | ReverseKL
    | JSDivergence
    | SkewedForwardKL
    | SkewedReverseKL
    | AdaptiveKL
    | DSKD
    | DSKDCMA
    | ULD
    | MinED
    | MultiLevelOT
    | MCWKD,
    Field(discriminator="name"),
]
"""What a recipe may name; the field ``name`` says which."""

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    **DIVERGENCES,
    **{cls.model_fields["name"].default: cls for cls in (DSKD, DSKDCMA, ULD, MinED, MultiLevelOT, MCWKD)},
}

__all__ = ["DIVERGENCES", "OBJECTIVES", "AnyDivergence", "AnyObjective", "CrossEntropy"]
