"""Models: loading, the structure of families, segments with their own KV cache, and surgery."""
