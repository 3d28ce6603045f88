"""Split models: one model cut between edge and cloud, with its plans, parts, inference and fine-tuning."""
