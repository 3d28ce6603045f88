"""Distilled student with an OpenAI-compatible API: ``serve run serve_apps.student:app model=path/to/student``."""

from raycloud.serving.student import app

__all__ = ["app"]
