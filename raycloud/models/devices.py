"""Names of devices and number types in recipes; this module does not import torch, so reading a recipe does not."""

from __future__ import annotations

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
