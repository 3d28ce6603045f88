"""Rows to tokens, by ``ray.data`` on the whole cluster."""

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
"""Rows that are tokenised together."""


def tokenise(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: DataRecipe, path: Path) -> int:
    """Write the samples of some rows, in the rows' order; how many there are.

    The work is spread over the cluster by ``ray.data``.

    Raises:
        DataError: no row leaves a token to predict.
    """
    blocks = [rows[at : at + _BLOCK] for at in range(0, len(rows), _BLOCK)]
    # A data set keeps the options that hold when it is made: what is set later leaves blocks in the order they end in.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    # Their numbers and not their columns, which may hold anything.
    work = ray.data.from_items([{"block": number} for number in range(len(blocks))], override_num_blocks=len(blocks))
    shared = [ray.put(block) for block in blocks]
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its own bars are off

    def samples(some: dict[str, Any]) -> pa.Table:
        (number,) = some["block"]
        try:
            return token_table(
                encode(
                    ray.get(shared[number]),
                    tokenizer,
                    data.format,
                    max_length=data.max_length,
                    max_prompt=data.max_prompt,
                )
            )
        except DataError:  # none in this block; that there are none in any is found below
            return token_table([])

    found = work.map_batches(samples, batch_size=1, num_cpus=0.25)
    tables = [block for ref in found.to_arrow_refs() if len(block := ray.get(ref))]
    if not tables:
        raise DataError(f"no row of {len(rows)} leaves a token to predict within max_length={data.max_length}")
    write_tokens(path, tables)
    return sum(len(one) for one in tables)
