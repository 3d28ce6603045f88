"""raycloud gets a large language model from your cloud to your edges, and keeps it good there.

The names in ``__all__`` are the Python API. They load when first used: ``import raycloud`` imports neither torch nor
ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycloud.edge.split_model import SplitModel
    from raycloud.jobs.python_api import run
    from raycloud.jobs.registry import Result
    from raycloud.models.loading import load
    from raycloud.models.segments import Segment

__version__ = "0.1.0"

__all__ = ["Result", "Segment", "SplitModel", "load", "run"]

_MODULES = {
    "Result": "raycloud.jobs.registry",
    "Segment": "raycloud.models.segments",
    "SplitModel": "raycloud.edge.split_model",
    "load": "raycloud.models.loading",
    "run": "raycloud.jobs.python_api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'raycloud' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
