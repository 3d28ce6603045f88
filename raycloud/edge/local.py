"""A whole model in this process, ready to write text."""

from __future__ import annotations

from collections.abc import Callable

from raycloud.errors import ModelError
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.text import TextModel, end_ids
from raycloud.split.generation import SplitModel
from raycloud.split.middle import LocalMiddle, middle_state
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
    loaded = load(source, notify=notify)
    model = loaded.model
    everything = Segment(model)
    if not everything.anatomy.causal:
        raise ModelError(f"'{source}' is an encoder; only a causal language model writes text")
    blocks = everything.hi
    plans = PlanSet.of(SplitPlan(blocks, blocks))
    nothing = Segment(model, blocks, blocks, embed=False, head=False)
    split = SplitModel(
        Segment(model, 0, blocks, head=False),
        Segment(model, blocks, blocks),
        lambda: LocalMiddle(middle_state(nothing, plans, blocks)),
        plans,
    )
    return TextModel(split, loaded.tokenizer, end_ids(loaded.tokenizer, model.config, model.generation_config))
