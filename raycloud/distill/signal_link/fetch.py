"""A device's own data, said something about by a teacher on the wire: a folder of signals for all training to come."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from pydantic import Field

from raycloud.data.batches import encode
from raycloud.data.recipe import DataRecipe
from raycloud.data.sources import Part, load_rows
from raycloud.data.splits import spread
from raycloud.distill.signal_file import FileSignals, gathering, tokenizer_fingerprint
from raycloud.distill.signal_link.edge import LinkSignals, TeacherLink
from raycloud.distill.signals import SignalRecipe
from raycloud.errors import LinkError
from raycloud.link.meter import Meter
from raycloud.link.websocket import WebSocketChannel
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.recipe import Recipe

_PART = 64
"""Samples of one file: what is lost at most when it is interrupted."""


class FetchRecipe(Recipe):
    """Which signals to fetch, and where from."""

    teacher: str
    """Where it answers, ``wss://host/v1/signals``."""
    tokenizer: str
    """A model with the teacher's tokenizer; its weights are not read."""
    output: str
    """The folder; what is there already is kept."""
    data: DataRecipe = DataRecipe()
    split: Part = "train"
    signal: SignalRecipe = SignalRecipe(kind="topk")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """The students' own."""
    timeout_s: float = Field(300.0, gt=0)
    """How long nothing may come back."""


def fetch(
    recipe: FetchRecipe,
    *,
    token: str | None = None,
    certificates: str | None = None,
    meter: Meter | None = None,
    moved: Callable[[int, int], None] = lambda done, total: None,
    notify: Callable[[str], None] = lambda line: None,
) -> FileSignals:
    """Fill a folder with what the teacher says of the data; a second call goes on where the first one was stopped.

    Args:
        recipe: what and where from.
        token: what the teacher asks for.
        certificates: a file of certificates to trust instead of the system's.
        meter: counts what crosses.
        moved: told how many of how many samples are there.
        notify: told one line before each download.

    Raises:
        LinkError: the teacher cannot be reached, refuses, or reads another tokenizer's ids.
        DataError: no data, or the folder holds signals of something else.
    """
    tokenizer, data = load_tokenizer(resolve(recipe.tokenizer, notify)), recipe.data
    rows = load_rows(data.source, recipe.split, notify)
    rows = [rows[place] for place in spread(len(rows), data.limit)]
    samples = encode(rows, tokenizer, data.format, max_length=data.max_length, max_prompt=data.max_prompt)
    connect = partial(WebSocketChannel, recipe.teacher, token=token, certificates=certificates)
    link = TeacherLink(connect, meter=meter, timeout_s=recipe.timeout_s)
    try:
        if link.offer.tokenizer != tokenizer_fingerprint(tokenizer):
            raise LinkError(f"tokenizer '{recipe.tokenizer}' is not the one that the teacher at {recipe.teacher} reads")
        origin = link.origin(recipe.signal, recipe.temperatures)
        signals = LinkSignals(link, origin)
        for done, total in gathering(recipe.output, origin, signals.signals, samples, part=_PART):
            moved(done, total)
        return FileSignals(recipe.output, origin)
    finally:
        link.close()
