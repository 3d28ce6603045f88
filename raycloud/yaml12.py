"""YAML 1.2 reader and writer with the core schema: ``no`` is a string, ``1e-4`` a number, ``12:30:00`` a string.

PyYAML resolves values by version 1.1, where these are false, a string and 45,000; ``010`` is eight there, and ten here.
The core schema is section 10.3.2 of https://yaml.org/spec/1.2.2. Documents with too many levels or values are refused.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from yaml.error import Mark, MarkedYAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.tokens import ScalarToken, StreamEndToken, StreamStartToken

_DEPTH = 100
"""Maximum levels of nesting, with aliases expanded."""
_VALUES = 100_000
"""Maximum values of a document, with aliases expanded: nine levels of ten aliases each would be a billion values."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Pattern of a plain value for each tag, and the characters it may begin with. Any other plain value is a string."""
_PATTERNS = {_TAG + name: re.compile(rf"(?:{pattern})\Z") for name, (pattern, _) in _SCALARS.items()}


class _Loader(yaml.SafeLoader):
    """Loader that gives nodes the tags of the core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    _level = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        """Compose a node, and check its level of nesting while the parser recurses."""
        self._level += 1
        _check_depth(self._level, self.peek_event().start_mark)
        node: Node = super().compose_node(parent, index)  # type: ignore[assignment]
        self._level -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings that YAML 1.1 or 1.2 would read as another type."""


for _name, (_, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _name, _PATTERNS[_TAG + _name], ["", *_first] if _name == "null" else [*_first]
        )


def load(text: str) -> Any:
    """Read a document as None, booleans, numbers, strings, lists and mappings of them; no two values share an object.

    Raises:
        yaml.YAMLError: the text is not YAML, has other tags, has a duplicate key, or is too deep or too large.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    return None if node is None else _value(node, 1, iter(range(_VALUES)))


def load_line(text: str) -> Any:
    """Read a value from the command line, where ``#`` begins no comment: a plain string is kept as a whole.

    Raises:
        yaml.YAMLError: see :func:`load`; or a ``#`` follows a value that is not a plain string.
    """
    value = load(text)
    if "#" not in text:
        return value
    tokens = [token for token in yaml.scan(text) if not isinstance(token, StreamStartToken | StreamEndToken)]
    left = text
    for token in reversed(tokens):
        left = left[: token.start_mark.index] + left[token.end_mark.index :]
    if "#" not in left:
        return value
    if not tokens or (len(tokens) == 1 and isinstance(tokens[0], ScalarToken) and tokens[0].plain):
        return text.strip()
    raise yaml.YAMLError("'#' would begin a comment; put the text in quotes")


def dump(value: Any, *, flow: bool = False) -> str:
    """Write plain values as YAML that versions 1.1 and 1.2 read alike; ``flow`` writes them on one line."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow))


def _value(node: Node, level: int, left: Iterator[int]) -> Any:
    _check_depth(level, node.start_mark)
    if next(left, None) is None:
        raise MarkedYAMLError(problem=f"more than {_VALUES} values, aliases expanded", problem_mark=node.start_mark)
    match node:
        case ScalarNode():
            return _scalar(node)
        case SequenceNode(tag="tag:yaml.org,2002:seq"):
            return [_value(child, level + 1, left) for child in node.value]
        case MappingNode(tag="tag:yaml.org,2002:map"):
            found: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = _value(key_node, level + 1, left)
                if not isinstance(key, Hashable) or key in found:
                    what = (
                        f"the key {key!r} is given twice" if isinstance(key, Hashable) else "a key is a list or mapping"
                    )
                    raise MarkedYAMLError(problem=what, problem_mark=key_node.start_mark)
                found[key] = _value(value_node, level + 1, left)
            return found
    raise _unknown(node)


def _scalar(node: ScalarNode) -> Any:
    text, name = node.value, node.tag.removeprefix(_TAG)
    if name == "str":
        return text
    pattern = _PATTERNS.get(node.tag)
    if pattern is None:
        raise _unknown(node)
    try:
        if pattern.match(text):
            match name:
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
                case _:
                    return float(text.replace(".", "") if text[-1:].isalpha() else text)
    except ValueError:  # Python refuses integers of more than 4,300 digits
        pass
    raise MarkedYAMLError(problem=f"{text[:40]!r} is no {name}", problem_mark=node.start_mark)


def _check_depth(level: int, mark: Mark | None) -> None:
    if level > _DEPTH:
        raise MarkedYAMLError(problem=f"values are nested deeper than {_DEPTH} levels", problem_mark=mark)


def _unknown(node: Node) -> MarkedYAMLError:
    return MarkedYAMLError(problem=f"unknown tag {node.tag!r}", problem_mark=node.start_mark)
