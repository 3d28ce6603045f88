"""Bottleneck of a cut: an encoder before hidden states are sent, and a decoder on the other side.

The low-rank bottleneck keeps the residual stream: few numbers ``z = E (x - mean)`` are sent, and ``D z + mean``
replaces ``x`` in all that follows. Both maps begin as the main directions of calibration hidden states and are then
trained, each by its own side and independently. The published cut (Split Fine-Tuning, arXiv 2211.16703) lies inside a
block, at the first matrix of its feed-forward part, and drops the residual; it exists for comparison.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from raycloud.errors import ModelError
from raycloud.link.codecs.transforms import random_orthogonal
from raycloud.models.segments import Segment

_SAFETENSORS_HEADER_BYTES = 1024
"""More than the header of a decoder's three tensors takes."""


@dataclass(frozen=True)
class Bottleneck:
    """Encoder and decoder of a cut, for hidden states (n, d) and codes (n, width); a code is rank and outliers."""

    encoder: nn.Module
    decoder: nn.Module
    width: int
    num_outliers: int = 0
    """Number of outliers: the first coordinates of a code, far larger than the others."""


class LowRankEncoder(nn.Module):
    """Encoder of hidden states (n, d) as m unchanged coordinates and r coefficients of the rest: (n, m + r).

    Args:
        basis: (d, r) orthonormal basis.
        mean: (d,) mean, subtracted first.
        apart: (m,) indices of the unchanged coordinates.
    """

    def __init__(self, basis: Tensor, mean: Tensor, apart: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(basis.T.contiguous())
        self.mean = nn.Parameter(mean.clone())
        self.apart: Tensor
        self.register_buffer("apart", apart)

    def forward(self, hidden: Tensor) -> Tensor:
        """Encode (n, d) as (n, m + r)."""
        centred = hidden - self.mean
        rest = centred.index_fill(1, self.apart, 0.0)
        return torch.cat([centred[:, self.apart], rest @ self.weight.T], dim=1)


class LowRankDecoder(nn.Module):
    """Decoder of codes (n, m + r) to hidden states (n, d); see :class:`LowRankEncoder`."""

    def __init__(self, basis: Tensor, mean: Tensor, apart: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(basis.clone())
        self.mean = nn.Parameter(mean.clone())
        self.apart: Tensor
        self.register_buffer("apart", apart)

    def forward(self, numbers: Tensor) -> Tensor:
        """Decode (n, m + r) to (n, d)."""
        outliers, coefficients = numbers.split([len(self.apart), self.weight.shape[1]], dim=1)
        hidden = coefficients @ self.weight.T + self.mean
        return hidden.index_add(1, self.apart, outliers)


def empty_bottleneck(hidden_size: int, numbers: int, num_outliers: int) -> Bottleneck:
    """Bottleneck before fitting, all zeros: codes of ``numbers`` numbers, first ``num_outliers`` coordinates."""
    tensors = (
        torch.zeros(hidden_size, numbers - num_outliers),
        torch.zeros(hidden_size),
        torch.zeros(num_outliers, dtype=torch.long),
    )
    return Bottleneck(LowRankEncoder(*tensors), LowRankDecoder(*tensors), numbers, num_outliers)


def decoder_to_bytes(decoder: nn.Module) -> bytes:
    """Encode a decoder as safetensors, for the other side."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()})


def max_decoder_bytes(hidden_size: int) -> int:
    """Upper bound of the bytes of a decoder of codes of up to ``2 * hidden_size`` numbers."""
    return 8 * hidden_size * hidden_size + 20 * hidden_size + _SAFETENSORS_HEADER_BYTES


def load_decoder_bytes(decoder: nn.Module, raw: bytes) -> None:
    """Load a decoder from a result of :func:`decoder_to_bytes`.

    Raises:
        ValueError: the bytes are no safetensors, or of another bottleneck.
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
        raise ValueError("the decoder names coordinates that hidden states do not have")
    decoder.load_state_dict(given)


def identity_bottleneck(width: int) -> Bottleneck:
    """Bottleneck that leaves hidden states unchanged: plain split learning."""
    return Bottleneck(nn.Identity(), nn.Identity(), width)


def principal_directions(centred: Tensor, rank: int) -> Tensor:
    """Orthonormal basis (d, rank) with the least squared error for centred hidden states (n, d)."""
    centred = centred.double()
    return torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :rank].float().contiguous()


def fit_low_rank(hidden: Tensor, rank: int, num_outliers: int = 0, *, rotate: bool = False) -> Bottleneck:
    """Fit a bottleneck to calibration hidden states: their mean, ``rank`` main directions and largest coordinates.

    Args:
        hidden: hidden states (n, d).
        rank: number of coefficients.
        num_outliers: number of coordinates sent unchanged.
        rotate: rotate the directions within their span so that all have coefficients of similar size, for wire dtypes
            whose few steps share a scale.

    Raises:
        ModelError: rank or ``num_outliers`` exceed the width.
    """
    width = hidden.shape[1]
    check_sizes(width, rank, num_outliers)
    hidden = hidden.detach().float()
    mean = hidden.mean(dim=0)
    centred = hidden - mean
    largest = centred.abs().amax(dim=0).argsort(descending=True, stable=True)[:num_outliers]
    apart = largest.sort().values
    basis = principal_directions(centred.index_fill(1, apart, 0.0), rank)
    if rotate:
        basis = basis @ random_orthogonal(rank, torch.Generator().manual_seed(0))
    return Bottleneck(
        LowRankEncoder(basis, mean, apart), LowRankDecoder(basis, mean, apart), num_outliers + rank, num_outliers
    )


def check_sizes(width: int, rank: int, num_outliers: int) -> None:
    """Raise ModelError if ``rank`` or ``num_outliers`` do not fit hidden states of ``width`` numbers."""
    if not 1 <= rank <= width or not 0 <= num_outliers < width:
        raise ModelError(
            f"rank={rank} and num_outliers={num_outliers} for hidden states of {width} numbers; allowed: up to {width}"
        )


class _Residual(nn.Module):
    """Output of a feed-forward part that is left out: the part's input."""

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        return hidden


def _attention_half(block: nn.Module) -> nn.Module:
    """Copy of a BERT block without its feed-forward part; weights are shared.

    The block's own forward stays, as families call and return different things.
    """
    half = copy.copy(block)
    for name in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
        half.__dict__[name] = copy.copy(block.__dict__[name])
    half._modules |= {"intermediate": nn.Identity(), "output": _Residual()}
    return half


def _has_bert_end(block: Any) -> bool:
    """Tell whether the feed-forward part of a block is that of BERT, with its norm at the end."""
    weighted = {
        part: {name for name, _ in getattr(block, part).named_children() if name in ("dense", "LayerNorm")}
        for part in ("intermediate", "output")
        if isinstance(getattr(block, part, None), nn.Module)
    }
    return weighted == {"intermediate": {"dense"}, "output": {"dense", "LayerNorm"}}


class _FeedForwardHalf(nn.Module):
    """Feed-forward part of a BERT block from the left factor of its first matrix on, without the residual connection.

    Args:
        block: block that gives everything but the first matrix.
        left: (inner width, r), left factor of that matrix's singular value decomposition.
    """

    def __init__(self, block: Any, left: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.bias = nn.Parameter(block.intermediate.dense.bias.detach().clone())
        self.activation = block.intermediate.intermediate_act_fn
        self.output = block.output

    def forward(self, numbers: Tensor) -> Tensor:
        """Decode (n, r) to (n, d)."""
        inner = self.activation(numbers @ self.left.T + self.bias)
        return self.output.LayerNorm(self.output.dropout(self.output.dense(inner)))


class _SvdEncoder(nn.Module):
    """Encoder: the decomposition's right factor, then its singular values as a full matrix, trained as published."""

    def __init__(self, values: Tensor, right: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.diag(values))
        self.right = nn.Parameter(right)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.right.T @ self.values.T


def sft_bottleneck(first: Segment, rank: int) -> Bottleneck:
    """Bottleneck of the published cut inside the last block of the edge's first part.

    In ``first`` this block is replaced by its attention half.

    Raises:
        ModelError: the model family has no such block, or the edge has no block.
    """
    block: Any = first.blocks[-1] if len(first.blocks) else None
    if block is None or first.causal or not _has_bert_end(block):
        raise ModelError(
            "the published cut (uplink.kind=sft) is for encoders of the BERT family, whose blocks have "
            "intermediate.dense, output.dense and output.LayerNorm, with start_block >= 1; got "
            f"'{first.config.model_type}' and start_block={len(first.blocks)}; allowed: low_rank or plain"
        )
    matrix = block.intermediate.dense.weight.detach()
    if not 1 <= rank <= min(matrix.shape):
        raise ModelError(f"rank={rank}; allowed: 1 to {min(matrix.shape)}")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    decoder = _FeedForwardHalf(block, left[:, :rank].contiguous())
    first.blocks[-1] = _attention_half(block)
    return Bottleneck(_SvdEncoder(values[:rank], right[:rank].contiguous()), decoder, rank)
