"""Small tokenizers, trained in a moment."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""The shape of Gemma's template: it writes BOS itself, and its turn end is not EOS."""
SPECIAL = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
BOS, EOS, PAD, _, TURN = range(5)


def trained(words: int, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most this vocabulary size."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>", "<pad>"],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def tokenizer_of(
    *, begin: Sequence[str] = (), end: Sequence[str] = (), template: str | None = None, **named: str | None
) -> PreTrainedTokenizerBase:
    """Make a byte-level tokenizer whose post-processor puts these special tokens around a text."""
    vocab = {piece: at for at, piece in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if begin or end:
        around = [(token, vocab[token]) for token in (*begin, *end)]
        single = " ".join([*begin, "$A", *end])
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **named}
    )
    made.chat_template = template
    return made


def llama_like() -> PreTrainedTokenizerBase:
    """Make a tokenizer with SentencePiece's conventions: a space before the text, bytes for unknown characters."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh .,é", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
