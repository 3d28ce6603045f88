"""Cloud trainer of split fine-tuning: ``serve run serve_apps.split_tune:app model=… start_block=3 end_block=6 …``."""

from raycloud.serving.split_tune import app

__all__ = ["app"]
