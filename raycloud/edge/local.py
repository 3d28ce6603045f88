"""A whole model in this process, ready to write text."""

from __future__ import annotations

from collections.abc import Callable

from raycloud.errors import ModelError
from raycloud.models.anatomy import anatomy_of
from raycloud.models.loading import load_config, resolve
from raycloud.models.text import TextModel
from raycloud.split.generation import in_process, text_model
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet, SplitPlan


def whole(source: str, notify: Callable[[str], None] = lambda line: None) -> TextModel:
    """A whole model, such as a distilled student: a split that leaves the cloud nothing.

    Args:
        source: a directory, GGUF file, hub id or ``builtin:`` name.
        notify: told one line before each download or conversion.

    Raises:
        ModelError: it cannot be loaded, or it is an encoder.
        FetchError: the built-in cannot be had.
    """
    where = resolve(source, notify)
    config = load_config(where)
    if not anatomy_of(config).causal:
        raise ModelError(f"'{source}' is an encoder; only a causal language model writes text")
    blocks = config.num_hidden_layers
    part = load_edge(where, PlanSet.of(SplitPlan(blocks, blocks)), notify=notify)
    return text_model(part, in_process(part))
