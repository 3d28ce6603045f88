"""Download of the signals for a device's own data: a folder of signals for all later training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from raycloud.data.batches import encode
from raycloud.data.recipe import DataRecipe
from raycloud.data.sources import Part, held_out_part, limit_rows, training_part
from raycloud.distill.signals import SignalRecipe
from raycloud.distill.signals.file import FileSignals, collect_signals, tokenizer_fingerprint
from raycloud.distill.signals.remote.client import RemoteSignals, SignalClient
from raycloud.durable import check_folder
from raycloud.errors import LinkSetupError
from raycloud.link.meter import Meter
from raycloud.link.retry_notices import with_retry_notices
from raycloud.link.websocket import SESSION_HEADER, WebSocketChannel, check_cloud
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.recipe import Recipe

_SAMPLES_PER_FILE = 64
"""Number of samples per file: at most this many are lost if the download is interrupted."""


class FetchRecipe(Recipe):
    """Signals to fetch, and the teacher to fetch them from."""

    teacher: str
    """Address of the teacher, ``wss://host/v1/signals``."""
    tokenizer: str
    """A model with the teacher's tokenizer; its weights are not read."""
    output: str
    """Output folder; signals that it already holds are kept."""
    data: DataRecipe = DataRecipe()
    split: Part = "train"
    signal: SignalRecipe = SignalRecipe(kind="topk")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Temperatures that the students will use."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds without any message after which the download fails."""


def fetch(
    recipe: FetchRecipe,
    *,
    token: str | None = None,
    certificates: str | None = None,
    meter: Meter | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    notify: Callable[[str], None] = lambda line: None,
) -> FileSignals:
    """Fill a folder with the teacher's signals for the data; a repeated call continues where the last one stopped.

    Args:
        recipe: data, teacher and kind of signal.
        token: access token of the teacher's server.
        certificates: a file of certificates to trust instead of the system's.
        meter: counts the bytes that cross the link.
        on_progress: called with the number of samples done and the total.
        notify: called with one line before each download, and while nobody answers at the address.

    Raises:
        LinkError: the teacher cannot be reached, refuses, or uses another tokenizer.
        DataError: no data, or the folder holds signals of another source.
    """
    check_cloud(recipe.teacher, certificates)
    check_folder(Path(recipe.output))
    tokenizer, data = load_tokenizer(resolve(recipe.tokenizer, notify)), recipe.data

    def connect(session: str) -> WebSocketChannel:
        headers = {SESSION_HEADER: session}
        return WebSocketChannel(recipe.teacher, token=token, headers=headers, certificates=certificates)

    link = SignalClient(with_retry_notices(connect, notify), meter=meter, timeout_s=recipe.timeout_s)
    try:
        if link.info.tokenizer != tokenizer_fingerprint(tokenizer):
            raise LinkSetupError(
                f"tokenizer '{recipe.tokenizer}' is not the one that the teacher at {recipe.teacher} reads"
            )
        rows = training_part(data, notify) if recipe.split == "train" else held_out_part(data, recipe.split, notify)
        limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        samples = encode(limit_rows(rows, data.limit), tokenizer, data.format, bos=data.bos, **limits)
        source = link.source(recipe.signal, recipe.temperatures)
        signals = RemoteSignals(link, source)
        for done, total in collect_signals(
            recipe.output, source, signals.signals, samples, samples_per_file=_SAMPLES_PER_FILE
        ):
            on_progress(done, total)
        return FileSignals(recipe.output, source)
    finally:
        link.close()
