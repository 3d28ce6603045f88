"""``raycloud split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli import split_plan
from raycloud.cli.options import AsJson, Out, Overwrite, print_json, read_recipe
from raycloud.errors import ResultError

app = typer.Typer(help="Split a model between edge and cloud.", no_args_is_help=True)
app.command("plan")(split_plan.plan)


@app.command("export")
def export(
    model: Annotated[str, typer.Option(help="A directory, GGUF file, hub id or builtin: name.")],
    start_block: Annotated[int, typer.Option(help="The first block that the cloud runs.")],
    end_block: Annotated[int, typer.Option(help="The first block after those that the cloud runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the directories edge and cloud.")] = Path("parts"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the edge part and the cloud part of a model as two directories, each with only its own tensors."""
    from raycloud.report.console import console
    from raycloud.split.parts import export
    from raycloud.split.plan import PlanSet, SplitPlan

    sizes = export(model, PlanSet.of(SplitPlan(start_block, end_block)), out, overwrite=overwrite, notify=console.print)
    for side, size in sizes.items():
        console.print(f"{out / side}: {size / 1e6:,.1f} MB of tensors")
    print_json(as_json, {"out": str(out), "tensor_bytes": sizes})


@app.command("calibrate")
def calibrate(
    model: Annotated[str, typer.Option(help="A directory, GGUF file, hub id or builtin: name.")],
    start_block: Annotated[int, typer.Option(help="The first block that the cloud runs.")],
    end_block: Annotated[int, typer.Option(help="The first block after those that the cloud runs.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("calibration.safetensors"),
    data: Annotated[list[str] | None, typer.Option(help="Texts to calibrate on; may be given several times.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fit the quantising codecs to the hidden states of a model at its cuts."""
    from raycloud.durable import check_file
    from raycloud.link.codecs.fitting import FITTED
    from raycloud.models.loading import load, load_config, resolve
    from raycloud.report.console import console, progress_bars
    from raycloud.report.table import print_table
    from raycloud.split.calibration import CALIBRATION_TOKENS, calibrate
    from raycloud.split.calibration_texts import load_calibration_texts
    from raycloud.split.plan import SplitPlan

    check_file(out)
    plan = SplitPlan(start_block, end_block)
    if out.is_file() and not overwrite:
        raise ResultError(f"'{out}' exists; pass --overwrite to replace it, or name another file with --out")
    plan.check(load_config(resolve(model, console.print)).num_hidden_layers)
    pretrained = load(model, notify=console.print)
    sources = data or ["builtin:instruct", "builtin:reviews"]
    texts = load_calibration_texts(sources, "train", pretrained.tokenizer, CALIBRATION_TOKENS, console.print)
    cuts = {plan.start_block, plan.end_block}
    with progress_bars(len(cuts)) as shown:
        made = calibrate(pretrained.model, texts, cuts, progress=lambda done: shown.move("cuts", done))
    made.save(out)
    rows = []
    for cut in made.cuts:
        choices = made.fitted[cut].choices
        for name in FITTED:
            codec = made.cut_codec(name, cut)
            size = codec.codec.bytes_per_row(codec.width)
            error = f"{choices.errors[name]:.4f}"
            rows.append([f"{cut} {name}", str(size), f"{size / codec.width:.3f}", error, str(choices.first)])
    summary = {"out": str(out), "fingerprint": made.fingerprint, "cuts": made.cuts}
    header = ["cut and codec", "bytes per hidden state", "per element", "relative error", "first positions in bfloat16"]
    print_table(header, rows, title=f"{out}, fingerprint {made.fingerprint[:16]}")
    print_json(as_json, summary)


@app.command("evaluate")
def evaluate(
    recipe: Annotated[Path, typer.Option(help="The recipe, a YAML file, such as a search leaves for every trial.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as codec=int4.")] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure a split plan: perplexity, bytes and time per token over a slow link, memory at the edge."""
    from raycloud.jobs.registry import JOBS
    from raycloud.report.console import console
    from raycloud.report.table import print_table
    from raycloud.split.recipe import SplitEvaluateRecipe

    checked = read_recipe(SplitEvaluateRecipe, recipe, overrides, out)
    summary = JOBS["split_evaluate"].run(checked, "overwrite" if overwrite else "new").summary
    names = ["perplexity", "bytes_per_token", "ms_per_token", "edge_ms_per_token", "edge_mb"]
    whole = {name: summary.get(f"unsplit_{name}") for name in names}
    rows = [[name, f"{summary[name]:.5g}", "" if (of := whole[name]) is None else f"{of:.5g}"] for name in names]
    title = (
        f"blocks [{checked.start_block}, {checked.end_block}) in the cloud, {checked.codec}, {summary['tokens']} tokens"
    )
    print_table(["", "split", "all at the edge"], rows, title=title)
    console.print(f"results: {checked.output}")
    print_json(as_json, summary)
