"""Parts of a split model: each loads only its own tensors, from the whole checkpoint or from an exported part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.checksums import write_checksums
from raycloud.durable import check_folder, write_folder
from raycloud.errors import ModelError, ResultError
from raycloud.models.checkpoint import (
    GENERATION,
    Checkpoint,
    copy_parameters,
    empty_model,
    fingerprint_from,
    load_tensors,
)
from raycloud.models.configuration import CONFIG
from raycloud.models.devices import Device, DType
from raycloud.models.loading import load_config, load_tokenizer, pick_device, pick_dtype, resolve
from raycloud.models.segments import Segment, set_segment_attention
from raycloud.models.self_check import check_weights
from raycloud.models.structure import pooler_of
from raycloud.models.tensor_check import match_tensors
from raycloud.models.weight_layout import optimise_decode_layout
from raycloud.split.plan import PlanSet, SplitPlan

MANIFEST = "part.json"
Attention = Literal["sdpa", "eager"]
PartSide = Literal["edge", "cloud"]


class PartManifest(BaseModel):
    """Manifest of an exported part."""

    model_config = ConfigDict(frozen=True)

    side: PartSide
    start_blocks: tuple[int, ...]
    end_blocks: tuple[int, ...]
    fingerprint: str
    """Fingerprint of the whole checkpoint it was exported from; it must be the same at both sides."""
    digests: dict[str, str]
    """Digest of every tensor of that checkpoint, to check this part's tensors and to compute the fingerprint."""
    source: str

    @property
    def plans(self) -> PlanSet:
        """Plans by which the model was cut."""
        return PlanSet(self.start_blocks, self.end_blocks)


@dataclass(frozen=True)
class EdgePart:
    """Edge's part of a model: the blocks before and after the cuts, with embedding, final norm and head."""

    first: Segment
    last: Segment
    plans: PlanSet
    fingerprint: str
    source: str
    """Directory of the tokenizer."""
    pooler: nn.Module | None = None
    """Pooler of the model family, if it has one and it was requested."""

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the whole model."""
        return self.first.config


@dataclass(frozen=True)
class CloudPart:
    """Cloud's part of a model: the blocks between the cuts."""

    middle: Segment
    plans: PlanSet
    fingerprint: str
    last: Segment | None = None
    """Segment after the last block, if it was requested."""
    pooler: nn.Module | None = None
    """Pooler of the model family, if it has one and ``last`` was requested."""

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the whole model."""
        return self.middle.config


@dataclass(frozen=True)
class SplittableModel:
    """Model in one process that can be cut at any block, repeatedly: its parts share its weights."""

    model: PreTrainedModel
    fingerprint: str
    source: str
    """Directory of the tokenizer."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.model.config.num_hidden_layers)

    def edge(self, plans: PlanSet) -> EdgePart:
        """Edge's part for these plans; raises ModelError if the model cannot be cut so."""
        first, last = _segments(self.model, plans.check(self.blocks), "edge")
        return EdgePart(first, last, plans, self.fingerprint, self.source)

    def cloud(self, plans: PlanSet) -> CloudPart:
        """Cloud's part for these plans; raises ModelError if the model cannot be cut so."""
        [middle] = _segments(self.model, plans.check(self.blocks), "cloud")
        return CloudPart(middle, plans, self.fingerprint)


def manifest_of(source: str) -> PartManifest | None:
    """Manifest of an exported part; None for a whole model.

    Raises:
        ModelError: the manifest is damaged.
    """
    path = Path(source) / MANIFEST
    if not path.is_file():
        return None
    try:
        return PartManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"damaged {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def fingerprint_of(source: str, notify: Callable[[str], None] = lambda line: None) -> str:
    """Fingerprint of a model's checkpoint, or of the whole checkpoint that an exported part was made from.

    Raises:
        ModelError: the model cannot be read.
    """
    where = resolve(source, notify)
    manifest = manifest_of(where)
    return Checkpoint(where).fingerprint if manifest is None else manifest.fingerprint


def load_edge(
    source: str,
    plans: PlanSet | None = None,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Attention = "sdpa",
    training: bool = False,
    pooler: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> EdgePart:
    """Load the edge's part of a model.

    Args:
        source: a whole model (see :func:`raycloud.models.loading.resolve`) or an exported ``edge`` directory.
        plans: plans of the cuts; None for those of the export.
        device: device of the parameters.
        dtype: dtype of the parameters.
        attention: attention implementation of ``transformers``.
        training: keep the library's weight layout, with a private copy of the parameters.
        pooler: also load the pooler of the model family, if it has one.
        notify: called with one line before each download or conversion.

    Raises:
        ModelError: the model cannot be read, does not hold these blocks, or cannot be cut so.
    """
    found = _open_source(source, plans, "edge", notify)
    model, place = found.skeleton(device, dtype, attention)
    first, last = _segments(model, found.plans, "edge")
    behind = pooler_of(model) if pooler else None
    beside = [] if behind is None else [behind]
    found.fill(model, [first, last, *beside], place)
    _prepare([first, last], training, beside)
    return EdgePart(first, last, found.plans, found.fingerprint, found.where, behind)


def load_cloud(
    source: str,
    plans: PlanSet | None = None,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Attention = "sdpa",
    training: bool = False,
    tail: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> CloudPart:
    """Load the cloud's part of a model; see :func:`load_edge`.

    ``tail`` adds everything after the model's last block; the cloud's blocks must then extend to the end of the model.
    """
    found = _open_source(source, plans, "cloud", notify)
    plans, blocks = found.plans, found.config.num_hidden_layers
    model, place = found.skeleton(device, dtype, attention)
    [middle] = _segments(model, plans, "cloud")
    segments, last, pooler = [middle], None, None
    if tail:
        if found.manifest is not None:
            raise ModelError(
                f"'{source}' holds only the cloud's blocks, and not what follows them; allowed: a whole model"
            )
        if plans.cloud.stop != blocks:
            raise ModelError(f"blocks [{plans.cloud.start}, {plans.cloud.stop}) of '{source}' do not lead to its end")
        last, pooler = Segment(model, plans.cloud.stop, embed=False), pooler_of(model)
        segments.append(last)
    beside = [] if pooler is None else [pooler]
    found.fill(model, [*segments, *beside], place)
    _prepare(segments, training, beside)
    return CloudPart(middle, plans, found.fingerprint, last, pooler)


def _prepare(segments: list[Segment], training: bool, beside: Sequence[nn.Module] = ()) -> None:
    if not training:
        optimise_decode_layout(segments)
        return
    copy_parameters([*segments, *beside])


def load_splittable(
    source: str,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Attention = "sdpa",
    notify: Callable[[str], None] = lambda line: None,
) -> SplittableModel:
    """Load a whole model to be cut in this process, with parts as :func:`load_edge` and :func:`load_cloud` load them.

    Raises:
        ModelError: the model cannot be read, or is an exported part.
    """
    found = _open_source(source, PlanSet.of(SplitPlan(0, 0)), None, notify)
    model, place = found.skeleton(device, dtype, attention)
    everything = [Segment(model)]
    found.fill(model, everything, place)
    check_weights(model, everything[0].structure)
    optimise_decode_layout(everything)
    return SplittableModel(model, found.fingerprint, found.where)


def edge_bytes(config: PretrainedConfig, plans: PlanSet, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the edge's weights, computed from the configuration alone; tied weights count once.

    Raises:
        ModelError: a model of this configuration cannot be cut so.
    """
    plans.check(config.num_hidden_layers)
    model = empty_model(config, dtype=dtype, attention="sdpa", device=torch.device("cpu"))
    kept = {id(tensor): tensor for segment in _segments(model, plans, "edge") for tensor in segment.parameters()}
    return sum(tensor.nbytes for tensor in kept.values())


def export(
    source: str,
    plans: PlanSet,
    out: Path,
    *,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Write the directories ``edge`` and ``cloud`` with only their own tensors; only ``edge`` gets the tokenizer.

    Returns:
        Bytes of tensors per side.

    Raises:
        ModelError: the model cannot be read or cut so, or has no tokenizer.
        StorageError: the parent folder of ``out`` is not writable.
        ResultError: ``out`` exists and ``overwrite`` is not given, or it holds anything but exported parts.
    """
    if out.exists() and not overwrite:
        raise ResultError(f"'{out}' exists; give --overwrite to replace it, or another --out")
    if out.exists() and not out.is_symlink() and not (out / "edge" / MANIFEST).is_file():
        raise ResultError(f"'{out}' holds no exported parts; it is not overwritten")
    check_folder(out.parent)
    found = _open_source(source, plans, None, notify)
    checkpoint, tokenizer = found.checkpoint, load_tokenizer(found.where)
    sides: tuple[PartSide, ...] = ("edge", "cloud")
    sizes: dict[str, int] = dict.fromkeys(sides, 0)

    def stored_of(side: PartSide) -> list[str]:
        model, _ = found.skeleton("cpu", "auto", "sdpa")
        sources = match_tensors(model, checkpoint, _segments(model, plans, side))
        return sorted({stored for source in sources.values() for stored in source.stored})

    wanted = {side: stored_of(side) for side in sides}  # errors in the model are found before anything is written

    def fill(folder: Path) -> None:
        for side in sides:
            notify(f"writing {out / side}")
            tensors = {stored: checkpoint.tensor(stored) for stored in wanted[side]}
            sizes[side] = sum(tensor.nbytes for tensor in tensors.values())
            part = folder / side
            part.mkdir()
            save_torch_state_dict(tensors, part, max_shard_size="2GB")
            # The configuration as it is: it is part of the fingerprint.
            for name in (CONFIG, GENERATION):
                if (path := checkpoint.path(name)) is not None:
                    shutil.copyfile(path, part / name)
            manifest = PartManifest(
                side=side,
                start_blocks=plans.start_blocks,
                end_blocks=plans.end_blocks,
                fingerprint=found.fingerprint,
                digests=checkpoint.digests,
                source=source,
            )
            (part / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        tokenizer.save_pretrained(folder / "edge")
        for side in sides:  # each is copied to a different machine
            write_checksums(folder / side)

    write_folder(out, fill)
    return sizes


@dataclass(frozen=True)
class _PartSource:
    """Whole model or exported part that is checked and not yet loaded."""

    where: str
    plans: PlanSet
    config: PretrainedConfig
    checkpoint: Checkpoint
    manifest: PartManifest | None
    fingerprint: str

    def skeleton(self, device: Device, dtype: DType, attention: Attention) -> tuple[PreTrainedModel, torch.device]:
        place = pick_device(device)
        names = self.checkpoint.tensors if self.manifest is None else self.manifest.digests
        kind = pick_dtype(dtype, place)
        model = empty_model(self.config, dtype=kind, attention=attention, device=place, names=names)
        set_segment_attention(model)
        return model, place

    def fill(self, model: PreTrainedModel, modules: Sequence[nn.Module], place: torch.device) -> None:
        whole = None if self.manifest is None else self.manifest.digests
        load_tensors(model, match_tensors(model, self.checkpoint, modules, whole=whole), self.checkpoint, place)


def _open_source(
    source: str, plans: PlanSet | None, side: PartSide | None, notify: Callable[[str], None]
) -> _PartSource:
    where = resolve(source, notify)
    config, checkpoint, manifest = load_config(where), Checkpoint(where), manifest_of(where)
    if manifest is not None and manifest.side != side:
        raise ModelError(
            f"'{source}' is the {manifest.side} part of a model, not " + (f"the {side}'s" if side else "a whole one")
        )
    if plans is None:
        if manifest is None:
            raise ModelError(f"'{source}' is a whole model: say where to cut it (start_block and end_block)")
        plans = manifest.plans
    plans.check(config.num_hidden_layers)
    fingerprint = checkpoint.fingerprint if manifest is None else _verified_fingerprint(manifest, checkpoint)
    return _PartSource(where, plans, config, checkpoint, manifest, fingerprint)


def _verified_fingerprint(manifest: PartManifest, checkpoint: Checkpoint) -> str:
    """Fingerprint of the whole checkpoint, after this part's tensors were compared with its digests."""
    for name, digest in checkpoint.digests.items():
        if manifest.digests.get(name) != digest:
            raise ModelError(f"'{checkpoint.source}': '{name}' is not the tensor that was exported; export it again")
    if fingerprint_from(checkpoint.config, manifest.digests) != manifest.fingerprint:
        raise ModelError(f"'{checkpoint.source}': {CONFIG} or {MANIFEST} was changed; export it again")
    return manifest.fingerprint


def _segments(model: PreTrainedModel, plans: PlanSet, side: PartSide) -> list[Segment]:
    if side == "cloud":
        return [Segment(model, plans.cloud.start, plans.cloud.stop, embed=False, head=False)]
    ahead, behind = plans.edge(model.config.num_hidden_layers)
    return [
        Segment(model, 0, ahead.stop, embed=True, head=False),
        Segment(model, behind.start, behind.stop, embed=False, head=True),
    ]
