"""Tool calls in the text that a model generates."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """Tool call: the name of the function, and its arguments as a JSON string."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


def uses_tool_call_tags(template: str) -> bool:
    """Return whether a chat template uses the format that :class:`CallReader` reads (Hermes, Qwen, SmolLM 3)."""
    return _OPEN in template and _CLOSE in template


class CallReader:
    """Filter that passes text up to the first ``<tool_call>`` and parses the calls after it."""

    def __init__(self) -> None:
        self._held, self._calling = "", False

    def push(self, text: str) -> str:
        """Append text and return the new part that does not belong to a call."""
        self._held += text
        if self._calling:
            return ""
        at = self._held.find(_OPEN)
        self._calling = at >= 0
        if not self._calling:
            longest = min(len(_OPEN) - 1, len(self._held))
            at = len(self._held) - next((n for n in range(longest, 0, -1) if _OPEN.startswith(self._held[-n:])), 0)
        through, self._held = self._held[:at], self._held[at:]
        return through

    def flush(self) -> tuple[str, tuple[Call, ...]]:
        """Return the rest when no more text follows: text that turned out to be no call, and the calls."""
        calls = _calls(self._held) if self._calling else None
        return (self._held, ()) if calls is None else ("", calls)


def _calls(text: str) -> tuple[Call, ...] | None:
    """Calls that a text consists of; None if it contains anything else."""
    calls = []
    for part in text.split(_OPEN)[1:]:
        try:
            said = json.loads(part.strip().removesuffix(_CLOSE))
            calls.append(Call(said["name"], json.dumps(said.get("arguments") or {}, ensure_ascii=False)))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return tuple(calls) if all(isinstance(call.name, str) for call in calls) else None
