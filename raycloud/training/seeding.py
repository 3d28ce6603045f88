"""Random numbers that are a function of a key, such as (seed, step, micro-batch), and of the module that draws them.

Dropout that draws from one generator in the order of the layers can only be repeated by a process that runs all of
them. If each part of a model has its own seed, its masks do not depend on where the part runs or what ran before it.
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


def derive_seed(*key: int | str) -> int:
    """Seed of 63 bits that depends on the key alone, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


@contextmanager
def seeded(parts: Mapping[str, nn.Module], *key: int) -> Iterator[None]:
    """Context in which random numbers are a function of the key; on exit all generators are restored.

    Only one thread of a process can be in it at a time, because dropout draws from generators that all threads share.

    Args:
        parts: modules seeded by (key, name) on every call; all other draws are seeded by the key alone.
        key: integers that identify the random numbers, such as (seed, step, micro-batch).
    """

    devices = list(range(torch.cuda.device_count()))

    def seed(*of: int | str) -> None:
        # Not ``torch.manual_seed``: for each kind of accelerator that is absent it formats the stack of its caller,
        # which takes longer than a small block.
        torch.default_generator.manual_seed(derive_seed(*of))
        if devices:
            torch.cuda.manual_seed_all(derive_seed(*of))

    def seeded(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            seed(*key, name)

        return hook

    hooks = [module.register_forward_pre_hook(seeded(name)) for name, module in parts.items()]
    try:
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=devices):
            seed(*key)
            yield
    finally:
        for hook in hooks:
            hook.remove()
