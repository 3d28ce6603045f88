"""Search space: a base recipe, what varies, the seeds of every variant, and the metrics to compare.

A space is a Python file that defines ``SPACE = Space(...)``; :func:`load_space` reads it. The variants are either
enumerated, as variants and a grid, and :func:`trials` returns their runs; or they are sampled, and :func:`trial_at`
returns the run of one point.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from raycloud.errors import RaycloudError, RecipeError
from raycloud.jobs.registry import JOBS, Job, SearchSupport
from raycloud.recipe import Bundle, Recipe, problems, read_yaml
from raycloud.search.domain import Choice, Domain, Point, Range
from raycloud.yaml12 import dump

Direction = Literal["min", "max"]


class Metric(Recipe):
    """Number of a run's summary, and the direction in which it is better."""

    name: str
    direction: Direction


class Variant(Recipe):
    """Change of the base recipe."""

    overrides: dict[str, Any] = {}
    """Values by key, such as ``{"objective.kd": {"name": "uld"}, "training.lr": 1e-4}``."""
    seeds: list[int] | None = Field(None, min_length=1)
    """Seeds of this variant; None for those of the space."""


class Space(Recipe):
    """Search space: each variant, at each point of the grid, with each seed; or sampled points."""

    base: str | dict[str, Any]
    """Recipe that variants change: a YAML file, its path relative to the space's file, or the values themselves."""
    variants: dict[str, Variant] = {}
    """Variants by name."""
    grid: dict[str, list[Any]] = {}
    """Values by key, such as ``{"student.blocks": [10, 20]}``; every combination is tried, with every variant."""
    sample: dict[str, Domain] = {}
    """Domains by key, such as ``{"start_block": Range(low=1, high=14)}``, instead of variants and grid. An optimizer
    (Optuna) proposes the points by their metrics. Points with an invalid recipe are not part of the space."""
    trials: int = Field(20, gt=0)
    """Total number of trials if values are sampled."""
    stop_by: str | None = None
    """Metric by which asynchronous successive halving (ASHA) stops the worse half of the trials at each rung of their
    job; None lets all trials run to the end. A single metric decides, so with several metrics it may stop trials that
    are good in the others: set it only where one metric has priority."""
    seeds: list[int] = Field([10], min_length=1)
    metrics: list[Metric] = Field(min_length=1)
    """Metrics to compare; the first one decides which variant is best."""
    baseline: str | None = None
    """Variant that the others are compared with, text by text."""
    references: dict[str, dict[str, str]] = {}
    """Rows without runs of their own: for each name, the number of the runs' summaries to use for each metric, such as
    ``{"teacher": {"student_ppl_after": "teacher_ppl"}}``."""
    concurrent: int = Field(1, gt=0)
    """Number of trials at a time."""
    output: str = "results/search"
    """Directory of the search."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        empty = [key for key, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid: '{empty[0]}' has no values")
        if self.sample and (self.variants or self.grid or self.baseline is not None or len(self.seeds) > 1):
            raise ValueError("sample replaces variants, grid and baseline, and takes one seed")
        names = self.names
        if names == [""]:
            raise ValueError("nothing varies; give variants, grid or sample")
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
        """Names of the variants at every point of the grid; empty for a sampled space."""
        return [] if self.sample else [name for name, _, _ in self.points()]

    def points(self) -> list[tuple[str, dict[str, Any], Sequence[int]]]:
        """Return name, overrides and seeds of every variant at every point of the grid."""
        found: list[tuple[str, dict[str, Any], Sequence[int]]] = []
        for name, variant in (self.variants or {"": Variant()}).items():
            for values in itertools.product(*self.grid.values()):
                point = dict(zip(self.grid, values, strict=True))
                found.append((_named(name, point), {**variant.overrides, **point}, variant.seeds or self.seeds))
        return found


def _named(variant: str, point: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, [variant, *(f"{key}={value}" for key, value in point.items())]))


def fingerprint(recipe: Recipe) -> str:
    """Return the fingerprint of a job's recipe, without its ``output``."""
    values = json.dumps(recipe.model_dump(mode="json", exclude={"output"}), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trial:
    """Single run of the job: a variant with a seed."""

    variant: str
    seed: int
    job: Job
    recipe: Recipe

    @property
    def support(self) -> SearchSupport:
        """Support for searches in the job's registration."""
        assert self.job.search is not None
        return self.job.search

    @property
    def bundles(self) -> list[Bundle]:
        """Resources of each process of the run: first the driver, then its actors."""
        return [self.support.driver, *self.job.bundles(self.recipe)]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe, see :func:`fingerprint`."""
        return fingerprint(self.recipe)

    @property
    def name(self) -> str:
        """Name for messages: variant and seed."""
        return f"{self.variant} (seed {self.seed})"

    @property
    def folder(self) -> str:
        """Name of its result directory, unique for its recipe."""
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.variant)}-{self.seed}-{self.fingerprint[:8]}"

    def check(self) -> None:
        """Check its recipe in this process.

        Raises:
            RecipeError: the user can fix the recipe; the message names the variant.
            RaycloudError: something else failed, such as a download.
        """
        try:
            self.support.check(self.recipe)
        except RaycloudError as error:
            if error.exit_code != RecipeError.exit_code:
                raise
            raise RecipeError(f"variant '{self.variant}': {error}") from error

    def plain(self) -> str:
        """Return the trial as text, to send to another process; :meth:`read` parses it."""
        recipe = self.recipe.model_dump(mode="json")
        return json.dumps({"variant": self.variant, "seed": self.seed, "recipe": recipe})

    @classmethod
    def read(cls, plain: str) -> Trial:
        """Return the trial that :meth:`plain` wrote."""
        values = json.loads(plain)
        job = _job_of(values["recipe"], "trial")
        return cls(values["variant"], values["seed"], job, job.recipe_class.model_validate(values["recipe"]))


def load_space(path: str | Path) -> Space:
    """Load the space of a file, with the values of its base recipe.

    Raises:
        RecipeError: the file cannot be read or run, or defines no valid space; the message names the place.
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
    """Return the trials of an enumerated space: the first seed of every variant, then the second, and so on.

    Args:
        space: space that :func:`load_space` returned.
        overrides: overrides of the base recipe, as ``key.sub=value``.

    Raises:
        RecipeError: a variant's recipe is invalid, or two of them are the same.
    """
    found: dict[str, Trial] = {}
    points = space.points() if not space.sample else []
    for index in range(max((len(seeds) for _, _, seeds in points), default=0)):
        for variant, changes, seeds in points:
            if index >= len(seeds):
                continue
            trial = _trial(space, variant, changes, seeds[index], overrides)
            same = found.setdefault(trial.fingerprint, trial)
            if same is not trial:
                raise RecipeError(f"'{trial.name}' is the same run as '{same.name}'")
    return list(found.values())


def trial_at(space: Space, point: Point, overrides: Sequence[str] = ()) -> Trial:
    """Return the trial of a point drawn from ``space.sample``.

    Raises:
        RecipeError: the point's recipe is invalid.
    """
    return _trial(space, _named("", point), point, space.seeds[0], overrides)


def point_of(space: Space, recipe: Mapping[str, Any], overrides: Sequence[str] = ()) -> Point | None:
    """Return the point of ``space.sample`` whose run has this recipe, ignoring ``output``; None if there is none.

    Args:
        space: space that :func:`load_space` returned.
        recipe: plain values of a recipe, as in a row.
        overrides: overrides of the base recipe.
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
        known = fingerprint(trial.job.recipe_class.model_validate(recipe))
    except (RecipeError, ValidationError):
        return None
    return point if known == trial.fingerprint else None


def examples(space: Space, overrides: Sequence[str] = ()) -> Iterator[Trial]:
    """Yield the valid trials of a sampled space at the ends of its domains, at least one.

    Raises:
        RecipeError: none is valid; the error is that of the first one.
    """
    errors, found = [], False
    for values in itertools.product(*(domain.ends() for domain in space.sample.values())):
        try:
            trial = trial_at(space, dict(zip(space.sample, values, strict=True)), overrides)
        except RecipeError as error:
            errors.append(error)
            continue
        found = True
        yield trial
    if not found:
        raise errors[0]


def example_trial(space: Space, overrides: Sequence[str] = ()) -> Trial:
    """Return the first of :func:`examples`."""
    return next(examples(space, overrides))


def _trial(space: Space, variant: str, changes: Mapping[str, Any], seed: int, overrides: Sequence[str]) -> Trial:
    assert isinstance(space.base, dict)
    job = _job_of(space.base, "base recipe")
    own = [f"{key}={_yaml(value)}" for key, value in {**changes, "seed": seed}.items()]
    recipe = job.recipe_class.parse(deepcopy(space.base), [*overrides, *own], source=f"variant '{variant}'")
    return Trial(variant, seed, job, recipe)


def _job_of(recipe: Mapping[str, Any], source: str) -> Job:
    """Return the job that a recipe's plain values name.

    Raises:
        RecipeError: no searchable job has this name.
    """
    searchable = {name: job for name, job in JOBS.items() if job.search is not None}
    name = recipe.get("job")
    if name not in searchable:
        raise RecipeError(f"{source}: job is {name!r}; allowed: {', '.join(searchable)}")
    return searchable[name]


def _yaml(value: Any) -> str:
    return dump(value, flow=True)
