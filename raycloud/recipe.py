"""Typed recipes: pydantic models read from YAML, with overrides such as ``key.sub=value`` and one-line errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, SerializationInfo, ValidationError
from pydantic_core import CoreSchema, core_schema
from yaml.error import MarkedYAMLError

from raycloud.errors import RecipeError
from raycloud.yaml12 import dump, load, load_line

Bundle = dict[str, float]
"""Amounts of an actor by resource name of Ray, all on one node."""

_SHOWN = 80
"""Maximum number of characters of a value that a message repeats."""


class Recipe(BaseModel):
    """Base of all recipes and of their parts; unknown keys are refused, and values are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    may_change: ClassVar[frozenset[str]] = frozenset({"output"})
    """Fields that a resumed run may change: they affect where and how fast it runs, but not its results."""
    renamed: ClassVar[dict[str, str]] = {}
    """New names of renamed keys by their former names, for the message that refuses a former name."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read and validate a recipe file.

        Args:
            path: file, read by :func:`read_yaml`.
            overrides: values to replace, such as ``training.lr=1e-4`` or ``edges.0.part=1``.

        Raises:
            RecipeError: the file cannot be read, or a value is not allowed; the message names the field and the value.
        """
        return cls.parse(read_yaml(path), overrides, source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], overrides: Sequence[str] = (), source: str = "recipe") -> Self:
        """Validate plain values after applying overrides; see :meth:`load`."""
        for override in overrides:
            _apply(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(f"{source}: " + "; ".join(problems(cls, error))) from None

    def dump(self) -> str:
        """Return the recipe as YAML, with all defaults written out."""
        return dump(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Registered:
    """Annotation of a field that holds one of several registered recipes, selected by their field ``name``.

    The JSON schema lists the recipes that are registered when the class with the field is defined. Recipes that are
    registered later are accepted as well.
    """

    registry: Mapping[str, type[Recipe]]
    """Recipes by name; a field takes those that derive from the class that it annotates."""

    def models(self, base: type[BaseModel]) -> dict[str, type[Recipe]]:
        """Registered recipes that derive from a class, by name."""
        return {name: model for name, model in self.registry.items() if issubclass(model, base)}

    def __get_pydantic_core_schema__(self, base: type[Recipe], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Schema for pydantic: a union of the recipes, with a lookup in the registry for those registered later."""
        known = self.models(base)
        union: Any = Annotated[Union[tuple(known.values())], Field(discriminator="name")]  # noqa: UP007

        def validate(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
            later = None if name in known else self.models(base).get(str(name))
            return inner(value) if later is None else later.model_validate(value)

        def dump(value: Recipe, info: SerializationInfo) -> dict[str, Any]:
            return value.model_dump(mode=info.mode)

        return core_schema.no_info_wrap_validator_function(
            validate,
            handler.generate_schema(union),
            serialization=core_schema.plain_serializer_function_ser_schema(dump, info_arg=True),
        )


class Placement(Recipe):
    """Resources that one actor on a Ray cluster reserves on its node, beside one unit of ``cloud`` or ``edge``."""

    num_cpus: float = Field(0.25, ge=0)
    """Ray CPUs. The default is a fraction, so that a job's actors and driver fit on few cores; the number of threads is
    set separately."""
    num_gpus: float = Field(0.0, ge=0)

    def bundle(self, tier: str) -> Bundle:
        """Resources of one actor in the tier ``cloud`` or ``edge``; amounts of 0 are left out."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, tier: 1.0}
        return {name: amount for name, amount in wanted.items() if amount}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, merged over that of the file named by its key ``extends``, if it has one.

    The path in ``extends`` is relative to the folder of the file. Mappings are merged key by key; any other value
    replaces the value of the extended file.

    Raises:
        RecipeError: a file cannot be read or is not a mapping, or files extend each other in a cycle.
    """
    return _extended(Path(path), ())


def _extended(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Read the mapping of a file; ``above`` holds the files that extend it, in order."""
    values = _one_file(path)
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str):
        raise RecipeError(f"recipe '{path}': extends must name a file, it is {_kind(base)}")
    below, chain = path.parent / Path(base).expanduser(), (*above, path.resolve())
    if below.resolve() in chain:
        raise RecipeError(f"recipe '{path}': extends forms a cycle, it leads back to '{base}'")
    if not below.is_file():
        raise RecipeError(f"recipe '{path}': extends names a file that does not exist: '{below}'")
    return _joined(_extended(below, chain), values)


def _joined(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    joined = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            joined[key] = _joined(below[key], above[key])
    return joined


def _one_file(path: Path) -> dict[str, Any]:
    try:
        values = load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read recipe '{path}': {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe '{path}' is not YAML: {_what_is_wrong(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe '{path}' must be a mapping of keys to values, it is {_kind(values)}")
    return values


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise RecipeError(f"override '{override}' must look like key.sub=value")
    at: Any = values
    for key in keys[:-1]:
        at = _child(at, key, override)
    try:
        value = load_line(text)
    except yaml.YAMLError as error:
        shown = " ".join(override.split())
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
        raise RecipeError(f"override '{shown}': the value is not YAML: {_what_is_wrong(error)}") from None
    if isinstance(at, list):
        at[_index(at, keys[-1], override)] = value
    else:
        at[keys[-1]] = value


def _what_is_wrong(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Describe an error in one line, with its line and column if known."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        message = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {message}"
    return " ".join(str(error).split())


def _index(at: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(at):
        raise RecipeError(f"override '{override}': '{key}' must be an index from 0 to {len(at) - 1}")
    return int(key)


def _child(at: Any, key: str, override: str) -> Any:
    if isinstance(at, list):
        child = at[_index(at, key, override)]
    else:
        child = at.setdefault(key, {})
        if child is None:
            child = at[key] = {}
    if not isinstance(child, dict | list):
        raise RecipeError(f"override '{override}': '{key}' is a value and has no keys")
    return child


def problems(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """Describe each problem of values that failed validation as ``cls``, one line per problem."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        given = f", got {problem['input']!r}" if not isinstance(problem["input"], dict | list) else ""
        match problem["type"]:
            case "extra_forbidden":
                lines.append(_unknown_key(_model_at(cls, problem["loc"][:-1]), where))
            case "union_tag_not_found":
                lines.append(f"missing key '{where}.{problem['ctx']['discriminator'].strip(chr(39))}'")
            case "missing":
                lines.append(f"missing key '{where}'")
            case "value_error":
                lines.append((f"{where}: " if where else "") + str(problem["ctx"]["error"]))
            case _:
                text = problem["msg"]
                lines.append(f"{where}: {text[0].lower()}{text[1:]}{given}")
    return lines


def _unknown_key(model: type[BaseModel] | None, where: str) -> str:
    """Describe an unknown key: with its new name if it was renamed, else with the keys that the model allows."""
    if model is None:
        return f"unknown key '{where}'"
    new = model.renamed.get(where.rpartition(".")[2]) if issubclass(model, Recipe) else None
    if new is not None:
        return f"{where}: this key is called {new} now"
    return f"unknown key '{where}' (allowed: {', '.join(model.model_fields)})"


def _model_at(cls: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """Find the model that holds the keys at a path inside a recipe; None if the path does not determine it."""
    models, discriminator = [cls], None
    for key in path:
        fields = [model.model_fields[key] for model in models if isinstance(key, str) and key in model.model_fields]
        if fields:
            registered = [one for one in fields[0].metadata if isinstance(one, Registered)]
            discriminator = "name" if registered else fields[0].discriminator
            models = [model for field in fields for model in _models_in(field.annotation)]
            models = [model for one in registered for model in one.models(models[0]).values()] or models
        else:
            models = [model for model in models if key in _tags(model, discriminator)] or models
    return models[0] if len(models) == 1 else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """List the models in a type annotation: the type itself, its items or its alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _tags(model: type[BaseModel], discriminator: Any) -> tuple[Any, ...]:
    """Return the tags by which the location of a pydantic error names this alternative of a union."""
    if isinstance(discriminator, str):
        return get_args(model.model_fields[discriminator].annotation)
    return (model.__name__,)
