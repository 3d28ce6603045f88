"""Teacher that sends signals to edges: ``serve run serve_apps.teacher:app model=path/to/teacher``."""

from raycloud.serving.teacher import app

__all__ = ["app"]
