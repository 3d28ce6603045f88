"""Shells: copies of a model's module tree that share all weights, in which single modules can be replaced."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from torch import nn

_PER_MODULE = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


def shell_of(module: nn.Module) -> nn.Module:
    """Copy of a module that shares its submodules and weights; replacing one of its submodules leaves it unchanged."""
    shell = copy.copy(module)
    for name in _PER_MODULE:
        shell.__dict__[name] = copy.copy(module.__dict__[name])
    shell.__dict__["_is_shell"] = True
    return shell


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Replace a submodule of a shell; modules in between become shells."""
    *between, last = path.split(".")
    for name in between:
        child = root._modules[name]
        assert child is not None
        if not child.__dict__.get("_is_shell"):
            child = root._modules[name] = shell_of(child)
        root = child
    root._modules[last] = new


class StandIn(nn.Module):
    """Stand-in for a block: it owns no weights, and has the block's plain attributes, such as its kind of attention.

    Args:
        block: the block, or an object with its plain attributes.
    """

    def __init__(self, block: nn.Module | SimpleNamespace) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not registered: its weights are not a stand-in's

    def __getattr__(self, name: str) -> Any:
        """Return plain attributes of the block, which the model around it may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_block"], name)
            if name.startswith("_") or isinstance(found, nn.Module):
                raise
            return found
