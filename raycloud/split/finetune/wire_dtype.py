"""Names of the dtypes in which numbers are sent at a cut."""

from __future__ import annotations

from typing import Literal

WireDType = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""Wire dtype: int8 has a float16 scale per token, int4 one per 64 numbers, in units of the largest number of all."""
