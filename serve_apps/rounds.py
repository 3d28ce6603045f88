"""Door for devices without Ray to the jobs of the cluster: ``serve run serve_apps.rounds:app``."""

from raycloud.serving.rounds import app

__all__ = ["app"]
