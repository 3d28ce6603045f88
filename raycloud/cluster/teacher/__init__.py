"""Supervised fine-tuning of the cloud teacher: Ray Train runs the workers, DeepSpeed shards their state."""
