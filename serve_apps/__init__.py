"""Bound Ray Serve applications for ``serve run`` and ``serve deploy``."""
