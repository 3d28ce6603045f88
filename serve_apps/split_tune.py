"""The cloud's side of split fine-tuning: ``serve run serve_apps.split_tune:app model=… first=3 second=6 …``."""

from raycloud.serving.split_tune import app

__all__ = ["app"]
