"""Random numbers that are a function of a key, such as (seed, step, micro-batch), and of who draws them.

Dropout that draws from one generator in the order of the layers can only be repeated by whoever runs all of them. Where
each part of a model has a seed of its own, its masks are the same wherever the part runs and whatever ran before it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ONE_AT_A_TIME = threading.RLock()


def seed_of(*key: int | str) -> int:
    """63 bits that are a function of the key alone, in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


@contextmanager
def drawing(parts: Mapping[str, nn.Module], *key: int) -> Iterator[None]:
    """Within it, random numbers are a function of the key; afterwards all generators are as they were before.

    One thread of a process at a time: dropout draws from generators that all threads share.

    Args:
        parts: modules that draw from a seed of (key, name) each time they are called; the rest draws from the key's.
        key: of these numbers.
    """

    def seeded(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            torch.manual_seed(seed_of(*key, name))

        return hook

    hooks = [module.register_forward_pre_hook(seeded(name)) for name, module in parts.items()]
    devices = list(range(torch.cuda.device_count()))
    try:
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_of(*key))
            yield
    finally:
        for hook in hooks:
            hook.remove()
