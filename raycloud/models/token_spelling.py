"""Spelling of single tokens: their bytes, which need not be whole characters."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from raycloud.models.texts import special_ids

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_OF_CHARACTER = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}


class TokenSpelling:
    """Spelling of the tokens of one tokenizer.

    Args:
        tokenizer: a byte-level tokenizer, or one with sentencepiece's conventions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Read once: a tokenizer builds this mapping at every access.
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._byte_level = "ByteLevel" in str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self.special = special_ids(tokenizer)
        """Ids of special tokens, which decoding skips."""
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)
        """Characters of the longest token: a text of more than ``longest * N`` characters has more than N tokens."""

    def bytes_of(self, token: int) -> bytes:
        """Bytes of a token as it appears in a text; special tokens as they are written."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if token in self._added:
            return piece.encode()
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        if self._byte_level:
            return b"".join(_OF_CHARACTER.get(character, character.encode()) for character in piece)
        return piece.replace("▁", " ").encode()
