"""Description of a split fine-tuning for one of its devices, as the service of rounds sends it before the device joins:
recipe, configuration and the edge's part of the model, from which the device derives what is demanded of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from raycloud.models.loading import load_config, resolve
from raycloud.rounds.service import DeviceMember
from raycloud.split.finetune.assembly import plan_of
from raycloud.split.finetune.phase_report import PhaseReport
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.parts import export
from raycloud.split.plan import PlanSet


def device_members(recipe: SplitTuneRecipe, run: str) -> dict[str, DeviceMember]:
    """Describe a split fine-tuning for each of its devices.

    Args:
        recipe: whole recipe of the split fine-tuning.
        run: id of the run, which is also the group's name; a resumed run keeps it, and so devices keep their state.

    Raises:
        ModelError: the model cannot be cut so.
    """
    config = load_config(resolve(recipe.model))
    with tempfile.TemporaryDirectory() as path:
        parts = Path(path) / "parts"
        sizes = export(recipe.model, PlanSet.of(plan_of(recipe, config)), parts)
        blobs = {f"model/{file.name}": file.read_bytes() for file in sorted((parts / "edge").iterdir())}
    member = DeviceMember(
        recipe=recipe.for_device().model_dump_json(),
        config=config.to_json_string(use_diff=False),
        weights_bytes=sizes["edge"],
        facts={"run": run},
        blobs=blobs,
        parse_report=PhaseReport.parse,
    )
    return {edge.name: member for edge in recipe.devices}
