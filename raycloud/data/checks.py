"""Checks that a model can take the texts of a recipe, by its configuration and tokenizer, before anything starts."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raycloud.errors import ModelError, RecipeError
from raycloud.models.configuration import context_length


def check_positions(field: str, tokens: int, config: PretrainedConfig) -> None:
    """Check that a model takes texts as long as a recipe allows.

    Args:
        field: field of the recipe, such as ``data.max_length``.
        tokens: value of the field.
        config: configuration of the model.

    Raises:
        RecipeError: the model has fewer positions.
    """
    longest = context_length(config)
    if tokens > longest:
        raise RecipeError(f"{field}={tokens}; allowed: up to the model's {longest} positions")


def check_eos(field: str, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer has a token that ends a text; answers are trained to end with it.

    Args:
        field: field of the recipe, such as ``teacher.model``.
        source: value of the field.
        tokenizer: tokenizer of the model.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{field}: the tokenizer of '{source}' has no token that ends a text; name one as eos_token in its "
            "tokenizer_config.json"
        )
