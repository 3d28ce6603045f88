"""The texts under attack: real prompts of the test split, each with a made-up name and number planted in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from raycloud.data.prompts import Format, example
from raycloud.data.splits import Row
from raycloud.errors import DataError

LONGEST = 64
"""Private tokens of a prompt at most, the planted sentence included."""

_FIRST = ("Amara", "Björn", "Carla", "Dmitri", "Elif", "Farouk", "Giulia", "Hiro", "Ingrid", "Jamal", "Katya", "Liam")
_LAST = ("Abara", "Bergström", "Castillo", "Dvořák", "Eriksen", "Fontaine", "Grabowski", "Haddad", "Ivanova", "Jensen")


@dataclass(frozen=True)
class Victim:
    """A prompt's token ids; those in ``private`` are the user's own words, the rest is the public template."""

    ids: tuple[int, ...]
    private: range
    secrets: tuple[str, ...]


def format_of(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Format:
    """How the rows become prompts: by the model's chat template where they are instructions and it has one."""
    if "instruction" not in rows[0]:
        return "plain"
    return "chat" if tokenizer.chat_template else "alpaca"


def victims(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Victim]:
    """``count`` prompts drawn from the rows with their secrets: a pure function of its arguments.

    Prompts of more than ``LONGEST`` private tokens are passed over.

    Raises:
        DataError: there are not that many.
    """
    draw = random.Random(seed)
    form, found = format_of(rows, tokenizer), []
    for row in draw.sample(list(rows), len(rows)):
        prompt, response = example(row, form, tokenizer)
        name = f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"
        number = f"{draw.randrange(10**7, 10**8)}"
        planted = f"My name is {name} and my number is {number}."
        own = prompt.body if form != "plain" else response
        body = f"{planted} {own}" if draw.random() < 0.5 else f"{own} {planted}"
        pieces = (prompt.before, body, prompt.after)
        before, inside, after = tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
        if len(inside) <= LONGEST:
            private = range(len(before), len(before) + len(inside))
            found.append(Victim((*before, *inside, *after), private, (name, number)))
        if len(found) == count:
            return found
    raise DataError(f"texts: {count} asked for, {len(found)} found with at most {LONGEST} private tokens")
