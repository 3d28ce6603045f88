"""Texts under attack: real prompts of the test split, each with an invented name and number planted in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from raycloud.data.prompts import bounds_of, default_format, prompt_and_response
from raycloud.data.splits import Row
from raycloud.errors import DataError

MAX_PRIVATE = 64
"""Maximum number of private tokens of a prompt, the planted sentence included."""

_FIRST = ("Amara", "Björn", "Carla", "Dmitri", "Elif", "Farouk", "Giulia", "Hiro", "Ingrid", "Jamal", "Katya", "Liam")
_LAST = ("Abara", "Bergström", "Castillo", "Dvořák", "Eriksen", "Fontaine", "Grabowski", "Haddad", "Ivanova", "Jensen")


@dataclass(frozen=True)
class Victim:
    """Token ids of a prompt; those in the range ``private`` are the user's text, the rest is the public template."""

    ids: tuple[int, ...]
    private: range
    secrets: tuple[str, ...]


def victims(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Victim]:
    """Draw ``count`` prompts from the rows and plant secrets in them; a pure function of its arguments.

    Prompts of more than ``MAX_PRIVATE`` private tokens are skipped.

    Raises:
        DataError: fewer than ``count`` prompts are left.
    """
    draw = random.Random(seed)
    form, found = default_format(rows, tokenizer), list[Victim]()
    bounds = bounds_of(tokenizer, form)
    for row in draw.sample(list(rows), len(rows)):
        prompt, response = prompt_and_response(row, form, tokenizer)
        name = f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"
        number = f"{draw.randrange(10**7, 10**8)}"
        planted = f"My name is {name} and my number is {number}."
        own = prompt.body if form != "plain" else response
        body = f"{planted} {own}" if draw.random() < 0.5 else f"{own} {planted}"
        pieces = (prompt.before, body, prompt.after)
        before, inside, after = tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
        before = bounds.begun(before)
        if len(inside) <= MAX_PRIVATE:
            private = range(len(before), len(before) + len(inside))
            found.append(Victim((*before, *inside, *after), private, (name, number)))
        if len(found) == count:
            return found
    raise DataError(f"texts: {count} asked for, {len(found)} found with at most {MAX_PRIVATE} private tokens")
