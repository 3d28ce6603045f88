"""``raycloud privacy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, Overwrite, print_json
from raycloud.errors import RecipeError, ResultError


def privacy(
    model: Annotated[str, typer.Option(help="A directory, GGUF file, hub id or builtin: name.")],
    start_block: Annotated[int | None, typer.Option(help="The first block in the cloud.")] = None,
    end_block: Annotated[int | None, typer.Option(help="The first block after those that the cloud runs.")] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Attack the reports of drift of 'raycloud retrain' instead of a split.")
    ] = False,
    codec: Annotated[str, typer.Option(help="Codec of the hidden states on the link.")] = "float32",
    calibration: Annotated[
        Path | None, typer.Option(help="File of 'raycloud split calibrate', for int8 and int4.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set; attacks train on its train split and attack its test split. "
            "Default: builtin:instruct, or builtin:reviews with --retrain."
        ),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of sessions to attack, one per text (24); with --retrain, texts of each side (128)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of texts and of the attacks.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for numbers, plot and page; default: none.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much of prompt and answer a cloud can reconstruct from the hidden states of a split model.

    With --retrain: whether it can tell which words were in the texts of a window from a report of drift.
    """
    from raycloud.durable import check_folder
    from raycloud.evaluation.privacy.evaluation import evaluate_privacy
    from raycloud.link.codecs.registry import CODEC_NAMES, check_codec
    from raycloud.models.loading import load, load_config, resolve
    from raycloud.origin import Origin
    from raycloud.report.console import console, timed
    from raycloud.report.privacy import print_privacy, write_privacy
    from raycloud.report.runs import PRIVACY
    from raycloud.retrain.report_privacy import evaluate_report_privacy
    from raycloud.split.calibration import Calibration
    from raycloud.split.cut_codecs import CutCodecs
    from raycloud.split.plan import SplitPlan

    if retrain:
        if start_block is not None or end_block is not None or codec != "float32" or calibration is not None:
            raise RecipeError("--retrain attacks no split; allowed: no start-block, end-block, codec and calibration")
    elif start_block is None or end_block is None:
        raise RecipeError("start-block and end-block are missing; allowed: both, or --retrain")
    try:
        check_codec(codec)
    except ValueError as error:
        raise RecipeError(f"codec: {error}") from None
    if calibration is None and CODEC_NAMES[codec].calibrated:
        raise RecipeError(f"codec: '{codec}' needs --calibration, a file of 'raycloud split calibrate'")
    if out is not None and out.exists() and (out.is_file() or any(out.iterdir())):
        if not overwrite:
            raise ResultError(f"out: '{out}' exists already; pass --overwrite to replace it, or name a new folder")
        if not (out / PRIVACY).is_file():
            raise ResultError(f"out: '{out}' holds no {PRIVACY}, so it is no folder of this command; not overwritten")
    if out is not None:
        check_folder(out)
    origin = Origin.now()
    if start_block is None or end_block is None:
        data, texts = data or "builtin:reviews", texts or 128
        with timed("model loaded"):
            pretrained = load(model, notify=console.print)
        reports = evaluate_report_privacy(
            pretrained.model, pretrained.tokenizer, data=data, texts=texts, seed=seed, stage=timed
        )
        summary = {"model": model, "data": data, "texts": texts, "seed": seed, **reports.summary()}
    else:
        data, texts = data or "builtin:instruct", texts or 24
        config = load_config(resolve(model, console.print)).get_text_config()
        SplitPlan(start_block, end_block).check(config.num_hidden_layers)
        width = config.hidden_size
        codecs = CutCodecs(
            width, Calibration.load(calibration).check(width, {start_block, end_block}) if calibration else None
        )
        uplink, downlink = (codecs.cut_codec(codec, cut) for cut in (start_block, end_block))
        with timed("model loaded"):
            pretrained = load(model, notify=console.print)
        found = evaluate_privacy(
            pretrained,
            start_block,
            end_block,
            uplink=uplink,
            downlink=downlink,
            source=data,
            texts=texts,
            seed=seed,
            stage=timed,
        )
        settings = {"model": model, "codec": codec, "data": data, "texts": texts, "seed": seed}
        summary = {**settings, **found.summary()}
    print_privacy(summary)
    if out is not None:
        write_privacy(out, summary, origin)
        console.print(f"results: {out}")
    print_json(as_json, summary)
