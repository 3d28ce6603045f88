"""Folder of calibrations with a file for each cut, so that a search fits the codecs of each cut only once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from raycloud.data.batches import Sample
from raycloud.errors import ModelError
from raycloud.split.calibration import Calibration, calibrate

Texts = Callable[[], Sequence[Sample]]


def calibration_for(
    model: PreTrainedModel, known: str, cuts: Iterable[int], texts: Texts, folder: Path | None
) -> Calibration:
    """Calibration of some cuts of a model; cuts missing in the folder are calibrated and saved there.

    Args:
        model: the whole model.
        known: fingerprint of its weights.
        cuts: cuts, at least one.
        texts: reads the calibration texts; called only if a cut is missing.
        folder: folder of files ``cut-<n>.safetensors``; None saves nothing.

    Raises:
        ModelError: a file in the folder is damaged or of other weights, or the model has no such cut.
        DataError: there is too little text.
    """
    wanted = sorted(set(cuts))
    paths = {cut: folder / f"cut-{cut}.safetensors" for cut in wanted} if folder is not None else {}
    found = {cut: Calibration.load(path) for cut, path in paths.items() if path.is_file()}
    for cut, one in found.items():
        if one.model != known or one.cuts != (cut,):
            raise ModelError(f"'{paths[cut]}' is not of cut {cut} of this model; remove it, or name another folder")
    missing = [cut for cut in wanted if cut not in found]
    if missing:
        made = calibrate(model, texts(), missing)
        for cut in missing:
            found[cut] = Calibration(made.model, made.rotation, {cut: made.fitted[cut]})
            if cut in paths:
                found[cut].save(paths[cut])
    fitted = {cut: one.fitted[cut] for cut, one in found.items()}
    return Calibration(known, found[wanted[0]].rotation, fitted)
