"""Options of the objectives, as a recipe names them. The code that computes them is in
:mod:`raycloud.distill.objectives`.

They are kept apart so that a recipe can be read, checked and described without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field

from raycloud.distill.signal_recipe import SignalKind
from raycloud.recipe import Recipe, Registered

Compat = Literal["ours", "published"]
"""``published`` reproduces the published program; ``ours`` departs from it where the docstring of the field ``compat``
or of the objective's class says so."""
CostWeights = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Needs of an objective. Recipe checks, edges and diagnostics read this record and know no objective by name.

    The teacher's head is not listed: it goes with every ``hidden`` signal.
    """

    signals: tuple[SignalKind, ...] = get_args(SignalKind)
    """Signal kinds that hold enough for it."""
    tokenizers: Literal["one", "two", "any"] = "any"
    """``one``: student and teacher must share a tokenizer; ``two``: they must not; ``any``: both work."""
    vocabulary_map: bool = False
    """Use of the map between the vocabularies with two tokenizers: ids outside the map are not taught."""
    teacher_embedding: bool = False
    """Use of the teacher's input embedding (W, D)."""
    extras: bool = False
    """Training of a module beside the student, see :meth:`raycloud.distill.objective.Objective.extras`."""


class ObjectiveOptions(Recipe):
    """Options of a loss on response tokens."""

    name: str
    requires: ClassVar[Needs] = Needs()
    """Needs of the objective with its default options."""

    @property
    def needs(self) -> Needs:
        """Needs of the objective with the chosen options."""
        return self.requires


class TeacherObjectiveOptions(ObjectiveOptions):
    """Options of an objective that learns from a teacher."""

    requires: ClassVar[Needs] = Needs(signals=("hidden",))
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both models."""


Options = TypeVar("Options", bound=TeacherObjectiveOptions)
OPTIONS: dict[str, type[TeacherObjectiveOptions]] = {}
"""Registry: the options of every objective that a recipe may name, by that name."""


def register_options(cls: type[Options]) -> type[Options]:
    """Class decorator that makes options known to recipes under the default of their field ``name``."""
    OPTIONS[cls.model_fields["name"].default] = cls
    return cls


class DivergenceOptions(TeacherObjectiveOptions):
    """Options that all divergences have."""

    requires: ClassVar[Needs] = Needs(signals=("hidden", "logits", "topk"), tokenizers="one")
    tau2_scale: bool = False
    """Multiply by temperature², as some programs do to keep the gradient's size. Published numbers here are without
    it."""


@register_options
class ForwardKLOptions(DivergenceOptions):
    """Forward KL."""

    requires: ClassVar[Needs] = Needs(signals=("hidden", "logits", "topk", "hybrid", "sampled"), tokenizers="one")
    name: Literal["forward_kl"] = "forward_kl"


@register_options
class ReverseKLOptions(DivergenceOptions):
    """Reverse KL."""

    name: Literal["reverse_kl"] = "reverse_kl"


@register_options
class JSDivergenceOptions(DivergenceOptions):
    """Generalised Jensen–Shannon divergence."""

    name: Literal["js_divergence"] = "js_divergence"
    beta: float = Field(0.5, ge=0, le=1)
    """Share of the teacher in the mixture."""


@register_options
class SkewedForwardKLOptions(DivergenceOptions):
    """Skewed forward KL."""

    name: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    skew_lambda: float = Field(0.1, gt=0, lt=1)
    """Share of the teacher in the mixture."""


@register_options
class SkewedReverseKLOptions(DivergenceOptions):
    """Skewed reverse KL."""

    name: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    skew_lambda: float = Field(0.1, gt=0, lt=1)
    """Share of the student in the mixture."""


@register_options
class AdaptiveKLOptions(DivergenceOptions):
    """Adaptive KL."""

    name: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(0.5, gt=0, lt=1)
    """Probability mass of the teacher's head, μ in the paper. The published program's ``adaptive_kl_alpha`` is the mass
    of the tail, which is 1 - μ."""


AnyDivergenceOptions = Annotated[DivergenceOptions, Registered(OPTIONS)]
"""Divergences that a recipe may name; the field ``name`` selects one."""


def _check_inner(given: DivergenceOptions) -> DivergenceOptions:
    """Refuse options that have no effect in a divergence inside of another objective.

    Raises:
        ValueError: one of them differs from its default.
    """
    for name in ("temperature", "tau2_scale"):
        value, default = getattr(given, name), DivergenceOptions.model_fields[name].default
        if value != default:
            raise ValueError(
                f"divergence.{name} is {value} and has no effect; allowed: {default}, the objective's applies"
            )
    return given


InnerDivergenceOptions = Annotated[AnyDivergenceOptions, AfterValidator(_check_inner)]
"""Divergences inside of another objective, at the objective's temperature."""


@register_options
class DSKDOptions(TeacherObjectiveOptions):
    """Dual-space distillation."""

    name: Literal["dskd"] = "dskd"
    requires: ClassVar[Needs] = Needs(signals=("hidden",), vocabulary_map=True, extras=True)
    version: Literal[1, 2] = 2
    """Version of the method. 2 starts with fitted projectors and uses the tokens at which the projected teacher's
    choice is the teacher's own; 1 starts with random projectors and trains them on the next token of the text."""
    temperature: float = Field(2.0, gt=0)
    divergence: InnerDivergenceOptions = Field(default={"name": "forward_kl"}, validate_default=True)
    """Divergence in the student's space, and in version 2 in the teacher's space too if ``compat`` is ``published``;
    otherwise the teacher's space uses forward KL. It takes the objective's temperature."""
    refresh: int = Field(8, gt=0)
    """Micro-batches between two fits of version 2's projector to the teacher's space, if ``compat`` is ``ours``."""
    compat: Compat = "published"
    """``ours`` normalises version 2's terms by all tokens; see :class:`~raycloud.distill.objectives.dskd.DSKD`. It was
    further from the teacher with two tokenizers, so it is not the default."""


@register_options
class DSKDCMAOptions(TeacherObjectiveOptions):
    """Dual-space distillation with cross-model attention."""

    name: Literal["dskd_cma"] = "dskd_cma"
    requires: ClassVar[Needs] = Needs(signals=("hidden",), teacher_embedding=True, extras=True)
    temperature: float = Field(2.0, gt=0)
    teacher_temperature: float = Field(1.0, gt=0)
    """Additional divisor of the projected teacher's logits."""
    divergence: InnerDivergenceOptions = Field(default={"name": "forward_kl"}, validate_default=True)
    """Divergence in the student's space, at the objective's temperature. The teacher's space uses forward KL."""
    prior: float = Field(0.0, ge=0)
    """Strength of a byte-overlap prior on attention: the logarithm of the shared byte fraction, times this, is added to
    the scores."""
    compat: Compat = "ours"
    """``published`` divides the teacher's hidden states and embeddings by one standard deviation of the batch instead
    of normalising each vector, so that a text's loss depends on the other texts of its batch."""


@register_options
class ULDOptions(TeacherObjectiveOptions):
    """Universal logit distillation."""

    name: Literal["uld"] = "uld"
    requires: ClassVar[Needs] = Needs(signals=("hidden", "logits", "topk", "sorted"))
    k: int | None = Field(128, gt=0)
    """Number of largest probabilities that are compared one by one; the rest is compared as one sum, with an error of
    at most the two sums. None sorts the whole vocabularies."""
    compat: Compat = "ours"
    """``published`` sorts the whole vocabularies whatever ``k`` is, and compares the i-th token of a text with the
    teacher's i-th token, up to the end of the shorter sequence."""

    @property
    def needs(self) -> Needs:
        """Needs of the objective with the chosen options: the k largest are not enough to sort whole vocabularies."""
        return replace(self.requires, signals=("hidden", "logits")) if self._ranks is None else self.requires

    @property
    def _ranks(self) -> int | None:
        return None if self.compat == "published" else self.k


@register_options
class MinEDOptions(TeacherObjectiveOptions):
    """Forward KL through a map between vocabularies."""

    name: Literal["mined"] = "mined"
    requires: ClassVar[Needs] = Needs(signals=("hidden", "logits"), tokenizers="two", vocabulary_map=True)
    temperature: float = Field(2.0, gt=0)
    k: int | None = Field(None, gt=0)
    """Number of most likely teacher tokens that are mapped; None maps all."""
    compat: Compat = "ours"
    """``published`` takes the logit of one teacher token for each student token (see
    :func:`~raycloud.distill.objectives.mined.first_mapped_logits`), gives student tokens without a teacher token no
    probability, and uses the next token of the text as the target at tokens without a partner. ``k`` is not used."""


@register_options
class MultiLevelOTOptions(TeacherObjectiveOptions):
    """Multi-level optimal transport."""

    name: Literal["multi_level_ot"] = "multi_level_ot"
    renamed: ClassVar[dict[str, str]] = {"words": "k"}
    k: int = Field(128, gt=0)
    """Number of most likely ids considered at each token."""
    keep: int = Field(50, gt=0)
    """Number of ids compared: those with the largest total mass over the text."""
    absolute: float = Field(1.0, ge=0)
    """Weight of the term of absolute differences."""
    logarithmic: float = Field(0.1, ge=0)
    """Weight of the term of logarithmic costs."""
    transport: float = Field(0.1, ge=0)
    """Weight of the transport."""
    share: float = Field(0.1, gt=0)
    """ε of the transport as a share of the median cost."""
    sweeps: int = Field(30, gt=0)
    """Number of Sinkhorn iterations."""
    compat: Literal["ours", "official", "mcwkd"] = "ours"
    """``official`` and ``mcwkd`` are the two published programs, see
    :func:`~raycloud.distill.multi_level.published_levels`; of the options above they use ``keep`` and the weights. They
    rank ids over the batch, so that a text's loss depends on the other texts of its batch, and hold all logits at once.
    ``mcwkd`` also compares prompts and padding, which signals do not contain; here positions after a text have uniform
    distributions."""


@register_options
class MCWKDOptions(DSKDCMAOptions):
    """Multi-cost distillation."""

    name: Literal["mcw_kd"] = "mcw_kd"  # type: ignore[assignment]
    renamed: ClassVar[dict[str, str]] = {"words": "k"}
    temperature: float = Field(3.0, gt=0)
    rank_temperature: float = Field(2.0, gt=0)
    """Divides logits before their probabilities are ranked."""
    k: int = Field(400, gt=0)
    """Number of ranks compared."""
    radius: int = Field(4, ge=0)
    """Tokens on either side of the averaging window."""
    logit_weights: CostWeights = (0.2, 0.5, 0.3)
    """Initial weights of the distance, divergence and salience costs."""
    state_weights: CostWeights = (0.3, 0.5, 0.2)
    """Initial weights of the bytes, distance and cosine costs."""
    weighting: Literal["learned", "projected", "fixed"] = "learned"
    """``learned`` trains the cost weights with the other parameters; ``projected`` moves them to the smallest costs, as
    the first published program does; ``fixed`` keeps them."""
    period: int = Field(1000, gt=0)
    """Micro-batches between two projections of the weights."""
    importance: Literal["salience", "information"] = "salience"
    """Use of the importance of a token: ``salience`` is a learned cost; ``information`` omits that cost and gives
    teacher tokens mass in proportion to their negative log-probability."""
    transport: float = Field(1.0, ge=0)
    """Weight of both transport terms relative to cross-model attention."""
    solver: Literal["sinkhorn", "semi_dual"] = "sinkhorn"
    """``semi_dual`` trains a potential against the student, the idea of the second published program."""
    share: float = Field(0.1, gt=0)
    """ε as a share of the median cost."""
    sweeps: int = Field(30, gt=0)
    sinkhorn_alpha: float = Field(0.1, gt=0)
    """1/ε if ``compat`` is ``published``, which does not use ``share``."""


AnyObjectiveOptions = Annotated[TeacherObjectiveOptions, Registered(OPTIONS)]
"""Objectives that a recipe may name; the field ``name`` selects one."""
