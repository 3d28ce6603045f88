"""Segments over every cut reproduce the unsplit model, with and without a cache, for every layout of the fast path."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.models.attention import SDPA
from raycloud.models.cache import KVCache
from raycloud.models.segments import Segment
from tests.models.families import FAMILIES, final, tiny


def tolerance(family: str) -> float:
    """Tolerance: RMSNorm and OPT's eager softmax compute in float32 for any dtype, so its epsilon is the best
    possible."""
    return 1e-9 if family.startswith(("gpt2", "bert")) else 1e-5


DECODERS = [name for name in FAMILIES if name != "bert"]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def three_parts(model: PreTrainedModel, first: int, second: int) -> list[Segment]:
    middle = Segment(model, first, second, embed=False, head=False)
    return [Segment(model, 0, first, head=False), middle, Segment(model, second, 6, embed=False)]


def chain(parts: list[Segment], x: Tensor, caches: list[KVCache] | None = None, valid: Tensor | None = None) -> Tensor:
    for index, part in enumerate(parts):
        x = part(x, valid=valid, cache=caches[index] if caches else None)
    return x


def text(length: int = 40, batch: int = 2) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_prefills_like_the_unsplit_model(family: str, attention: str) -> None:
    model, ids = tiny(family, attention=attention), text()
    with torch.no_grad():
        reference = final(model, ids)
        for first, second in itertools.combinations_with_replacement(range(7), 2):
            parts = three_parts(model, first, second)
            assert relative(chain(parts, ids), reference) <= tolerance(family), (first, second)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_cut_decodes_uneven_chunks_like_the_unsplit_model(family: str, attention: str) -> None:
    model, ids = tiny(family, attention=attention), text()
    with torch.no_grad():
        reference = final(model, ids)
        for first, second in itertools.combinations_with_replacement(range(7), 2):
            parts = three_parts(model, first, second)
            caches = [KVCache() for _ in parts]
            chunks = [chain(parts, chunk, caches) for chunk in ids.split([9, 1, 1, 13, 2, 1, 13], dim=1)]
            assert relative(torch.cat(chunks, dim=1), reference) <= tolerance(family), (first, second)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family: str, side: str, attention: str) -> None:
    model = tiny(family, attention=attention)
    lengths, width = (5, 23, 30), 30
    texts = [text(length, batch=1) for length in lengths]
    ids, valid = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.bool)
    for row, one in enumerate(texts):
        where = slice(width - one.shape[1], width) if side == "left" else slice(0, one.shape[1])
        ids[row, where], valid[row, where] = one[0], True
    with torch.no_grad():
        batch = chain([Segment(model, 0, 2), Segment(model, 2, 6)], ids, valid=valid)
        for row, one in enumerate(texts):
            assert relative(batch[row][valid[row]], final(model, one)[0]) <= tolerance(family)


@pytest.mark.parametrize("family", DECODERS)
def test_ragged_batch_decodes_like_each_text_alone(family: str) -> None:
    """Left-padded prompts of different lengths, followed by one token at a time."""
    model = tiny(family)
    texts = [text(5, 1), text(12, 1)]
    whole = Segment(model)
    ids, valid = torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.bool)
    ids[0, 7:], valid[0, :7], ids[1] = texts[0][0], False, texts[1][0]
    more, cache = text(6, 2), KVCache()
    with torch.no_grad():
        whole(ids, valid=valid, cache=cache)
        steps = torch.cat([whole(more[:, i : i + 1], cache=cache) for i in range(6)], dim=1)
        for row, one in enumerate(texts):
            reference = model(input_ids=torch.cat([one, more[row : row + 1]], dim=1)).logits[0, -6:]
            assert relative(steps[row], reference) <= tolerance(family)


def test_cropped_cache_goes_on_as_if_nothing_had_followed() -> None:
    family = "gemma3"
    model, ids = tiny(family), text()
    whole, cache = Segment(model), KVCache()
    with torch.no_grad():
        whole(ids, cache=cache)
        cache.crop(20)
        again = whole(ids[:, 20:], cache=cache)
        assert relative(again, model(input_ids=ids).logits[:, 20:]) <= tolerance(family)
    with pytest.raises(ValueError, match="between 0 and 40"):
        cache.crop(41)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_unsplit_model(family: str) -> None:
    """Segments share the model's modules, so one backward pass fills the same ``grad`` fields."""
    model, ids = tiny(family), text(20)
    final(model, ids).logsumexp(-1).sum().backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chain([Segment(model, 0, 2), Segment(model, 2, 5), Segment(model, 5, 6)], ids).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        if name in reference and reference[name].norm() > 1e-8:
            assert parameter.grad is not None and relative(parameter.grad, reference[name]) <= tolerance(family), name


@pytest.mark.parametrize(("lo", "hi"), [(-1, 3), (4, 3), (0, 7)])
def test_bounds_are_checked(lo: int, hi: int) -> None:
    with pytest.raises(ValueError, match="0 <= lo <= hi <= 6"):
        Segment(tiny("llama"), lo, hi)


def test_middle_segment_has_no_head() -> None:
    part = Segment(tiny("llama"), 1, 3)
    assert part.head is None and not any(isinstance(one, torch.nn.Embedding) for one in part.modules())
    with pytest.raises(ValueError, match="holds no head"):
        part.logits(torch.zeros(1, 1, 32, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_on_a_gpu_say_what_the_unsplit_model_says_on_the_cpu(family: str) -> None:
    model, ids = tiny(family), text()
    with torch.no_grad():
        reference = final(model, ids)
        model.to("cuda")
        ours = chain(three_parts(model, 2, 4), ids.to("cuda")).cpu()
    assert relative(ours, reference) <= 1e-5


@torch.no_grad()
def test_the_librarys_own_forward_masks_padding_and_windows_with_our_attention() -> None:
    """A custom attention function gets a mask only if a mask function is registered under its name."""
    model, ids = tiny("gemma3"), text()
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, :7] = False
    reference = model(input_ids=ids, attention_mask=valid.long()).logits
    model.set_attn_implementation(SDPA)
    assert relative(model(input_ids=ids, attention_mask=valid.long()).logits[valid], reference[valid]) <= 1e-9
