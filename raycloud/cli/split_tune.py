"""``raycloud split-tune``."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, Overwrite, RecipeFile, mode_of, needing_ray


def split_tune(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as split=1 cut.rank=16.")] = None,
    cloud: Annotated[
        str | None, typer.Option(help="The cloud's address; if not given, its side runs here, or with `edges` on Ray.")
    ] = None,
    cloud_token: Annotated[
        str | None, typer.Option(help="The token that the cloud asks for.", envvar="RAYCLOUD_TOKEN", show_envvar=True)
    ] = None,
    certificates: Annotated[
        str | None, typer.Option(help="A file of certificates to trust instead of the system's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model that is cut between edge and cloud: text, labels and loss stay at the edge.

    A recipe with several edges runs them as actors on Ray, or with --cloud one of them in this process.
    """
    from raycloud.edge.cloud import Cloud
    from raycloud.link.meter import Meter
    from raycloud.split.finetune.device import run_edge
    from raycloud.split.finetune.recipe import SplitTuneRecipe
    from raycloud.split.finetune.run import run

    mode, loaded = mode_of(resume, overwrite), SplitTuneRecipe.load(recipe, overrides or ())
    network = None if loaded.network is None else loaded.network.network()
    connect = None if cloud is None else partial(Cloud(cloud, cloud_token, certificates, network).channel, Meter())
    if not loaded.edges:
        summary = run(loaded, mode, connect)
    elif connect is not None:
        summary = run_edge(loaded, connect, mode)
    else:
        with needing_ray("split-tune with edges"):
            from raycloud.cluster.jobs.split_tune import run as run_edges
        summary = run_edges(loaded, mode).summary
    if as_json:
        print(json.dumps(summary), flush=True)
