"""Watch on a model's folder: a newer version of the model is loaded beside the served one and replaces it.

Versions of a model differ in their weights only. Whoever trains replaces the folder, such as by
:func:`raycloud.durable.write_folder`, or its files one by one; a version is loaded once the files are at rest.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from raycloud.edge.generation import RequestRunner
from raycloud.edge.served_model import ServedModel
from raycloud.edge.whole_model import load_whole_part
from raycloud.errors import ModelError, RaycloudError
from raycloud.models.checkpoint import copy_parameters, model_settings
from raycloud.models.configuration import CONFIG, first_line
from raycloud.models.generation import Decoding
from raycloud.models.text_model import TextModel
from raycloud.models.weights import all_finite
from raycloud.split.inference.generation import local_split_model, text_model

_LOG = logging.getLogger(__name__)
_EVERY_S = 1.0
_PROBE_TOKENS = 2  # one by the prompt, one by its keys and values
_KINDS = frozenset((".json", ".safetensors", ".jinja", ".model", ".txt"))
"""Endings of the files of a model; others, such as logs, change while it stays the same."""

FolderState = tuple[tuple[str, int, int, int, int], ...]
"""Name, device, inode, size and modification time in nanoseconds of every file of a model."""


def folder_state(folder: Path) -> FolderState:
    """State of a model's files: it changes whenever one of them is written or replaced; empty if there are none."""
    found = []
    with suppress(OSError):  # the folder is just being replaced
        for path in folder.iterdir():
            if path.suffix in _KINDS and not path.name.startswith("."):
                about = path.stat()
                found.append((path.name, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns))
    return tuple(sorted(found))


def _return_memory() -> None:
    """Return freed memory to the system; glibc would keep that of tensors below 32 MiB, and so a whole model's."""
    with suppress(AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class _Version:
    model: TextModel
    settings: dict[str, Any]
    """Settings of its configuration."""
    weight: weakref.ref[nn.Parameter]
    """One of its weights, to see whether it is freed."""


class _FilesChanged(Exception):
    """Files of a folder changed while they were read."""


class ModelWatch:
    """Watch on the folder of a served model. As a context manager it runs a thread that swaps newer versions in.

    A version that cannot be loaded, or that is another model, is refused with one line in the log, and the served one
    goes on. For the length of a swap both are in memory.

    Args:
        folder: folder with the first version.
        notify: called with one line about each swap.
        every_s: seconds between two looks at the folder; a version is loaded if two of them find the same files.

    Raises:
        ModelError: the first version cannot be loaded.
        ChecksumError: a file of it is damaged.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None], *, every_s: float = _EVERY_S) -> None:
        self._folder, self._notify, self._every_s = folder, notify, every_s
        first = None
        while first is None:
            self._tried = folder_state(folder)
            try:
                first = self._load(self._tried)
            except _FilesChanged:
                time.sleep(every_s)
        self.served = ServedModel(first.model)
        self._settings, self._weight = first.settings, first.weight
        self._replaced: list[tuple[weakref.ref[RequestRunner], weakref.ref[nn.Parameter]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-watch")

    def __enter__(self) -> ServedModel:
        self._thread.start()
        return self.served

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        seen = self._tried
        while not self._end.wait(self._every_s):
            now = folder_state(self._folder)
            at_rest, seen = now == seen, now
            if at_rest and now and now != self._tried:  # a folder that is being replaced is away for a moment
                self._swap(now)
                _return_memory()
            self._free_replaced()

    def _swap(self, state: FolderState) -> None:
        try:
            version = self._load(state)
            self._check_fits(version)
        except _FilesChanged:
            return  # the next looks see what became of them
        except Exception as error:  # damaged files raise errors of many kinds
            kind = "" if isinstance(error, RaycloudError) else f"{type(error).__name__}: "
            _LOG.warning("the new version is refused, the served one goes on: %s%s", kind, first_line(error))
        else:
            if version.model.fingerprint != self.served.current.model.fingerprint:
                self._replaced.append((weakref.ref(self.served.current), self._weight))
                self.served.replace(version.model)
                self._weight = version.weight
                self._notify(f"version {self.served.current.version} of '{self._folder}' answers from now on")
        self._tried = state

    def _free_replaced(self) -> None:
        """Return the memory of versions whose last request has ended."""
        ended = [weight for runner, weight in self._replaced if runner() is None]
        if any(weight() is not None for weight in ended):
            gc.collect()  # the modules refer to each other, as those of Mamba do
        if ended:
            _return_memory()
        self._replaced = [(runner, weight) for runner, weight in self._replaced if runner() is not None]

    def _load(self, state: FolderState) -> _Version:
        """Load a version into memory of its own, and generate with it.

        Args:
            state: state of its files.

        Raises:
            _FilesChanged: the files are no longer in that state, so what was read may be of two versions.
            ModelError: it cannot be loaded, or its weights are not all finite.
        """
        try:
            part = load_whole_part(str(self._folder), self._notify)
            copy_parameters([part.first, part.last])  # whoever writes to the files must not change a served version
            if not all(all_finite(dict(segment.named_parameters())) for segment in (part.first, part.last)):
                raise ModelError(f"'{self._folder}' holds weights that are not finite")
            model = text_model(part, local_split_model(part))
            for _ in model.source.tokens([0], _PROBE_TOKENS, Decoding()):
                pass
        except Exception as error:
            if folder_state(self._folder) != state:
                raise _FilesChanged from error
            raise
        if folder_state(self._folder) != state:
            raise _FilesChanged
        return _Version(model, model_settings(part.config.to_dict()), weakref.ref(next(part.first.parameters())))

    def _check_fits(self, new: _Version) -> None:
        """Refuse another model: prompts as token ids, templates and limits of clients would not fit it.

        Raises:
            ModelError: it differs from the served one in more than its weights.
        """
        served = self.served.current.model
        odd = sorted(key for key in self._settings | new.settings if self._settings.get(key) != new.settings.get(key))
        if odd:
            had, has = self._settings.get(odd[0]), new.settings.get(odd[0])
            what = f"{CONFIG} has {odd[0]} {has!s:.80}, the served model {had!s:.80}"
        elif new.model.tokenizer.get_vocab() != served.tokenizer.get_vocab():
            what = "its tokenizer has another vocabulary than the served model's"
        elif new.model.tokenizer.chat_template != served.tokenizer.chat_template:
            what = "its chat template is not the served model's"
        elif new.model.ends != served.ends:
            what = f"its texts end with tokens {sorted(new.model.ends)}, the served model's with {sorted(served.ends)}"
        else:
            return
        raise ModelError(f"'{self._folder}' holds another model: {what}; start another server for it")
