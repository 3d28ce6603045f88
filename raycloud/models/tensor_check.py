"""Check of tensors for whole models and parts: every stored tensor is used, every tensor of the model is stored.

A checkpoint is compared with the model of its configuration by the headers of its files alone, before anything takes
memory. Every tensor of the file is used, every parameter and saved buffer of the model is read, in its own shape, or
the load fails with one line that names the tensors at fault. Tensors that the library converts are checked one by one
too: those stored must be those that the library would store. These known differences are accepted:

- the library's renamings: a base model's tensors may lack the prefix of the task model or have it, and LayerNorm's
  weights may have the names ``gamma`` and ``beta`` of releases before transformers;
- one of several tensors that the configuration ties together is enough; if several are stored they must be equal;
- buffers that the library now computes (rotary ``inv_freq``, ``position_ids``, GPT-2's causal masks), and tensors that
  its class for the model says to ignore, such as blocks for the prediction of several tokens, are not read;
- an encoder is loaded without a task head: if some tensors have the base model's prefix, those without it belong to a
  head and are not read; and an encoder that was saved without a pooler has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from raycloud.errors import ModelError
from raycloud.models.checkpoint import Checkpoint, StoredTensor, make_tensors
from raycloud.models.configuration import first_line
from raycloud.models.tensor_sources import (
    Conversion,
    Shape,
    TensorSource,
    find_conversions,
    is_language_side,
    language_side_mapping,
    missing_sources,
    shapes_by_stored_name,
)

_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias)$")
_PLAIN = ("F64", "F32", "F16", "BF16")


def match_tensors(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    modules: Iterable[nn.Module] | None = None,
    *,
    whole: Collection[str] | None = None,
) -> dict[str, TensorSource]:
    """Match the parameters and saved buffers of a model with a checkpoint: their sources, by the model's names.

    Args:
        model: an empty model, see :func:`~raycloud.models.checkpoint.empty_model`.
        checkpoint: the checkpoint with the same configuration.
        modules: modules whose tensors are wanted; those of the whole model if None.
        whole: names of all tensors of the whole checkpoint, if this one is an exported part of it, which needs to hold
            the wanted tensors only.

    Raises:
        ModelError: a tensor is missing, not used, of another shape, or not stored as plain numbers.
    """

    def equal(one: TensorSource, other: TensorSource) -> bool:
        return torch.equal(_value(one, model, checkpoint), _value(other, model, checkpoint))

    saved = model.state_dict(keep_vars=True)
    wanted = _wanted(modules, saved)
    # Qwen2-VL's configurations hold the settings of the text side themselves.
    multimodal = any(isinstance(checkpoint.config.get(side), dict) for side in ("text_config", "vision_config"))
    found = match_headers(
        model,
        {name: one for name, one in checkpoint.tensors.items() if not multimodal or is_language_side(name)},
        checkpoint.source,
        mapping=language_side_mapping(model) if multimodal else None,
        whole=whole if whole is None or not multimodal else list(filter(is_language_side, whole)),
        needed=None if whole is None else wanted,
        equal=equal,
    )
    return {name: source for name, source in found.items() if name in wanted}


def match_headers(
    model: PreTrainedModel,
    headers: Mapping[str, StoredTensor],
    source: str,
    *,
    mapping: list[WeightTransform] | None = None,
    whole: Collection[str] | None = None,
    needed: Collection[str] | None = None,
    equal: Callable[[TensorSource, TensorSource], bool] = lambda one, other: True,
) -> dict[str, TensorSource]:
    """Match the parameters and saved buffers of a model with the headers of stored tensors, of any format of files.

    Args:
        model: an empty model.
        headers: headers by stored name.
        source: the model folder or file.
        mapping: see :func:`~raycloud.models.tensor_sources.find_conversions`.
        whole: see :func:`match_tensors`.
        needed: names of the model that must be there; all if None.
        equal: compares two stored tensors that the model ties together.

    Raises:
        ModelError: see :func:`match_tensors`.
    """
    saved = model.state_dict(keep_vars=True)
    names = headers if whole is None else whole
    conversions, unplaced = find_conversions(model, saved, names, mapping)
    check = _Check(model, saved, headers)
    found = {one.name: one for conversion in conversions for one in check.sources(conversion)}
    _tie(found, model, source, equal)
    absent = [name for name in (saved if needed is None else needed) if name not in found]
    ignored = _ignored(model, names)
    check_tensors(
        source,
        model.config.model_type,
        missing=[*check.missing, *(name for name in absent if name not in check.refused)],
        unused=[*check.extra, *(name for name in unplaced if name in headers and not ignored(name))],
        odd=check.odd,
    )
    return found


def check_tensors(
    source: str, model_type: str, *, missing: Sequence[str], unused: Sequence[str], odd: Sequence[str] = ()
) -> None:
    """Refuse missing, unused and wrong tensors, in one line.

    Args:
        source: the model folder or file.
        model_type: the family.
        missing: tensors of the model that are not stored.
        unused: stored tensors that the model does not have.
        odd: descriptions of tensors with a wrong shape or type.

    Raises:
        ModelError: any of the three is not empty.
    """
    said = [
        f"{what} {', '.join(sorted(names)[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (("it lacks", missing), ("the model has no place for", unused), ("odd are", odd))
        if names
    ]
    if said:
        raise ModelError(f"'{source}' does not hold the tensors of its '{model_type}' model: {'; '.join(said)}")


def _wanted(modules: Iterable[nn.Module] | None, saved: dict[str, torch.Tensor]) -> set[str]:
    if modules is None:
        return set(saved)
    held = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return {name for name, tensor in saved.items() if id(tensor) in held}


class _Check:
    """Check of conversions by the headers of the stored tensors; what is wrong is collected."""

    def __init__(
        self, model: PreTrainedModel, saved: Mapping[str, Tensor], headers: Mapping[str, StoredTensor]
    ) -> None:
        self._model, self._saved, self._headers = model, saved, headers
        self.missing, self.extra, self.odd = list[str](), list[str](), list[str]()
        self.refused = set[str]()
        """Tensors of the model with stored tensors of which something is wrong, and named."""

    def sources(self, conversion: Conversion) -> Iterator[TensorSource]:
        """Sources of the tensors that a conversion makes; none if something is wrong with its stored tensors."""
        held = [name for name in conversion.stored if name in self._headers]
        if not held:  # of another part
            return
        if conversion.converter is None:
            self.odd += self._odd(held[0], tuple(self._saved[conversion.target].shape), conversion.target)
            yield TensorSource(conversion, conversion.target)
            return
        missing = [name for name in conversion.stored if name not in self._headers]
        extra, shapes = list[str](), dict[str, Shape]()
        expected = conversion.expected(self._model, self._saved[conversion.target])
        if expected is not None:
            shapes = shapes_by_stored_name(conversion, expected, self._model.base_model_prefix)
            missing += missing_sources(conversion, expected, self._model)
            extra += [name for name in held if name not in shapes]
        odd = [said for name in held for said in self._odd(name, shapes.get(name), conversion.target)]
        if missing or extra or odd:
            self.missing, self.extra, self.odd = self.missing + missing, self.extra + extra, self.odd + odd
            self.refused.add(conversion.target)
            return
        yield from self._made(conversion)

    def _made(self, conversion: Conversion) -> Iterator[TensorSource]:
        """Run a conversion without numbers, and compare the shapes of what it makes with the model's."""
        headers = self._headers
        try:
            made = conversion.run(self._model, lambda name: torch.empty(headers[name].shape, device="meta"))
            said = ""
        except Exception as error:  # the library's operations raise many kinds
            made, said = {}, first_line(error)
        for name, tensor in made.items():
            shape = tuple(self._saved[name].shape) if name in self._saved else None
            if tuple(tensor.shape) != shape:
                said = said or f"they give {name} the shape {tuple(tensor.shape)}, not {shape}"
        if said:
            names, self.refused = conversion.stored, self.refused | {conversion.target}
            self.odd.append(f"{names[0]} to {names[-1]} ({len(names)}), of which {conversion.target} is made: {said}")
            return
        for name in made:
            yield TensorSource(conversion, name)

    def _odd(self, stored: str, shape: Shape | None, target: str) -> list[str]:
        """Remark on a stored tensor that has not this shape, or not the kind of numbers of the model's ``target``."""
        there = self._headers[stored]
        if shape is not None and there.shape != shape:
            return [f"{stored} has shape {there.shape}, not {shape}"]
        floating = self._saved[target].is_floating_point()
        if floating and there.dtype not in _PLAIN:
            return [f"{stored} is stored as {there.dtype}, and only {', '.join(_PLAIN)} are plain numbers"]
        if not floating and there.dtype in _PLAIN:
            return [f"{stored} is stored as {there.dtype}, and the model's are whole numbers"]
        return []


def _tie(
    found: dict[str, TensorSource],
    model: PreTrainedModel,
    where: str,
    equal: Callable[[TensorSource, TensorSource], bool],
) -> None:
    """Give tensors that are tied together one source: that of the first of them that is stored."""
    groups: dict[str, list[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, [source]).append(target)
    for names in groups.values():
        stored = [name for name in names if name in found]
        for other in stored[1:]:
            if not equal(found[stored[0]], found[other]):
                raise ModelError(
                    f"'{where}' holds '{found[other].stored[0]}' and '{found[stored[0]].stored[0]}' with "
                    "different values, and its configuration ties them; allowed: tie_word_embeddings: false, or equal "
                    "values"
                )
        if stored:
            found |= dict.fromkeys(names, found[stored[0]])


def _value(source: TensorSource, model: PreTrainedModel, checkpoint: Checkpoint) -> Tensor:
    if source.conversion.converter is None:
        return checkpoint.tensor(source.stored[0])
    return make_tensors(source.conversion, model, checkpoint)[source.name]


def _ignored(model: PreTrainedModel, names: Collection[str]) -> Callable[[str], bool]:
    """Function that tells whether a stored tensor without a place in the model is known to be none of it."""
    prefix = f"{model.base_model_prefix}."
    headless = model.base_model is model and any(name.startswith(prefix) for name in names)
    # The library searches its patterns anywhere in a name; whole components are asked for here, so that a stray
    # "attn.c_attn.bias" is none of "attn.bias".
    listed = [rf"(?:^|\.)(?:{one})(?:\.|$)" for one in model._keys_to_ignore_on_load_unexpected or ()]
    patterns = [_COMPUTED, *map(re.compile, listed)]

    def ignored(name: str) -> bool:
        return any(pattern.search(name) for pattern in patterns) or (headless and not name.startswith(prefix))

    return ignored
