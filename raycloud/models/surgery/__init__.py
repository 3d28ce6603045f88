"""Surgery: which blocks matter, a smaller model from some of them, one model from several."""
