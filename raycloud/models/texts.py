"""Tokens at the beginning and end of texts: BOS, EOS and the end of a chat turn, decided here for all other modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from raycloud.errors import ModelError

if TYPE_CHECKING:  # recipes import this, and are read without transformers
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Bos = Literal["auto", True, False]
"""Setting for BOS at the beginning of a text. ``auto`` does what the tokenizer does with a text; for chats the template
decides. ``true`` adds BOS if it is missing, ``false`` adds none, and is refused if the template writes one."""

_QUESTION, _ANSWER = "question", "answer"


@dataclass(frozen=True)
class TextBounds:
    """Token ids before and after the texts of one tokenizer, in one format."""

    begin: tuple[int, ...]
    """Token ids before a text or a prompt."""
    end: tuple[int, ...]
    """Token ids after a text without a prompt: those that the tokenizer itself adds, for most none."""
    answer_end: int | None
    """Token that ends an answer: the template's turn end in a chat, else EOS. None if the tokenizer names no EOS."""
    bos: str
    """Readable note whether BOS was added and why: ``yes (the tokenizer's own post-processor)``."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto", *, chat: bool = False) -> TextBounds:
        """Bounds of the texts of a tokenizer.

        Args:
            tokenizer: any tokenizer.
            bos: setting for BOS at the beginning of texts.
            chat: the texts are rendered by the chat template; BOS is not added if the template writes it.

        Raises:
            ModelError: ``bos`` is true and the tokenizer has no BOS token, or false and the chat template writes it.
        """
        begin, end = _own(tokenizer)
        token, by = tokenizer.bos_token_id, "the tokenizer's own post-processor"
        if chat:
            rendered = _rendered(tokenizer, [{"role": "user", "content": _QUESTION}])
            begin, end, by = (), (), "the chat template"
            if token is not None and rendered.startswith(str(tokenizer.bos_token)):
                if bos is False:
                    raise ModelError(
                        f"bos is false, and the chat template of '{tokenizer.name_or_path}' writes BOS itself; "
                        "allowed: auto, true"
                    )
                return cls((), (), _answer_end(tokenizer, chat), f"yes ({by})")
        if bos is True and token not in begin:
            if token is None:
                name = tokenizer.name_or_path
                raise ModelError(f"bos is true, and the tokenizer '{name}' names no BOS token; allowed: auto, false")
            begin, by = (int(token), *begin), "asked for"
        elif bos is False:
            begin, by = tuple(one for one in begin if one != token), "asked for"
        added = token is not None and token in begin
        return cls(begin, end, _answer_end(tokenizer, chat), f"{'yes' if added else 'no'} ({by})")

    def begun(self, ids: Sequence[int]) -> list[int]:
        """Prepend :attr:`begin` to the ids of a text or a prompt, unless they begin with it already."""
        found = list(ids)
        return found if self.begin and tuple(found[: len(self.begin)]) == self.begin else [*self.begin, *found]

    @property
    def answer(self) -> tuple[int]:
        """Token ids after an answer.

        Raises:
            ModelError: the tokenizer names no token that ends an answer.
        """
        if self.answer_end is None:
            raise ModelError("the tokenizer names no EOS token, which an answer ends with; allowed: format plain")
        return (self.answer_end,)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token that the chat template writes at the end of an answer, such as ``<end_of_turn>``; None if there is none."""
    rendered = _rendered(tokenizer, [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}])
    behind = rendered.rpartition(_ANSWER)[2].lstrip()
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return added.get(max((token for token in added if token and behind.startswith(token)), key=len, default=""))


def end_ids(tokenizer: PreTrainedTokenizerBase, *configs: PretrainedConfig | GenerationConfig | None) -> frozenset[int]:
    """Token ids that end a text: EOS of the tokenizer and of the model's configurations, and the chat turn end."""
    named: list[int | Sequence[int] | None] = [tokenizer.eos_token_id, turn_end(tokenizer)]
    named += [config.eos_token_id for config in configs if config is not None]
    return frozenset(token for ids in named if ids is not None for token in ((ids,) if isinstance(ids, int) else ids))


def save_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all end token ids into the configurations of a model, so that they are saved and copied with it."""
    if model.can_generate():
        ends = sorted(end_ids(tokenizer, model.config, model.generation_config))
        named = ends[0] if len(ends) == 1 else ends or None
        model.config.eos_token_id = model.generation_config.eos_token_id = named


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that decoding skips as special tokens, including those without a name such as EOS."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *added))


def _own(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that the tokenizer adds before and after a text, measured: ``add_bos_token`` may be wrong."""
    bare = tokenizer(_QUESTION, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_QUESTION)["input_ids"]
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return tuple(whole[:at]), tuple(whole[at + len(bare) :])
    return (), ()


def _answer_end(tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    turn = turn_end(tokenizer) if chat else None
    return tokenizer.eos_token_id if turn is None else turn


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Text of messages under the chat template; empty if there is no template, or it refuses them."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return ""
