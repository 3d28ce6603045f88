"""Dtype of the computation: trained weights stay float32, matrix products may run in half precision."""

from __future__ import annotations

import contextlib

import torch

from raycloud.models.devices import DType


def compute_dtype(dtype: DType, device: torch.device) -> torch.dtype | None:
    """Autocast dtype for float32 weights on a device; None computes in float32.

    ``auto`` is bfloat16 where the device multiplies it natively (several times faster, also on recent CPUs).
    """
    if dtype == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else None
    return None if dtype == "float32" else getattr(torch, dtype)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))


def autocast_to(kind: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast context to ``kind``; a context without effect if None."""
    return contextlib.nullcontext() if kind is None else torch.autocast(device.type, kind)
