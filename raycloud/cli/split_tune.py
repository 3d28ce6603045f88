"""``raycloud split-tune``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from raycloud.cli.options import (
    AsJson,
    Certificates,
    Out,
    Overwrite,
    RecipeFile,
    Resume,
    Token,
    mode_of,
    print_json,
    read_recipe,
)


def split_tune(
    recipe: RecipeFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, such as start_block=1 uplink.rank=16.")
    ] = None,
    cloud: Annotated[
        str | None,
        typer.Option(help="Address of the cloud; default: the cloud part runs here, or with `edges` on Ray."),
    ] = None,
    token: Token = None,
    certificates: Certificates = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model that is split between edge and cloud: text, labels and loss stay at the edge.

    With several edges in the recipe, they run as Ray actors; with --cloud, one of them runs in this process.
    """
    from raycloud.edge.endpoint import CloudEndpoint
    from raycloud.jobs.registry import JOBS
    from raycloud.link.meter import Meter
    from raycloud.link.retry_notices import with_retry_notices
    from raycloud.report.console import console
    from raycloud.split.finetune.device_run import run_member
    from raycloud.split.finetune.recipe import SplitTuneRecipe
    from raycloud.split.finetune.run import run

    mode, loaded = mode_of(resume, overwrite), read_recipe(SplitTuneRecipe, recipe, overrides, out)
    network = None if loaded.network is None else loaded.network.network()
    connect = None
    if cloud is not None:
        connect = with_retry_notices(
            partial(CloudEndpoint(cloud, token, certificates, network).channel, Meter()), console.print
        )
    if connect is None:
        summary = JOBS["split_tune"].run(loaded, mode).summary
    elif not loaded.edges:
        summary = run(loaded, mode, connect)
    else:
        summary = run_member(loaded, connect, mode)
    print_json(as_json, summary)
