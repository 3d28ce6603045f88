"""Tokenisation of rows by ``ray.data`` on the whole cluster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import encode
from raycloud.data.recipe import DataRecipe
from raycloud.data.splits import Row
from raycloud.data.tokens import token_table, write_tokens
from raycloud.errors import DataError

_BLOCK = 2048
"""Number of rows that are tokenised together."""


def tokenise(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: DataRecipe, path: Path) -> int:
    """Write the samples of some rows, in the order of the rows, and return the number of samples.

    The work is spread over the cluster by ``ray.data``.

    Raises:
        DataError: no row has a token to predict.
    """
    blocks = [rows[at : at + _BLOCK] for at in range(0, len(rows), _BLOCK)]
    # A data set uses the options that are set when it is created: set later, blocks come in the order of completion.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    # Pass block numbers, not the rows' columns, which may hold any type.
    work = ray.data.from_items([{"block": number} for number in range(len(blocks))], override_num_blocks=len(blocks))
    shared = [ray.put(block) for block in blocks]
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its own progress bars are off

    def samples(some: dict[str, Any]) -> pa.Table:
        (number,) = some["block"]
        try:
            return token_table(
                encode(
                    ray.get(shared[number]),
                    tokenizer,
                    data.format,
                    max_length=data.max_length,
                    max_prompt_length=data.max_prompt_length,
                    bos=data.bos,
                )
            )
        except DataError:  # none in this block; the case that no block has any is checked below
            return token_table([])

    found = work.map_batches(samples, batch_size=1, num_cpus=0.25)
    tables = [block for ref in found.to_arrow_refs() if len(block := ray.get(ref))]
    if not tables:
        raise DataError(f"no row of {len(rows)} leaves a token to predict within max_length={data.max_length}")
    write_tokens(path, tables)
    return sum(len(one) for one in tables)
