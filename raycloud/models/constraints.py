"""Constrained decoding to JSON: a grammar gives the allowed tokens before each token (library ``llguidance``)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.errors import MissingExtra, ModelError
from raycloud.models.sampling import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Only one way to write each value: with flexible whitespace a weak model generates endless blank lines.
_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Factory of constraints for one tokenizer; its ``llguidance`` tokenizer is made once, at the first use.

    Args:
        tokenizer: a fast tokenizer.
        ends: token ids that end a text; allowed only where the text is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        self._given, self._ends = tokenizer, sorted(ends)

    def json(self, schema: Mapping[str, Any]) -> Constraint:
        """Constraint to JSON texts that match a JSON schema.

        Raises:
            MissingExtra: the library is not installed.
            ModelError: the tokenizer is not a fast one, or has no token that ends a text.
            ValueError: the schema is invalid, or uses a feature that the library does not know.
        """
        tokenizer = self._tokenizer
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_LAYOUT)
        if wrong := LLMatcher.validate_grammar(grammar, tokenizer):
            raise ValueError(" ".join(wrong.split()))
        return _GrammarConstraint(LLMatcher(tokenizer, grammar), tokenizer.vocab_size)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise MissingExtra("JSON by a grammar", "constrained") from None
        if not self._given.is_fast or not self._ends:
            raise ModelError(
                "JSON by a grammar needs a fast tokenizer with an EOS token, which this model does not have"
            )
        return from_tokenizer(self._given, eos_token=self._ends)  # type: ignore[arg-type]


class _GrammarConstraint:
    """State of one text in a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        from llguidance.numpy import allocate_token_bitmask

        self._matcher, self._mask = matcher, allocate_token_bitmask(1, vocab_size)

    def masked(self, logits: Tensor) -> Tensor:
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: logits.shape[-1]].astype(bool)
        # A model may have logits for token ids that its tokenizer does not have.
        blocked = torch.ones(logits.shape[-1], dtype=torch.bool)
        blocked[: len(allowed)] = torch.from_numpy(~allowed)
        return logits.masked_fill(blocked.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise ModelError(f"the text does not match the grammar: {self._matcher.get_error()}")
