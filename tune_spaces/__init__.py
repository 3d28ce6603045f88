"""Search spaces for ``raycloud search --space …``."""
