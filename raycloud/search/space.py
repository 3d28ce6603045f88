"""A search space: a base recipe, what varies, the seeds of every variant, and what is compared.

A space is a plain Python file that defines ``SPACE = Space(...)``; :func:`load_space` reads it and :func:`trials` says
which runs it stands for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import runpy
import traceback
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from raycloud.errors import RaycloudError, RecipeError
from raycloud.recipe import Recipe, problems, read_yaml
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
    """Everything a search runs: each variant, at each point of the grid, with each seed."""

    base: str | dict[str, Any]
    """The recipe that variants change: a YAML file, its path relative to the space's file, or the values themselves."""
    variants: dict[str, Variant] = {}
    """By name."""
    grid: dict[str, list[Any]] = {}
    """Values by key, such as ``{"student.blocks": [10, 20]}``; every combination is tried, with every variant."""
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
        names = self.names
        if names == [""]:
            raise ValueError("nothing varies; give variants or a grid")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline is '{self.baseline}'; allowed: null, {', '.join(names)}")
        known = [metric.name for metric in self.metrics]
        for name, numbers in self.references.items():
            if name in names:
                raise ValueError(f"references: '{name}' is the name of a variant")
            for key in numbers:
                if key not in known:
                    raise ValueError(f"references: '{name}' has no metric '{key}'; allowed: {', '.join(known)}")
        return self

    @property
    def names(self) -> list[str]:
        """The variants at every point of the grid."""
        return [name for name, _, _ in self.points()]

    def points(self) -> list[tuple[str, dict[str, Any], Sequence[int]]]:
        """Name, overrides and seeds of every variant at every point of the grid."""
        found: list[tuple[str, dict[str, Any], Sequence[int]]] = []
        for name, variant in (self.variants or {"": Variant()}).items():
            for values in itertools.product(*self.grid.values()):
                point = dict(zip(self.grid, values, strict=True))
                parts = [name, *(f"{key}={value}" for key, value in point.items())]
                found.append(
                    (", ".join(filter(None, parts)), {**variant.overrides, **point}, variant.seeds or self.seeds)
                )
        return found


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


def load_space(path: str | Path) -> Space:
    """The space of a file, with the values of its base recipe.

    Raises:
        RecipeError: the file cannot be read or run, or defines no valid space; one line says where.
    """
    path = Path(path)
    try:
        space = runpy.run_path(str(path)).get("SPACE")
    except ValidationError as error:
        part = next((kind for kind in (Metric, Variant) if kind.__name__ == error.title), Space)
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
    """The runs of a loaded space: the first seed of every variant, then the second ones, and so on.

    Args:
        space: what :func:`load_space` returned.
        overrides: of the base recipe, as ``key.sub=value``.

    Raises:
        RecipeError: a variant's recipe is not valid, or two of them are the same.
    """
    assert isinstance(space.base, dict)
    job = job_of(space.base, "base recipe")
    found: dict[str, Trial] = {}
    points = space.points()
    for place in range(max(len(seeds) for _, _, seeds in points)):
        for variant, changes, seeds in points:
            if place >= len(seeds):
                continue
            own = [f"{key}={_yaml(value)}" for key, value in {**changes, "seed": seeds[place]}.items()]
            recipe = job.recipe.parse(deepcopy(space.base), [*overrides, *own], source=f"variant '{variant}'")
            trial = Trial(variant, seeds[place], job, recipe)
            same = found.setdefault(trial.fingerprint, trial)
            if same is not trial:
                raise RecipeError(f"'{trial.name}' is the same run as '{same.name}'")
    return list(found.values())


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True))
