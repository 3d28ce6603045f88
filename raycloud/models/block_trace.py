"""Trace of one block of a transformer: which linear maps feed which, read off the graph that autograd records.

The block's own forward runs once with the output of every linear map replaced by a new random leaf, so the graph falls
into pieces that begin and end at linear maps. What a map's input was computed from, and by which operations, can then
be read; gradients between a map's input and the outputs of earlier maps say which of their elements it depends on.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raycloud.errors import ModelError

LINEAR = (nn.Linear, Conv1D)
"""Classes of linear maps; the weight of a ``Conv1D`` is transposed."""
_TEXTS, _TOKENS, _SOURCE_TOKENS = 2, 16, 11


@dataclass(frozen=True)
class BlockCall:
    """Arguments of one call of a block."""

    arguments: Mapping[str, Any]
    """Arguments by name, detached; the first tensor among them holds the hidden states."""

    @property
    def hidden(self) -> str:
        """Name of the argument that holds the hidden states."""
        return next(name for name, value in self.arguments.items() if isinstance(value, Tensor))

    def to(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments with floating-point tensors copied in another data type."""
        return {name: _cast(value, dtype) for name, value in self.arguments.items()}


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear map."""

    path: str
    """Dotted path of the map below the block."""
    input: Tensor
    """Input of the map, (..., in)."""
    output: Tensor
    """Random leaf of the graph in place of the map's output, (..., out)."""


@dataclass(frozen=True)
class TracedBlock:
    """Block whose forward was recorded; a copy of the model's block."""

    block: nn.Module
    call: BlockCall
    hidden: Tensor
    """Leaf with the hidden states that enter the block, (..., d)."""
    arguments: Mapping[str, Tensor]
    """Leaves with the block's other floating-point arguments, by name."""
    calls: tuple[LinearCall, ...]
    """Calls of linear maps in the order of execution."""

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.hidden.shape[-1]

    def feeding(self, node: Node | None) -> list[LinearCall]:
        """Calls of linear maps whose outputs a node of the graph depends on, with no other linear map between."""
        leaves = {id(leaf) for leaf in leaves_of(node)}
        return [call for call in self.calls if id(call.output) in leaves]

    def reads_hidden(self, node: Node | None) -> bool:
        """Tell whether a node depends on the block's hidden states with no linear map between."""
        return any(leaf is self.hidden for leaf in leaves_of(node))


def block_calls(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], inputs: Mapping[str, Any] | None = None
) -> dict[str, BlockCall]:
    """Record how blocks are called in one forward of the whole model.

    Args:
        model: model with its weights.
        blocks: blocks of the model by path.
        inputs: arguments of the model's forward, which keeps no cache; None for a small random input.

    Raises:
        ModelError: the model does not run on the input, or does not call a block.
    """
    kind = model.config.model_type
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"a '{kind}' model without its weights cannot be traced")
    found: dict[str, BlockCall] = {}

    def recorder(path: str) -> Any:
        def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in found:
                found[path] = BlockCall(_detached(named_arguments(block, args, kwargs)))

        return record

    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for path, block in blocks.items():
            stack.enter_context(_hook(block.register_forward_pre_hook(recorder(path), with_kwargs=True)))
        try:
            with torch.no_grad():
                model.eval()(**(_small_input(model) if inputs is None else inputs), **without_cache(model))
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise ModelError(f"a '{kind}' model does not run on a small random input: {why}") from error
        finally:
            for module, training in modes:
                module.training = training
    for path in blocks:
        if path not in found:
            raise ModelError(f"'{path}' of a '{kind}' model does not run in a forward on a small input")
    return found


def trace_block(block: nn.Module, call: BlockCall) -> TracedBlock:
    """Trace a copy of a block with random outputs of its linear maps.

    The copy computes in ``float32``, or in ``float64`` if the block does, with the library's eager attention.

    Args:
        block: a block of a model, left as it is.
        call: arguments of a call of it.

    Raises:
        ModelError: the block does not run with them.
    """
    return _trace(measuring_copy(block), call, negative=None)


def is_odd(traced: TracedBlock, call: LinearCall, source: LinearCall) -> bool:
    """Tell whether a map's input changes its sign with the output of an earlier map, as with a factor of it.

    A map behind an activation is no such factor.
    """
    other = _trace(traced.block, traced.call, negative=source.path)
    place = next(index for index, one in enumerate(traced.calls) if one is call)
    return torch.allclose(other.calls[place].input, -call.input, rtol=1e-4)


def _trace(made: nn.Module, call: BlockCall, negative: str | None) -> TracedBlock:
    dtype = measuring_dtype(made)
    arguments = call.to(dtype)
    leaves = {
        name: value.requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    hidden = leaves.pop(call.hidden)
    generator, calls = torch.Generator().manual_seed(0), list[LinearCall]()

    def replace(path: str) -> Any:
        def replaced(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output  # a router that is a linear map and more
            # Positive numbers keep every unit of a ReLU alive, and no softmax saturates.
            leaf = (0.1 + torch.rand(output.shape, generator=generator, dtype=dtype)).to(output.device)
            leaf = -leaf if path == negative else leaf
            calls.append(LinearCall(path, args[0], leaf.requires_grad_()))
            return leaf.clone()  # a leaf could not be changed in place

        return replaced

    with ExitStack() as stack:
        for path, module in made.named_modules():
            if isinstance(module, LINEAR):
                stack.enter_context(_hook(module.register_forward_hook(replace(path))))
        try:
            with torch.enable_grad():
                made(**arguments)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise ModelError(f"a {type(made).__name__} cannot be traced: {why}") from error
    return TracedBlock(made, call, hidden, leaves, tuple(calls))


def measuring_dtype(block: nn.Module) -> torch.dtype:
    """Data type in which a copy of a block is measured: ``float64`` if it has it, otherwise ``float32``."""
    return torch.float64 if any(one.dtype == torch.float64 for one in block.parameters()) else torch.float32


def measuring_copy(block: nn.Module) -> nn.Module:
    """Copy of a block for measuring, in evaluation mode with trainable parameters and the library's eager kernels."""
    made = copy.deepcopy(block).to(measuring_dtype(block)).eval().requires_grad_(True)
    for config in configurations(made):  # copies as well, so the settings of the model's own stay
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(config, name, None) is not None:
                setattr(config, name, "eager")
    return made


def configurations(block: nn.Module) -> list[PretrainedConfig]:
    """List the configurations that the modules of a block hold, each once."""
    held = (value for module in block.modules() for value in vars(module).values())
    return list({id(value): value for value in held if isinstance(value, PretrainedConfig)}.values())


def nodes_of(node: Node | None) -> list[Node]:
    """List the nodes of a graph from one node back to the leaves, nearest first."""
    seen: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        one = waiting.pop(0)
        if one is not None and one not in seen:
            seen[one] = None
            waiting.extend(before for before, _ in one.next_functions)
    return list(seen)


def leaves_of(node: Node | None) -> list[Tensor]:
    """List the leaves that a node of a graph depends on."""
    return [one.variable for one in nodes_of(node) if one.name().endswith("AccumulateGrad")]  # type: ignore[attr-defined]


def through_softmax(node: Node | None) -> bool:
    """Tell whether a softmax lies between the leaves of a graph and one of its nodes."""
    return any("Softmax" in one.name() or "ScaledDotProduct" in one.name() for one in nodes_of(node))


def gradients(
    output: Tensor, weights: Tensor, sources: Sequence[Tensor] | Sequence[GradientEdge]
) -> list[Tensor | None]:
    """Gradients of the weighted sum of ``output`` with respect to each source; None where it does not depend on it."""
    return list(torch.autograd.grad(output, sources, weights, retain_graph=True, allow_unused=True))


def units_of_rows(call: LinearCall, source: Tensor) -> Tensor | None:
    """Element of a map's input that each element of an earlier map's output goes into, if that is all it goes into.

    Gradients of two weighted sums of the input, one with its columns also weighted by their numbers, have this number
    as their ratio where the input depends on the source element by element and token by token, as in a feed-forward
    network.

    Args:
        call: call of the map, with inputs (..., f).
        source: output of an earlier map, (..., n).

    Returns:
        Column of the input for each of the n elements, (n,); None if some go into several, or into other tokens.
    """
    count, units, rows = call.input[..., 0].numel(), call.input.shape[-1], source.shape[-1]
    if source[..., 0].numel() != count:
        return None
    generator = torch.Generator().manual_seed(1)
    weights = (0.5 + torch.rand(call.input.shape, generator=generator)).to(call.input)
    columns = torch.arange(1, units + 1).to(weights)
    tokens = torch.arange(1, count + 1).to(weights).view(*call.input.shape[:-1], 1)
    plain, by_column, by_token = (
        _gradient(call.input, weights * factor, source).reshape(count, rows) for factor in (1, columns, tokens)
    )
    column, token = by_column / plain, by_token / plain
    found = column[0].round()
    wanted = torch.arange(1, count + 1).to(weights).view(-1, 1)
    exact = (column - found).abs().max() < 0.2 and (token - wanted).abs().max() < 0.2  # False where not a number
    return found.long() - 1 if bool(exact) else None


def _gradient(output: Tensor, weights: Tensor, source: Tensor) -> Tensor:
    (found,) = gradients(output, weights, [source])
    return torch.zeros_like(source) if found is None else found


def _small_input(model: PreTrainedModel) -> dict[str, Any]:
    """Small random input of a model of texts or images."""
    config, name = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None) or 3
        if size is None:
            raise ModelError(f"image_size of a '{config.model_type}' model is not set; allowed: a number of pixels")
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(_TEXTS, channels, height, width, generator=generator)
        return {name: pixels.to(model.device, model.dtype)}
    if name != "input_ids":
        raise ModelError(f"a '{config.model_type}' model takes {name}; allowed: input_ids, pixel_values")
    top = int(config.get_text_config().vocab_size)

    def ids(tokens: int) -> Tensor:
        # The first ids are often those of padding, which is masked.
        return torch.randint(min(3, top - 1), top, (_TEXTS, tokens), generator=generator).to(model.device)

    if getattr(config, "is_encoder_decoder", False):
        return {name: ids(_SOURCE_TOKENS), "decoder_input_ids": ids(_TOKENS)}
    return {name: ids(_TOKENS)}


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Argument of a model's forward that keeps no keys and values; empty if it never does."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [one for each in inner for one in tensors_in(each)]


def named_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of a block by name."""
    names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Cache):
        return None
    if isinstance(value, Mapping):
        return {name: _detached(one) for name, one in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _cast(one, dtype) for name, one in value.items()}
    return type(value)(_cast(one, dtype) for one in value) if type(value) in (tuple, list) else value


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
