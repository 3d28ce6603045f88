"""The cloud teacher's supervised fine-tuning: Ray Train runs the workers, DeepSpeed shards what they hold."""
