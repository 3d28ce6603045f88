"""Alignment of two tokenizers: tokens by the bytes they cover, vocabularies, and pairs of batches."""
