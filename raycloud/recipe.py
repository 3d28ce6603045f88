"""Typed recipes: pydantic models read from YAML, overridden as ``key.sub=value``, refused with one clear line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raycloud.errors import RecipeError


class Recipe(BaseModel):
    """Base of every recipe and every part of one: unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file as :func:`read_yaml` does; apply overrides such as ``training.lr=1e-4`` or ``edges.0.part=1``.

        Raises:
            RecipeError: the file cannot be read, or a value is not allowed; the message names field and value.
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
        """The recipe as YAML with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class Placement(Recipe):
    """What one actor on a Ray cluster asks of its node, beside one unit of ``cloud`` or ``edge``."""

    num_cpus: float = Field(0.25, ge=0)
    """A fraction, so that the actors of a job and its driver fit on few cores; the threads say how many are used."""
    num_gpus: float = Field(0.0, ge=0)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, on top of the one in the file that its key ``extends`` names, if it has one.

    That file is looked for beside it. Mappings are joined key by key; any other value replaces the one below.

    Raises:
        RecipeError: a file cannot be read or holds something else, or files extend one another in a circle.
    """
    return _extended(Path(path), ())


def _extended(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of a file that those in ``above`` extend."""
    values = _one_file(path)
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str):
        raise RecipeError(f"recipe '{path}': extends must name a file, it is {_kind(base)}")
    below, chain = path.parent / Path(base).expanduser(), (*above, path.resolve())
    if below.resolve() in chain:
        raise RecipeError(f"recipe '{path}': extends leads in a circle, back to '{base}'")
    if not below.is_file():
        raise RecipeError(f"recipe '{path}': extends names no file: '{below}'")
    return _joined(_extended(below, chain), values)


def _joined(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    joined = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            joined[key] = _joined(below[key], above[key])
    return joined


def _one_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read recipe '{path}': {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe '{path}' is not YAML: {' '.join(str(error).split())}") from None
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
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': the value is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(at, list):
        at[_index(at, keys[-1], override)] = value
    else:
        at[keys[-1]] = value


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
        raise RecipeError(f"override '{override}': '{key}' is a value, it has no keys of its own")
    return child


def problems(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """What is wrong with values that should have become a ``cls``, a line each."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        given = f", got {problem['input']!r}" if not isinstance(problem["input"], dict | list) else ""
        match problem["type"]:
            case "extra_forbidden":
                allowed = ", ".join(_keys_at(cls, problem["loc"][:-1]))
                lines.append(f"unknown key '{where}'" + (f" (allowed: {allowed})" if allowed else ""))
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


def _keys_at(cls: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys allowed at a place inside a recipe, as far as they can be told from the JSON schema."""
    schema = cls.model_json_schema()
    at: dict[str, Any] = schema
    for key in path:
        at = _resolved(at, schema)
        chosen = at.get("discriminator", {}).get("mapping", {}).get(key)
        if chosen:
            at = {"$ref": chosen}
        elif isinstance(key, int):
            at = at.get("items", {})
        else:
            at = at.get("properties", {}).get(key, {})
    return list(_resolved(at, schema).get("properties", {}))


def _resolved(at: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for option in at.get("anyOf", ()):
        if "$ref" in option:
            at = option
    reference = at.get("$ref")
    if reference is None:
        return at
    found: dict[str, Any] = schema["$defs"][reference.rsplit("/", 1)[-1]]
    return found
