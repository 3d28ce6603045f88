"""A search space: a base recipe, what varies, the seeds of every variant, and what is compared.

A space is a plain Python file that defines ``SPACE = Space(...)``; :func:`load_space` reads it. What varies is either
counted out, as variants and a grid, and :func:`trials` says which runs they stand for; or it is sampled, and
:func:`trial_at` is the run of one point.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import runpy
import traceback
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from raycloud.errors import RaycloudError, RecipeError
from raycloud.recipe import Recipe, problems, read_yaml
from raycloud.search.domain import Choice, Domain, Point, Range
from raycloud.search.jobs import Job, job_of

Direction = Literal["min", "max"]


class Metric(Recipe):
    """A number of a run's summary, and which way is better."""

    name: str
    direction: Direction


class Variant(Recipe):
    """One way to change the base recipe."""

    overrides: dict[str, Any] = {}
    """Values by key, such as ``{"objective.kd": {"name": "uld"}, "training.lr": 1e-4}``."""
    seeds: list[int] | None = Field(None, min_length=1)
    """None for the space's."""


class Space(Recipe):
    """Everything a search runs: each variant, at each point of the grid, with each seed; or points that are sampled."""

    base: str | dict[str, Any]
    """The recipe that variants change: a YAML file, its path relative to the space's file, or the values themselves."""
    variants: dict[str, Variant] = {}
    """By name."""
    grid: dict[str, list[Any]] = {}
    """Values by key, such as ``{"student.blocks": [10, 20]}``; every combination is tried, with every variant."""
    sample: dict[str, Domain] = {}
    """In place of variants and grid: what values are drawn from, by key, such as ``{"first": Range(low=1, high=14)}``.
    An optimiser (Optuna) draws what promises most for the metrics. Points whose recipe is not valid are not in the
    space."""
    trials: int = Field(20, gt=0)
    """How many there are to be in all where something is sampled."""
    stop_by: str | None = None
    """The metric by which asynchronous successive halving (ASHA) stops the worse half of the trials at each of their
    job's rungs; None lets all run to their end. One metric decides, so a front of several would lose the trials that
    are good in others: name one where it leads."""
    seeds: list[int] = Field([10], min_length=1)
    metrics: list[Metric] = Field(min_length=1)
    """What is compared; the first one decides which variant is best."""
    baseline: str | None = None
    """The variant that the others are compared with, text by text."""
    references: dict[str, dict[str, str]] = {}
    """Rows that need no run of their own: by name, which number of the runs' summaries stands for which metric, such as
    ``{"teacher": {"student_ppl_after": "teacher_ppl"}}``."""
    concurrent: int = Field(1, gt=0)
    """Trials at a time."""
    output: str = "results/search"
    """The directory of the search."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        empty = [key for key, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid: '{empty[0]}' has no values")
        if self.sample and (self.variants or self.grid or self.baseline is not None or len(self.seeds) > 1):
            raise ValueError("sample stands in place of variants, grid and baseline, and takes one seed")
        names = self.names
        if names == [""]:
            raise ValueError("nothing varies; give variants, a grid or what to sample")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline is '{self.baseline}'; allowed: null, {', '.join(names)}")
        known = [metric.name for metric in self.metrics]
        if self.stop_by is not None and self.stop_by not in known:
            raise ValueError(f"stop_by is '{self.stop_by}'; allowed: null, {', '.join(known)}")
        for name, numbers in self.references.items():
            if name in names:
                raise ValueError(f"references: '{name}' is the name of a variant")
            for key in numbers:
                if key not in known:
                    raise ValueError(f"references: '{name}' has no metric '{key}'; allowed: {', '.join(known)}")
        return self

    @property
    def names(self) -> list[str]:
        """The variants at every point of the grid; none where something is sampled."""
        return [] if self.sample else [name for name, _, _ in self.points()]

    def points(self) -> list[tuple[str, dict[str, Any], Sequence[int]]]:
        """Name, overrides and seeds of every variant at every point of the grid."""
        found: list[tuple[str, dict[str, Any], Sequence[int]]] = []
        for name, variant in (self.variants or {"": Variant()}).items():
            for values in itertools.product(*self.grid.values()):
                point = dict(zip(self.grid, values, strict=True))
                found.append((_named(name, point), {**variant.overrides, **point}, variant.seeds or self.seeds))
        return found


def _named(variant: str, point: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, [variant, *(f"{key}={value}" for key, value in point.items())]))


def fingerprint(recipe: Recipe) -> str:
    """Of a job's recipe, wherever its results go."""
    values = json.dumps(recipe.model_dump(mode="json", exclude={"output"}), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trial:
    """One run of the job: a variant with a seed."""

    variant: str
    seed: int
    job: Job
    recipe: Recipe

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint`."""
        return fingerprint(self.recipe)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.variant} (seed {self.seed})"

    @property
    def folder(self) -> str:
        """The name of its result directory; that of another recipe is another one."""
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.variant)}-{self.seed}-{self.fingerprint[:8]}"

    def plain(self) -> str:
        """The trial as text, for another process; :meth:`read` reads it."""
        recipe = self.recipe.model_dump(mode="json")
        return json.dumps({"variant": self.variant, "seed": self.seed, "recipe": recipe})

    @classmethod
    def read(cls, plain: str) -> Trial:
        """The trial that :meth:`plain` wrote."""
        values = json.loads(plain)
        job = job_of(values["recipe"], "trial")
        return cls(values["variant"], values["seed"], job, job.recipe.model_validate(values["recipe"]))


def load_space(path: str | Path) -> Space:
    """The space of a file, with the values of its base recipe.

    Raises:
        RecipeError: the file cannot be read or run, or defines no valid space; one line says where.
    """
    path = Path(path)
    try:
        space = runpy.run_path(str(path)).get("SPACE")
    except ValidationError as error:
        part = next((kind for kind in (Metric, Variant, Choice, Range) if kind.__name__ == error.title), Space)
        raise RecipeError(f"space '{path}', {error.title}: " + "; ".join(problems(part, error))) from None
    except RaycloudError:
        raise
    except SyntaxError as error:
        raise RecipeError(f"space '{path}', line {error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if not lines and isinstance(error, OSError):
            raise RecipeError(f"cannot read space '{path}': {error.strerror}") from None
        where = f", line {lines[-1]}" if lines else ""
        raise RecipeError(f"space '{path}'{where}: {type(error).__name__}: {error}") from None
    if not isinstance(space, Space):
        kind = "nothing" if space is None else f"a {type(space).__name__}"
        raise RecipeError(f"space '{path}' must define SPACE = Space(...), it defines {kind} of that name")
    if isinstance(space.base, str):
        return space.model_copy(update={"base": read_yaml(path.parent / space.base)})
    return space


def trials(space: Space, overrides: Sequence[str] = ()) -> list[Trial]:
    """The runs that a loaded space counts out: the first seed of every variant, then the second ones, and so on.

    Args:
        space: what :func:`load_space` returned.
        overrides: of the base recipe, as ``key.sub=value``.

    Raises:
        RecipeError: a variant's recipe is not valid, or two of them are the same.
    """
    found: dict[str, Trial] = {}
    points = space.points() if not space.sample else []
    for place in range(max((len(seeds) for _, _, seeds in points), default=0)):
        for variant, changes, seeds in points:
            if place >= len(seeds):
                continue
            trial = _trial(space, variant, changes, seeds[place], overrides)
            same = found.setdefault(trial.fingerprint, trial)
            if same is not trial:
                raise RecipeError(f"'{trial.name}' is the same run as '{same.name}'")
    return list(found.values())


def trial_at(space: Space, point: Point, overrides: Sequence[str] = ()) -> Trial:
    """The run of a point that was drawn from ``space.sample``.

    Raises:
        RecipeError: there is no valid recipe there.
    """
    return _trial(space, _named("", point), point, space.seeds[0], overrides)


def point_of(space: Space, recipe: Mapping[str, Any], overrides: Sequence[str] = ()) -> Point | None:
    """The point of ``space.sample`` whose run has this recipe, wherever its results went; None if there is none.

    Args:
        space: what :func:`load_space` returned.
        recipe: plain values, such as a row has.
        overrides: of the base recipe.
    """
    point: Point = {}
    for key, domain in space.sample.items():
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not domain.contains(value):
            return None
        point[key] = domain.plain(value)
    try:
        trial = trial_at(space, point, overrides)
        known = fingerprint(trial.job.recipe.model_validate(recipe))
    except (RecipeError, ValidationError):
        return None
    return point if known == trial.fingerprint else None


def example(space: Space, overrides: Sequence[str] = ()) -> Trial:
    """A trial of a space that samples: a valid one at the ends of its domains.

    Raises:
        RecipeError: there is none; why the first one is not valid.
    """
    errors = []
    for values in itertools.product(*(domain.ends() for domain in space.sample.values())):
        try:
            return trial_at(space, dict(zip(space.sample, values, strict=True)), overrides)
        except RecipeError as error:
            errors.append(error)
    raise errors[0]


def _trial(space: Space, variant: str, changes: Mapping[str, Any], seed: int, overrides: Sequence[str]) -> Trial:
    assert isinstance(space.base, dict)
    job = job_of(space.base, "base recipe")
    own = [f"{key}={_yaml(value)}" for key, value in {**changes, "seed": seed}.items()]
    recipe = job.recipe.parse(deepcopy(space.base), [*overrides, *own], source=f"variant '{variant}'")
    return Trial(variant, seed, job, recipe)


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True))
