"""Stored tensors that each tensor of a model is made of, by the library's own conversion mapping.

``transformers`` renames, fuses and splits tensors when it loads a checkpoint: the experts of a mixture are stored one
by one and run as one tensor, for example. Names are matched here by its functions, and tensors are converted by its
operations, one target at a time, so that a part of a model can be loaded from its own stored tensors alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

Shape = tuple[int, ...]
_LANGUAGE_SIDE = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")
"""Prefix of the text model's tensors in multimodal checkpoints, as saved by releases of the library before and now."""
_BARE_SIDE = re.compile(r"^model\.(?:embed_tokens|layers|norm)\.|^lm_head\.")
"""Names without such a prefix: those of the head, and in Qwen2-VL's checkpoints those of the text model too."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """Conversion of stored tensors into a tensor of a model, or into several by a converter that splits."""

    target: str
    """Name in the model; of the first tensor, if there are several."""
    stored: tuple[str, ...]
    """Stored names, in the order of the library."""
    patterns: tuple[str, ...] = ()
    """Pattern of the converter that each stored name matches."""
    renamed: tuple[str, ...] = ()
    """Stored names after the library's renamings, as the converter knows them."""
    converter: WeightConverter | None = field(default=None, repr=False)
    """Converter of the library; None for a stored tensor that is the model's as it is."""

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Make the model's tensors, by name.

        Args:
            model: the model; of its tensors only shapes are used.
            read: gives a stored tensor by name, in the type that the model's tensor has.
        """
        if self.converter is None:
            return {self.target: read(self.stored[0])}
        converter: Any = copy.deepcopy(self.converter)
        for name, pattern in zip(self.stored, self.patterns, strict=True):
            # The library calls what it collected, and so holds no tensor longer than its operations need it.
            converter.add_tensor(self.target, name, pattern, partial(read, name))
        return _converted(converter, self.target, model)

    def expected(self, model: PreTrainedModel, empty: Tensor) -> dict[str, Shape] | None:
        """Names, after renamings, and shapes of the stored tensors that the library would write for a model's tensor.

        Args:
            model: the model.
            empty: its tensor named :attr:`target`, on the meta device.

        Returns:
            None if the converter has several targets or the library has no way back.
        """
        if self.converter is None or len(self.converter.target_patterns) != 1:
            return None
        try:
            back: Any = self.converter.reverse_transform()
            name, pattern = apply_converters(self.target, [back])
            if pattern is None:
                return None
            back.add_tensor(name, self.target, pattern, empty)
            return {name: tuple(one.shape) for name, one in _converted(back, name, model).items()}
        except (NotImplementedError, ValueError):
            return None


def _converted(converter: Any, name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    made = converter.convert(name, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


@dataclass(frozen=True)
class TensorSource:
    """Source of a tensor of a model: the conversion that makes it, and its name among the tensors that it makes.

    The name differs from the tensor's own where two tensors are tied, and only one of them is stored.
    """

    conversion: Conversion
    name: str

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return self.conversion.stored


def find_conversions(
    model: PreTrainedModel,
    saved: Mapping[str, Tensor],
    names: Iterable[str],
    mapping: list[WeightTransform] | None = None,
) -> tuple[list[Conversion], list[str]]:
    """Find the conversions that make a model's tensors of stored ones, by the library's mapping for the model.

    Args:
        model: the model.
        saved: its parameters and saved buffers.
        names: names of all tensors of the whole checkpoint.
        mapping: the library's mapping for another format of files; that of safetensors files if None.

    Returns:
        The conversions, and the names that have no place in the model.
    """
    renamings, converters = _split(get_model_conversion_mapping(model) if mapping is None else mapping)
    owners = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, meta = model.base_model_prefix, dict(saved)
    plain, unplaced = dict[str, str](), list[str]()
    collected: dict[str, tuple[WeightConverter, list[tuple[str, str, str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target not in meta or target in plain or (pattern is None and target in collected):
            unplaced.append(name)
        elif pattern is None:
            plain[target] = name
        else:
            converter, found = collected.setdefault(target, (owners[pattern], []))
            if converter is owners[pattern]:
                found.append((name, pattern, _bare(apply_renamings(name, renamings), prefix)))
            else:  # the same tensor in a second format
                unplaced.append(name)
    conversions = [Conversion(target, (name,)) for target, name in plain.items()]
    for target, (converter, found) in collected.items():
        stored, patterns, renamed = zip(*found, strict=True)
        conversions.append(Conversion(target, stored, patterns, renamed, converter))
    return conversions, unplaced


def is_language_side(name: str) -> bool:
    """Return whether a stored tensor of a multimodal model is of its text model or head."""
    return _LANGUAGE_SIDE.match(name) is not None or _BARE_SIDE.match(name) is not None


def language_side_mapping(model: PreTrainedModel) -> list[WeightTransform]:
    """Mapping from a multimodal checkpoint to its text model: the text model's own, after the prefix of the side."""
    prefix = WeightRenaming(source_patterns=_LANGUAGE_SIDE.pattern, target_patterns=f"{model.base_model_prefix}.")
    return [prefix, *get_model_conversion_mapping(model)]


def missing_sources(conversion: Conversion, expected: Iterable[str], model: PreTrainedModel) -> list[str]:
    """List the stored names that a conversion lacks, as a checkpoint would name them.

    Args:
        conversion: the conversion.
        expected: see :meth:`Conversion.expected`.
        model: the model.
    """
    gone = [name for name in expected if _bare(name, model.base_model_prefix) not in conversion.renamed]
    if not gone:
        return []
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    back, _ = _split([one.reverse_transform() for one in mapping[::-1] if not isinstance(one, PrefixChange)])
    return [apply_renamings(name, back) for name in gone]


def shapes_by_stored_name(conversion: Conversion, expected: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    """Shape that each stored tensor of a conversion should have; a name that is not expected is left out."""
    bare = {_bare(name, prefix): shape for name, shape in expected.items()}
    pairs = zip(conversion.stored, conversion.renamed, strict=True)
    return {stored: bare[renamed] for stored, renamed in pairs if renamed in bare}


def _split(mapping: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    return (
        [one for one in mapping if isinstance(one, WeightRenaming)],
        [one for one in mapping if isinstance(one, WeightConverter)],
    )


def _bare(name: str, prefix: str) -> str:
    """Name without the prefix of the base model, which a checkpoint may have or lack."""
    return name.removeprefix(f"{prefix}.")
