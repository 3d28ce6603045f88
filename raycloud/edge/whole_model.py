"""Text model of a whole model in this process."""

from __future__ import annotations

from collections.abc import Callable

from raycloud.errors import ModelError
from raycloud.models.loading import load_config, resolve
from raycloud.models.text_model import TextModel
from raycloud.models.verdict import structure_of
from raycloud.split.inference.generation import local_split_model, text_model
from raycloud.split.parts import EdgePart, load_edge
from raycloud.split.plan import PlanSet, SplitPlan


def load_whole(source: str, notify: Callable[[str], None] = lambda line: None) -> TextModel:
    """Load a whole model, such as a distilled student, as a split model without blocks in the cloud.

    Args:
        source: a directory, GGUF file, hub id or ``builtin:`` name.
        notify: called with one line before each download or conversion.

    Raises:
        ModelError: it cannot be loaded, or it is an encoder.
        FetchError: the built-in cannot be fetched.
    """
    part = load_whole_part(source, notify)
    return text_model(part, local_split_model(part))


def load_whole_part(source: str, notify: Callable[[str], None] = lambda line: None) -> EdgePart:
    """Load all blocks of a causal language model as the edge's part; see :func:`load_whole`."""
    where = resolve(source, notify)
    config = load_config(where)
    if not structure_of(config).causal:
        raise ModelError(f"'{source}' is an encoder; only a causal language model writes text")
    blocks = config.num_hidden_layers
    return load_edge(where, PlanSet.of(SplitPlan(blocks, blocks)), notify=notify)
