"""``raycloud privacy``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson
from raycloud.errors import RecipeError, ResultError


def privacy(
    model: Annotated[str, typer.Option(help="A hub id, a directory, a .gguf file or a builtin: name.")],
    first: Annotated[int, typer.Option(help="The first block in the cloud.")],
    second: Annotated[int, typer.Option(help="The first block after those that the cloud runs.")],
    codec: Annotated[str, typer.Option(help="What rows cross the wire as.")] = "float32",
    calibration: Annotated[
        Path | None, typer.Option(help="Of 'raycloud split calibrate', for int8, int4 and low rank.")
    ] = None,
    data: Annotated[str, typer.Option(help="Attackers learn from its train split; its test split is attacked.")] = (
        "builtin:instruct"
    ),
    texts: Annotated[int, typer.Option(min=1, help="Sessions under attack.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the texts and the attacks.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A new folder for numbers, plot and page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a curious cloud reads from the rows of a split model, prompt and answer."""
    from raycloud.evaluation.privacy.examination import examine
    from raycloud.link.codecs import CODECS
    from raycloud.models.loading import load
    from raycloud.report.console import console, working
    from raycloud.report.privacy import print_privacy, write_privacy
    from raycloud.split.calibration import Calibration
    from raycloud.split.terms import CODEC_NUMBERS, Codecs

    if codec not in CODEC_NUMBERS:
        raise RecipeError(f"codec: no codec '{codec}'; allowed: {', '.join(CODEC_NUMBERS)}")
    if calibration is None and codec not in CODECS:
        raise RecipeError(f"codec: '{codec}' needs --calibration, a file of 'raycloud split calibrate'")
    if out is not None and out.exists() and (out.is_file() or any(out.iterdir())):
        raise ResultError(f"out: '{out}' exists already; name a new folder")
    with working("model loaded"):
        pretrained = load(model, notify=console.print)
    width = pretrained.model.config.get_text_config().hidden_size
    codecs = Codecs(width, Calibration.load(calibration).check(width, {first, second}) if calibration else None)
    up, down = (codecs.boundary(codec, cut) for cut in (first, second))
    found = examine(pretrained, first, second, up=up, down=down, source=data, texts=texts, seed=seed, stage=working)
    asked = {"model": model, "codec": codec, "data": data, "texts": texts, "seed": seed}
    summary = {**asked, **found.summary()}
    print_privacy(summary)
    if out is not None:
        write_privacy(out, summary)
        console.print(f"results: {out}")
    if as_json:
        print(json.dumps(summary), flush=True)
