"""Distillation: objectives, what a teacher says about a batch, and the head–divergence op that joins them."""
