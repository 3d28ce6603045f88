"""The divergences, as a recipe names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from raycloud.distill.divergence import Divergence
from raycloud.distill.objectives.adaptive_kl import AdaptiveKL
from raycloud.distill.objectives.forward_kl import ForwardKL
from raycloud.distill.objectives.js_divergence import JSDivergence
from raycloud.distill.objectives.reverse_kl import ReverseKL
from raycloud.distill.objectives.skewed_forward_kl import SkewedForwardKL
from raycloud.distill.objectives.skewed_reverse_kl import SkewedReverseKL

_ALL = (ForwardKL, ReverseKL, JSDivergence, SkewedForwardKL, SkewedReverseKL, AdaptiveKL)

AnyDivergence = Annotated[
    ForwardKL | ReverseKL | JSDivergence | SkewedForwardKL | SkewedReverseKL | AdaptiveKL,
    Field(discriminator="name"),
]
"""What a recipe may name as its divergence; the field ``name`` says which."""

DIVERGENCES: dict[str, Callable[..., Divergence]] = {cls.model_fields["name"].default: cls for cls in _ALL}
