"""Token file: a tokenised data set in one Arrow file that processes memory-map, for random access without copies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from raycloud.data.batches import Sample
from raycloud.durable import write_atomically
from raycloud.errors import DataError

_SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("prompt", pa.int32())])


def token_table(samples: Iterable[Sample]) -> pa.Table:
    """Table of samples in the schema of the file."""
    some = list(samples)
    return pa.table([[one.ids for one in some], [one.prompt for one in some]], schema=_SCHEMA)


def write_tokens(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of :func:`token_table` to one file, one after the other."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as file:
        for one in tables:
            file.write_table(one.cast(_SCHEMA))
    write_atomically(path, sink.getvalue().to_pybytes())


class TokenFile:
    """Samples of a file of :func:`write_tokens`.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                whole = pa.ipc.open_file(source).read_all().combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"cannot read the tokens '{path}': {str(error).splitlines()[0]}") from error
        ids = whole["ids"].chunk(0)
        self._offsets, self._ids = ids.offsets.to_numpy(), ids.values.to_numpy()
        self._prompts = whole["prompt"].to_numpy()

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Sample:
        begin, end = self._offsets[index], self._offsets[index + 1]
        return Sample(tuple(self._ids[begin:end].tolist()), int(self._prompts[index]))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sample (n,)."""
        return np.diff(self._offsets)

    @property
    def targets(self) -> np.ndarray:
        """Number of tokens to predict in each sample (n,)."""
        return self.lengths - np.maximum(self._prompts, 1)
