"""Surgery: importance of blocks, extraction of a smaller model from some of them, slices of single blocks."""
