"""Loading of a model's parts from a checkpoint, against the library's loading of the whole, bit for bit."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.chain import BlockChain, find_chain
from raycloud.models.checkpoint import Checkpoint, empty_model, load_tensors
from raycloud.models.loading import quiet_transformers
from raycloud.models.tensor_check import match_tensors
from raycloud.models.twin import auto_class

CPU = torch.device("cpu")
START, END = 1, 3


class _RecordingCheckpoint(Checkpoint):
    """Checkpoint that records the names of the tensors that are read."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.read = set[str]()

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        with super().reader() as read:

            def recorded(name: str) -> Tensor:
                self.read.add(name)
                return read(name)

            yield recorded


def compare_parts(model: PreTrainedModel) -> list[str]:
    """Save a model, and load it whole and in three parts; return what differs from the library's loading.

    Each part must read its stored tensors only, and leave all others without memory.
    """
    attention = model.config._attn_implementation
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        stock = auto_class(model.config).from_pretrained(folder, dtype=model.dtype, attn_implementation=attention)
        reference = {**stock.state_dict(), **dict(stock.named_buffers())}
        checkpoint = _RecordingCheckpoint(folder)

        def load(modules: Callable[[PreTrainedModel], list[nn.Module]]) -> tuple[list[str], set[str]]:
            empty = empty_model(
                stock.config, dtype=model.dtype, attention=attention, device=CPU, names=checkpoint.tensors
            )
            held = {id(one) for module in modules(empty) for one in (*module.parameters(), *module.buffers())}
            saved = empty.state_dict(keep_vars=True)
            wanted = {name for name, tensor in saved.items() if id(tensor) in held}
            checkpoint.read.clear()
            load_tensors(empty, match_tensors(empty, checkpoint, modules(empty)), checkpoint, CPU)
            loaded = {**empty.state_dict(), **dict(empty.named_buffers())}
            return list(_differences(loaded, reference, outside=saved.keys() - wanted)), set(checkpoint.read)

        try:
            found, read = load(lambda empty: [empty])
            if read != set(checkpoint.tensors):
                found.append(f"{len(checkpoint.tensors.keys() - read)} stored tensors are not read")
            chain, shared = find_chain(model), _shared(model, checkpoint)
            reads = list[set[str]]()
            for index in range(3):
                said, read = load(lambda empty, index=index: _parts(empty)[index])  # type: ignore[misc]
                found += [f"part {index}: {one}" for one in said]
                reads.append(read)
        except ModelError as error:
            return [str(error)]
        if set.union(*reads) != set(checkpoint.tensors):
            found.append(f"no part reads {min(checkpoint.tensors.keys() - set.union(*reads))}")
        inside = {name for name in checkpoint.tensors if _inside(name, chain)}
        strangers = (reads[1] ^ inside) | ((reads[0] | reads[2]) & inside)
        return found + [f"{name} is read by another part" for name in strangers - shared]


def _differences(loaded: dict[str, Tensor], reference: dict[str, Tensor], outside: set[str]) -> Iterator[str]:
    for name in sorted(loaded.keys() ^ reference.keys()):
        yield f"{name} is only in one of the two"
    for name in loaded.keys() & reference.keys():
        ours, theirs = loaded[name], reference[name]
        if name in outside:
            if not ours.is_meta:
                yield f"{name} is loaded"
        elif ours.is_meta:
            yield f"{name} is not loaded"
        elif ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            yield f"{name} differs"


def _parts(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Modules of three parts: what is registered before the chain of blocks goes with its first ones."""
    chain = find_chain(model)
    first, last = list[nn.Module](), list[nn.Module]()
    behind = False
    for path, module in model.named_modules():
        behind = behind or path == chain.path
        if path == chain.path or path.startswith(chain.path + ".") or chain.path.startswith(path + ".") or not path:
            continue
        (last if behind else first).append(module)
    blocks: Sequence[nn.Module] = list(chain.blocks)
    return [*first, *blocks[:START]], [*blocks[START:END]], [*blocks[END:], *last]


def _shared(model: PreTrainedModel, checkpoint: Checkpoint) -> set[str]:
    """Stored tensors that the model ties with others: several parts may read them."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    return {
        stored for name, source in match_tensors(model, checkpoint).items() if name in tied for stored in source.stored
    }


def _inside(name: str, chain: BlockChain) -> bool:
    """Return whether a stored tensor is of one of the blocks of the part in the middle."""
    found = re.search(rf"(?:^|\.){re.escape(chain.path.rpartition('.')[2])}\.(\d+)\.", name)
    return found is not None and START <= int(found.group(1)) < END
