"""Profile of edge, cloud and link by which the time of a split plan is predicted; read from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raycloud.recipe import Recipe
from raycloud.split.recipe import NetworkRecipe

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class DeviceProfile(Recipe):
    """Speed and memory of one side."""

    memory_gb: float | None = Field(None, gt=0)
    """Limit in GB (1e9 bytes) of weights, keys and values; None for no limit."""
    memory_gb_s: float = Field(gt=0)
    """Bytes per second in 1e9 that products of one token read weights at: about the memory bandwidth."""
    gflop_s: float = Field(gt=0)
    """Floating-point operations per second in 1e9 of products of many tokens."""
    block_us: float = Field(0.0, ge=0)
    """Time in microseconds of a call of a block beside reading weights and computing: Python and small kernels."""
    step_us: float = Field(0.0, ge=0)
    """Time in microseconds of a step outside the blocks: embedding, head's call, sampling and bookkeeping."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights, keys and values."""

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _BYTES[self.dtype]


class LinkProfile(NetworkRecipe):
    """Link between edge and cloud."""

    step_us: float = Field(1500.0, ge=0)
    """Time in microseconds of a step at both ends of the link: codec, frames and sessions."""


class SplitProfile(Recipe):
    """Profile of edge, cloud and the link between them.

    The defaults are those of a small computer with a few CPU cores and of one data-centre GPU. They are a beginning:
    ``raycloud split plan --measure`` measures a device.
    """

    edge: DeviceProfile = DeviceProfile(
        memory_gb=8, memory_gb_s=15, gflop_s=100, block_us=300, step_us=500, dtype="float32"
    )
    cloud: DeviceProfile = DeviceProfile(
        memory_gb=80, memory_gb_s=1500, gflop_s=200_000, block_us=300, step_us=500, dtype="bfloat16"
    )
    network: LinkProfile = LinkProfile()


def read_profile(path: Path | None) -> SplitProfile:
    """Profile of a file; the default one without a file.

    Raises:
        RecipeError: the file cannot be read, has an unknown key, or a value is not allowed.
    """
    return SplitProfile() if path is None else SplitProfile.load(path)
