"""The parts of a cut model: each loads only its own tensors, from the whole checkpoint or from an exported part."""

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

from raycloud.errors import ModelError, ResultError
from raycloud.models.anatomy import pooler_of
from raycloud.models.attention import PLAIN
from raycloud.models.checkpoint import CONFIG, Checkpoint, materialise, skeleton, stored_names
from raycloud.models.layout import lay_out_for_one_row
from raycloud.models.loading import Device, DType, load_config, load_tokenizer, pick_device, pick_dtype, resolve
from raycloud.models.segments import Segment
from raycloud.results import write_folder
from raycloud.split.plan import PlanSet, SplitPlan

MANIFEST = "part.json"
Attention = Literal["sdpa", "eager"]
Side = Literal["edge", "cloud"]


class Manifest(BaseModel):
    """What an exported part says about itself."""

    model_config = ConfigDict(frozen=True)

    side: Side
    firsts: tuple[int, ...]
    seconds: tuple[int, ...]
    fingerprint: str
    """Of the whole checkpoint it was taken from: both sides' must agree."""
    source: str

    @property
    def plans(self) -> PlanSet:
        """Where the model was cut."""
        return PlanSet(self.firsts, self.seconds)


@dataclass(frozen=True)
class EdgePart:
    """The blocks before and behind the cuts, with embedding, final norm and head."""

    first: Segment
    last: Segment
    plans: PlanSet
    fingerprint: str
    source: str
    """Where the tokenizer is."""
    pooler: nn.Module | None = None
    """The family's own, if it has one and it was asked for."""

    @property
    def config(self) -> PretrainedConfig:
        """Of the whole model."""
        return self.first.config


@dataclass(frozen=True)
class CloudPart:
    """The blocks between the cuts."""

    middle: Segment
    plans: PlanSet
    fingerprint: str
    last: Segment | None = None
    """What follows the last block, if it was asked for."""
    pooler: nn.Module | None = None
    """The family's own likewise, if it has one."""

    @property
    def config(self) -> PretrainedConfig:
        """Of the whole model."""
        return self.middle.config


@dataclass(frozen=True)
class Whole:
    """A model in one process that can be cut anywhere, over and over: its parts share its weights."""

    model: PreTrainedModel
    fingerprint: str
    source: str
    """Where the tokenizer is."""

    @property
    def blocks(self) -> int:
        """How many it has."""
        return int(self.model.config.num_hidden_layers)

    def edge(self, plans: PlanSet) -> EdgePart:
        """The edge's part; ModelError if the model cannot be cut so."""
        first, last = _segments(self.model, plans.check(self.blocks), "edge")
        return EdgePart(first, last, plans, self.fingerprint, self.source)

    def cloud(self, plans: PlanSet) -> CloudPart:
        """The cloud's part; ModelError if the model cannot be cut so."""
        [middle] = _segments(self.model, plans.check(self.blocks), "cloud")
        return CloudPart(middle, plans, self.fingerprint)


def manifest_of(source: str) -> Manifest | None:
    """The manifest in an exported part; None for a whole model.

    Raises:
        ModelError: it is damaged.
    """
    path = Path(source) / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ModelError(f"damaged {path}: {error.errors()[0]['msg']}") from error


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
    """The edge's part of a model.

    Args:
        source: a whole model (see :func:`raycloud.models.loading.resolve`) or an exported ``edge`` directory.
        plans: where it is cut; None for where it was cut when it was exported.
        device: where to put it.
        dtype: the parameters' type.
        attention: the attention implementation of ``transformers``.
        training: leaves the weights laid out as the library has them, in memory of their own.
        pooler: load the family's own as well, if it has one.
        notify: told one line before each download or conversion.

    Raises:
        ModelError: it cannot be read, does not hold these blocks, or cannot be cut so.
    """
    where, plans, fingerprint, checkpoint, config = _source(source, plans, "edge", notify)
    model, place = _skeleton(config, device, dtype, attention)
    first, last = _segments(model, plans, "edge")
    behind = pooler_of(model) if pooler else None
    beside = [] if behind is None else [behind]
    materialise(model, [first, last, *beside], checkpoint, place)
    _ready([first, last], training, beside)
    return EdgePart(first, last, plans, fingerprint, where, behind)


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
    """The cloud's part of a model; see :func:`load_edge`.

    With ``tail`` it has what follows the model's last block as well; its own must lead there.
    """
    where, plans, fingerprint, checkpoint, config = _source(source, plans, "cloud", notify)
    model, place = _skeleton(config, device, dtype, attention)
    [middle] = _segments(model, plans, "cloud")
    segments, last, pooler = [middle], None, None
    if tail:
        if manifest_of(where) is not None:
            raise ModelError(
                f"'{source}' holds only the cloud's blocks, and not what follows them; allowed: a whole model"
            )
        if plans.cloud.stop != config.num_hidden_layers:
            raise ModelError(f"blocks [{plans.cloud.start}, {plans.cloud.stop}) of '{source}' do not lead to its end")
        last, pooler = Segment(model, plans.cloud.stop, embed=False), pooler_of(model)
        segments.append(last)
    beside = [] if pooler is None else [pooler]
    materialise(model, [*segments, *beside], checkpoint, place)
    _ready(segments, training, beside)
    return CloudPart(middle, plans, fingerprint, last, pooler)


def _ready(segments: list[Segment], training: bool, beside: Sequence[nn.Module] = ()) -> None:
    if not training:
        lay_out_for_one_row(segments)
        return
    for module in (*segments, *beside):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # they may be the file's pages


def load_whole(
    source: str,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Attention = "sdpa",
    notify: Callable[[str], None] = lambda line: None,
) -> Whole:
    """A whole model to be cut in this process, as :func:`load_edge` and :func:`load_cloud` would load its parts.

    Raises:
        ModelError: it cannot be read, or is a part already.
    """
    where, _, fingerprint, checkpoint, config = _source(source, PlanSet.of(SplitPlan(0, 0)), None, notify)
    model, place = _skeleton(config, device, dtype, attention)
    everything = [Segment(model)]
    materialise(model, everything, checkpoint, place)
    lay_out_for_one_row(everything)
    return Whole(model, fingerprint, where)


def edge_bytes(config: PretrainedConfig, plans: PlanSet, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the weights that the edge keeps, told from the configuration alone; tied ones count once.

    Raises:
        ModelError: a model of this configuration cannot be cut so.
    """
    plans.check(config.num_hidden_layers)
    model = skeleton(config, dtype=dtype, attention="sdpa", device=torch.device("cpu"))
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
    """Write the directories ``edge`` and ``cloud`` with only their own tensors; the tokenizer goes to the edge alone.

    Returns:
        Bytes of tensors per side.

    Raises:
        ModelError: the model cannot be read or cut so.
        ResultError: ``out`` exists and ``overwrite`` is not given.
    """
    if out.exists() and not overwrite:
        raise ResultError(f"'{out}' exists; give --overwrite to replace it, or another --out")
    where, plans, fingerprint, checkpoint, config = _source(source, plans, None, notify)
    sides: tuple[Side, ...] = ("edge", "cloud")
    sizes: dict[str, int] = dict.fromkeys(sides, 0)

    def fill(folder: Path) -> None:
        for side in sides:
            notify(f"writing {out / side}")
            model, _ = _skeleton(config, "cpu", "auto", "sdpa")
            names = stored_names(model, _segments(model, plans, side), checkpoint)
            tensors = {stored: checkpoint.tensor(stored) for stored in sorted(set(names.values()))}
            sizes[side] = sum(tensor.nbytes for tensor in tensors.values())
            part = folder / side
            part.mkdir()
            save_torch_state_dict(tensors, part, max_shard_size="2GB")
            # The configuration as it is: it is part of the fingerprint.
            for name in (CONFIG, "generation_config.json"):
                if (path := checkpoint.path(name)) is not None:
                    shutil.copyfile(path, part / name)
            manifest = Manifest(
                side=side, firsts=plans.firsts, seconds=plans.seconds, fingerprint=fingerprint, source=source
            )
            (part / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        load_tokenizer(where).save_pretrained(folder / "edge")

    write_folder(out, fill)
    return sizes


def _source(
    source: str, plans: PlanSet | None, side: Side | None, notify: Callable[[str], None]
) -> tuple[str, PlanSet, str, Checkpoint, PretrainedConfig]:
    where = resolve(source, notify)
    config, checkpoint, manifest = load_config(where), Checkpoint(where), manifest_of(where)
    if manifest is not None and manifest.side != side:
        raise ModelError(
            f"'{source}' is the {manifest.side} part of a model, not " + (f"the {side}'s" if side else "a whole one")
        )
    if plans is None:
        if manifest is None:
            raise ModelError(f"'{source}' is a whole model: say where to cut it (first and second)")
        plans = manifest.plans
    plans.check(config.num_hidden_layers)
    return where, plans, manifest.fingerprint if manifest else checkpoint.fingerprint, checkpoint, config


def _skeleton(
    config: PretrainedConfig, device: Device, dtype: DType, attention: Attention
) -> tuple[PreTrainedModel, torch.device]:
    place = pick_device(device)
    model = skeleton(config, dtype=pick_dtype(dtype, place), attention=attention, device=place)
    if attention == "sdpa":
        model.set_attn_implementation(PLAIN)
    return model, place


def _segments(model: PreTrainedModel, plans: PlanSet, side: Side) -> list[Segment]:
    if side == "cloud":
        return [Segment(model, plans.cloud.start, plans.cloud.stop, embed=False, head=False)]
    ahead, behind = plans.edge(model.config.num_hidden_layers)
    return [
        Segment(model, 0, ahead.stop, embed=True, head=False),
        Segment(model, behind.start, behind.stop, embed=False, head=True),
    ]
