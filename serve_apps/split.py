"""Cloud part of a split model: ``serve run serve_apps.split:app model=parts/cloud``."""

from raycloud.serving.split import app

__all__ = ["app"]
