"""A teacher on the wire: ``serve run serve_apps.teacher:app model=path/to/teacher``."""

from raycloud.serving.teacher import app

__all__ = ["app"]
