"""Small tokenizers of both kinds, and the bytes of their tokens, found independently of the package."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SHARED = Path(os.environ.get("RAYCLOUD_DATA", Path(__file__).parents[3] / "shared" / "data"))
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells, and the shells she sells are sea shells\n\nsaid he",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u6f22\u5b57 \u6f22\u8a9e  two  spaces",
    "12 monkeys, 1234 donkeys; (brackets) [and] {more}\tof it",
]
_HIDDEN = sorted(set(range(256)) - set(map(ord, pre_tokenizers.ByteLevel.alphabet())))
"""Bytes without a visible letter of Latin-1, which the letters from U+0100 on stand for in this order."""
SPECIAL = ["<s>", "</s>", "<pad>"]


def _trained(made: Tokenizer, corpus: list[str], vocab_size: int, alphabet: list[str]) -> dict[str, Any]:
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus * 3, trainer)
    return json.loads(made.to_str())["model"]


def _wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@cache
def byte_level(
    vocab_size: int = 330, *, prefix: bool = False, nfc: bool = False, skip: int = 0
) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer, with the prefix space of RoBERTa or normalisation like Qwen."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    if nfc:
        made.normalizer = normalizers.NFC()
    _trained(made, CORPUS[skip:], vocab_size, pre_tokenizers.ByteLevel.alphabet())
    return _wrapped(made)


@cache
def sentencepiece(vocab_size: int = 200, *, always: bool = False, skip: int = 0) -> PreTrainedTokenizerFast:
    """Make a BPE tokenizer with byte fallback; a space goes before every text (Mistral), or before texts without
    one (TinyLlama)."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    model = _trained(made, CORPUS[skip:], vocab_size, [])
    entries = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    numbers = {entry: number for number, entry in enumerate(entries)}
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(models.BPE(vocab=numbers, merges=merges, byte_fallback=True, fuse_unk=True))
    if always:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(SPECIAL)
    return _wrapped(made)


def published(name: str) -> PreTrainedTokenizerFast | None:
    """Load a published tokenizer from the development data, if that is available."""
    from raycloud.models.loading import load_tokenizer

    folder = SHARED / "tokenizers" / name
    return load_tokenizer(str(folder)) if folder.is_dir() else None  # type: ignore[return-value]


def bytes_of(tokenizer: PreTrainedTokenizerFast, number: int) -> bytes:
    """Find the bytes of each token, one at a time."""
    added = tokenizer.added_tokens_decoder
    token = tokenizer.convert_ids_to_tokens(number)
    if number in added:
        return b"" if added[number].special else added[number].content.encode()
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder.__getstate__()):
        return bytes(ord(letter) if ord(letter) < 256 else _HIDDEN[ord(letter) - 256] for letter in token)
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
