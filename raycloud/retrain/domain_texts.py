"""Texts of several domains as samples of a model: packed texts, prompts with answers, or texts with classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample, encode
from raycloud.data.files import describe_value, location_of
from raycloud.data.labelled import classes_of, collate_labelled, encode_labelled
from raycloud.data.splits import Row
from raycloud.errors import DataError
from raycloud.retrain.domain_data import DataPart, part_of
from raycloud.retrain.recipe import RetrainRecipe, Supervision
from raycloud.retrain.samples import IGNORE, Samples

_PROMPT = 0.75
"""Largest share of a sample's tokens that a prompt takes; a longer one is shortened in its body."""


def text_classes(rows: Sequence[Row], recipe: RetrainRecipe) -> list[Any]:
    """Classes of a recipe's texts, or of their words, in the order of the model's outputs.

    Raises:
        DataError: the rows lack the column, or it holds no classes.
    """
    data = recipe.data
    if data.classes is not None:
        return data.classes
    if recipe.task == "token_tagging":
        rows = [{data.label: tag} for row in rows for tag in _list_in(row, data.label)]
    return classes_of(rows, data.label)


class TextDomains:
    """Texts of several domains.

    Args:
        rows: all rows, with the columns that the recipe names.
        recipe: recipe with the task, the supervision and the data.
        tokenizer: tokenizer of the model.
        classes: classes in the order of the model's outputs; empty for language modelling.
    """

    def __init__(
        self, rows: Sequence[Row], recipe: RetrainRecipe, tokenizer: PreTrainedTokenizerBase, classes: Sequence[Any]
    ) -> None:
        self._recipe, self._tokenizer, self._classes = recipe, tokenizer, list(classes)
        column = recipe.data.domain
        if column not in rows[0]:
            raise DataError(f"data.domain: no column '{column}'; the rows have: {', '.join(rows[0])}")
        self._rows: dict[tuple[str, DataPart], list[Row]] = {}
        for row in rows:
            domain = str(row[column])
            source = domain == recipe.data.source_domain and recipe.source.steps > 0
            self._rows.setdefault((domain, part_of(row, source)), []).append(row)
        self._domains = sorted({domain for domain, _ in self._rows})

    def samples(self, domain: str, part: DataPart) -> Samples:
        """Samples of a part of a domain; see :class:`~raycloud.retrain.domain_data.DomainData`."""
        if domain not in self._domains:
            raise DataError(f"no domain '{domain}' in the data; there are: {', '.join(self._domains)}")
        rows = self._rows.get((domain, part))
        if not rows:
            raise DataError(f"domain '{domain}' has no rows in its part '{part}'")
        return self._encoded(rows, part)

    def _encoded(self, rows: Sequence[Row], part: DataPart) -> Samples:
        match self._recipe.task:
            case "language_modelling":
                # The cloud has answers, and models are evaluated on them, whatever edges may read.
                known = part in ("source", "test")
                return self._language(rows, "labels" if known else self._recipe.supervision)
            case "classification":
                return self._labelled(rows)
            case "token_tagging":
                return self._tagged(rows)

    def _language(self, rows: Sequence[Row], supervision: Supervision) -> Samples:
        data = self._recipe.data
        coded = encode(
            rows,
            self._tokenizer,
            data.format,
            max_length=data.max_length if data.format != "plain" else 2**20,
            max_prompt_length=max(1, int(_PROMPT * data.max_length)) if data.format != "plain" else 1,
            bos=data.bos,
        )
        if data.format == "plain":
            return packed([one.ids for one in coded], data.max_length, self._tokenizer.eos_token_id)
        return prompted(coded, data.max_length, _pad_of(self._tokenizer), supervision)

    def _labelled(self, rows: Sequence[Row]) -> Samples:
        data = self._recipe.data
        coded = encode_labelled(
            rows,
            self._tokenizer,
            text=data.text,
            pair=None,
            label=data.label,
            classes=self._classes,
            max_length=data.max_length,
        )
        batch = collate_labelled(coded, _pad_of(self._tokenizer))
        inputs = {"input_ids": batch.ids, "attention_mask": batch.valid.long()}
        if batch.types is not None:
            inputs["token_type_ids"] = batch.types
        return _padded(inputs, batch.labels.long(), data.max_length, _pad_of(self._tokenizer))

    def _tagged(self, rows: Sequence[Row]) -> Samples:
        data = self._recipe.data
        number = {value: at for at, value in enumerate(self._classes)}
        words = [[str(word) for word in _list_in(row, data.text)] for row in rows]
        coded = self._tokenizer(words, is_split_into_words=True, truncation=True, max_length=data.max_length)
        ids, labels = list[list[int]](), list[list[int]]()
        for index, row in enumerate(rows):
            tags = _list_in(row, data.label)
            if len(tags) != len(words[index]):
                raise DataError(
                    f"{location_of(row)}: '{data.label}' has {len(tags)} classes for {len(words[index])} words"
                )
            found, before = [IGNORE] * len(coded["input_ids"][index]), None
            for at, word in enumerate(coded.word_ids(index)):
                if word is not None and word != before:  # the first token of a word has its class
                    if tags[word] not in number:
                        raise DataError(f"{location_of(row)}: '{tags[word]}' is no class of {list(number)}")
                    found[at] = number[tags[word]]
                before = word
            ids.append(coded["input_ids"][index])
            labels.append(found)
        length = max(map(len, ids))
        batch, mask = _rectangle(ids, length, _pad_of(self._tokenizer))
        tagged, _ = _rectangle(labels, length, IGNORE)
        inputs = {"input_ids": batch, "attention_mask": mask}
        return _padded(inputs, tagged, data.max_length, _pad_of(self._tokenizer))


def packed(texts: Sequence[Sequence[int]], length: int, end: int | None) -> Samples:
    """Texts one after another, with ``end`` between them, cut to samples of one length; labels are the next tokens.

    Raises:
        DataError: the texts are shorter than one sample.
    """
    stream = [token for ids in texts for token in (*ids, *(() if end is None or ids[-1] == end else (end,)))]
    count = len(stream) // length
    if not count:
        raise DataError(f"{len(texts)} texts have {len(stream)} tokens; allowed: data.max_length={length} or more")
    ids = torch.tensor(stream[: count * length]).view(count, length)
    labels = torch.cat([ids[:, 1:], torch.full((count, 1), IGNORE)], dim=1)
    return Samples({"input_ids": ids}, labels)


def prompted(samples: Sequence[Sample], length: int, pad: int, supervision: Supervision) -> Samples:
    """Prompts padded to one length: with answers, whose tokens are the labels, or alone, with their own as labels."""
    labelled = supervision == "labels"
    ids, mask = _rectangle([one.ids if labelled else one.ids[: one.prompt] for one in samples], length, pad)
    answers_from = torch.tensor([one.prompt if labelled else 0 for one in samples])[:, None]
    wanted = mask[:, 1:].bool() & (torch.arange(1, length) >= answers_from)
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = torch.where(wanted, ids[:, 1:], IGNORE)
    return Samples({"input_ids": ids, "attention_mask": mask}, labels)


def _rectangle(rows: Sequence[Sequence[int]], length: int, fill: int) -> tuple[Tensor, Tensor]:
    """Rows filled to a length (n, T), and the mask of what they had."""
    table, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        table[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return table, mask


def _padded(inputs: Mapping[str, Tensor], labels: Tensor, length: int, pad: int) -> Samples:
    """Samples padded to a length, so that all parts of all domains have it."""

    def wider(tensor: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fill)

    fills = {"input_ids": pad}
    padded = {name: wider(one, fills.get(name, 0)) for name, one in inputs.items()}
    return Samples(padded, wider(labels, IGNORE) if labels.dim() == 2 else labels)


def _pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _list_in(row: Row, column: str) -> list[Any]:
    if not isinstance(value := row.get(column), list) or not value:
        raise DataError(f"{location_of(row)}: '{column}' is {describe_value(value)}; allowed: a list with one or more")
    return value
