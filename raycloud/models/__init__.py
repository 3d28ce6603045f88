"""Models: loading, the anatomy of families, segments with their own KV cache, and surgery."""
