"""raycloud gets a large language model from your cloud to your edges, and keeps it good there."""

__version__ = "0.1.0"
