"""The narrow cut: what becomes of rows before they cross, and what the other side makes of it.

Ours keeps the residual stream: few numbers ``z = E (x - mean)`` cross, and ``D z + mean`` takes the place of ``x`` for
all that follows. Both maps begin as the main directions of calibration rows and are then trained, each by its own side
and each for itself. The published cut (Split Fine-Tuning, arXiv 2211.16703) lies inside a block, at the first matrix of
its feed-forward part, and drops the residual; it is here to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from raycloud.errors import ModelError
from raycloud.link.codecs.fitting import principal_directions
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class Code:
    """Both ends of a cut, for rows (n, d) and numbers (n, width)."""

    encoder: nn.Module
    decoder: nn.Module
    width: int
    apart: int = 0
    """How many of the numbers, the first ones, are far larger than the others."""


class Encoder(nn.Module):
    """Rows (n, d) to m coordinates as they are and r coefficients of the rest, (n, m + r).

    Args:
        basis: (d, r) orthonormal.
        mean: (d,) subtracted first.
        apart: (m,) coordinates.
    """

    def __init__(self, basis: Tensor, mean: Tensor, apart: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(basis.T.contiguous())
        self.mean = nn.Parameter(mean.clone())
        self.apart: Tensor
        self.register_buffer("apart", apart)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, d) to (n, m + r)."""
        centred = rows - self.mean
        rest = centred.index_fill(1, self.apart, 0.0)
        return torch.cat([centred[:, self.apart], rest @ self.weight.T], dim=1)


class Decoder(nn.Module):
    """The way back; see :class:`Encoder`."""

    def __init__(self, basis: Tensor, mean: Tensor, apart: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(basis.clone())
        self.mean = nn.Parameter(mean.clone())
        self.apart: Tensor
        self.register_buffer("apart", apart)

    def forward(self, numbers: Tensor) -> Tensor:
        """(n, m + r) to (n, d)."""
        outliers, coefficients = numbers.split([len(self.apart), self.weight.shape[1]], dim=1)
        rows = coefficients @ self.weight.T + self.mean
        return rows.index_add(1, self.apart, outliers)


def blank(width: int, numbers: int, apart: int) -> Code:
    """Both ends as they are before one is fitted: ``numbers`` numbers, the first ``apart`` of them coordinates."""
    tensors = torch.zeros(width, numbers - apart), torch.zeros(width), torch.zeros(apart, dtype=torch.long)
    return Code(Encoder(*tensors), Decoder(*tensors), numbers, apart)


def tensors_of(decoder: nn.Module) -> bytes:
    """A decoder as safetensors, for the side that it is made for."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()})


def load_decoder(decoder: nn.Module, raw: bytes) -> None:
    """Fill a decoder with what :func:`tensors_of` gave.

    Raises:
        ValueError: it is no safetensors, or of another code.
    """
    try:
        given = load(raw)
    except SafetensorError as error:
        raise ValueError(f"the decoder cannot be read: {error}") from None
    wanted = decoder.state_dict()
    odd = given.keys() ^ wanted.keys() or {name for name in wanted if given[name].shape != wanted[name].shape}
    if odd or not all(bool(tensor.isfinite().all()) for tensor in given.values()):
        raise ValueError("the decoder's tensors are not those that were agreed on")
    apart = given.get("apart")
    if apart is not None and len(apart) and not 0 <= int(apart.min()) <= int(apart.max()) < len(given["mean"]):
        raise ValueError("the decoder names coordinates that rows do not have")
    decoder.load_state_dict(given)


def plain(width: int) -> Code:
    """Rows as they are: plain split learning."""
    return Code(nn.Identity(), nn.Identity(), width)


def narrow(rows: Tensor, rank: int, outliers: int = 0, *, even: bool = False) -> Code:
    """Fit a code to calibration rows (n, d): their mean, their ``rank`` main directions, their largest coordinates.

    Args:
        rows: as they come.
        rank: coefficients.
        outliers: coordinates sent apart.
        even: turn the directions among each other so that none has larger coefficients than another, for forms whose
            few steps all share a scale. They span what they did.

    Raises:
        ModelError: the rows are not so wide.
    """
    width = rows.shape[1]
    check_sizes(width, rank, outliers)
    rows = rows.detach().float()
    mean = rows.mean(dim=0)
    centred = rows - mean
    largest = centred.abs().amax(dim=0).argsort(descending=True, stable=True)[:outliers]
    apart = largest.sort().values
    basis = principal_directions(centred.index_fill(1, apart, 0.0), rank)
    if even:
        basis = basis @ _turn(rank)
    return Code(Encoder(basis, mean, apart), Decoder(basis, mean, apart), outliers + rank, outliers)


def check_sizes(width: int, rank: int, outliers: int) -> None:
    """Raises ModelError where rows of ``width`` numbers have no such code."""
    if not 1 <= rank <= width or not 0 <= outliers < width:
        raise ModelError(f"rank={rank} and outliers={outliers} for rows of {width} numbers; allowed: up to {width}")


def _turn(size: int) -> Tensor:
    """A random orthogonal matrix (size, size), always the same."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn)[0].float()


class _AttentionHalf(nn.Module):
    """A BERT block up to its feed-forward part."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attention = block.attention

    def forward(self, rows: Tensor, **arguments: Any) -> Tensor:
        rows, _ = self.attention(rows, **arguments)
        return rows


class _FeedForwardHalf(nn.Module):
    """The feed-forward part of a BERT block from within its first matrix on, without the residual that leads around it.

    Args:
        block: gives all but the first matrix.
        left: (inner width, r), of that matrix's decomposition.
    """

    def __init__(self, block: Any, left: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.bias = nn.Parameter(block.intermediate.dense.bias.detach().clone())
        self.activation = block.intermediate.intermediate_act_fn
        self.output = block.output

    def forward(self, numbers: Tensor) -> Tensor:
        """(n, r) to (n, d)."""
        inner = self.activation(numbers @ self.left.T + self.bias)
        return self.output.LayerNorm(self.output.dropout(self.output.dense(inner)))


class _TwoMaps(nn.Module):
    """The right factor of the decomposition, then its singular values as a full matrix, both trained as published."""

    def __init__(self, values: Tensor, right: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.diag(values))
        self.right = nn.Parameter(right)

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.right.T @ self.values.T


def published(first: Segment, rank: int) -> Code:
    """The published cut inside the last block of the edge's first part, which is left with half of that block.

    Raises:
        ModelError: the family has no such block, or the edge has no block.
    """
    block: Any = first.blocks[-1] if len(first.blocks) else None
    if block is None or first.anatomy.causal or not hasattr(block, "intermediate"):
        raise ModelError("the published cut (cut.kind=sft) is for encoders of the BERT family with split >= 1")
    matrix = block.intermediate.dense.weight.detach()
    if not 1 <= rank <= min(matrix.shape):
        raise ModelError(f"rank={rank}; allowed: 1 to {min(matrix.shape)}")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    decoder = _FeedForwardHalf(block, left[:, :rank].contiguous())
    first.blocks[-1] = _AttentionHalf(block)
    return Code(_TwoMaps(values[:rank], right[:rank].contiguous()), decoder, rank)
