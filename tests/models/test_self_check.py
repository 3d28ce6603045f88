"""Segments of any model by the library's own forward, and the check that accepts or refuses a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models.chain import find_chain
from raycloud.models.self_check import LogitsRule, check_structure, cut_model, run_segments
from raycloud.models.stock_segment import StockCache, StockSegment, _AbsentBlock
from raycloud.models.trace import final_of, trace

SOME = ((0, 2), (1, 3), (2, 2), (4, 4))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 96, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_oss", "bloom", "qwen3_5_text", "lfm2", "mamba"])
def test_segments_of_a_decoder_are_measured_to_make_up_the_whole(name: str) -> None:
    model = tiny_model(name, "eager")
    checked = check_structure(model, cuts=SOME, tolerance=1e-4)
    assert checked.structure.causal and checked.prefill <= 1e-6 and checked.padded <= 1e-6
    assert checked.decode is not None and checked.decode <= 1e-4


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "deberta-v2"])
def test_segments_of_an_encoder_keep_no_cache(name: str) -> None:
    checked = check_structure(tiny_model(name, "eager"), cuts=SOME, tolerance=1e-4)
    assert not checked.structure.causal and checked.decode is None and checked.logits == LogitsRule("none")


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [("llama", "head", 1.0), ("granite", "factor", 0.5), ("cohere", "factor", 0.5), ("gemma2", "cap", 30.0)],
)
def test_how_logits_come_from_the_head(name: str, kind: str, value: float) -> None:
    rule = check_structure(tiny_model(name, "eager"), cuts=((1, 3),), tolerance=1e-4).logits
    assert rule.kind == kind and rule.value == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zamba2", "more than hidden states: original_hidden_states would have to cross a cut"),
        ("gemma3n_text", "hidden states of 4 dimensions"),
        ("rwkv", "without its embedding fails"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        check_structure(tiny_model(name, "eager"), cuts=SOME, tolerance=1e-4)
    assert "\n" not in str(raised.value)


def leak(self: _AbsentBlock, *args: Any, **kwargs: Any) -> Any:
    """Forward of a stand-in that ignores the given hidden states."""
    if self._index == self._segment.hi:
        return original(self, *args, **kwargs)
    return args[0] if args else kwargs["hidden_states"]


original = _AbsentBlock.forward


def without_mask(self: StockSegment, valid: Tensor, past: int, tokens: int) -> dict[str, Tensor]:
    """Arguments without what tells padding, for all but the first segment."""
    return text_arguments(self, valid, past, tokens) if self.is_first else {}


text_arguments = StockSegment.text_arguments


@pytest.mark.parametrize(
    ("where", "name", "wrong", "said"),
    [
        (_AbsentBlock, "forward", leak, "prefill"),
        (StockSegment, "text_arguments", without_mask, "padded batch"),
        (StockCache, "get_query_offset", lambda self, layer_idx=0: 0, "decoding in steps"),
    ],
)
def test_a_wrong_segment_is_noticed(
    where: Any, name: str, wrong: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", "eager")
    check_structure(model, cuts=SOME, tolerance=1e-4)
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(ModelError, match=said):
        check_structure(model, cuts=SOME, tolerance=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "roberta"])
def test_a_segment_needs_no_weights_of_others(name: str, ids: Tensor) -> None:
    model = tiny_model(name)
    structure = trace(model, find_chain(model), ids)
    with torch.no_grad():
        whole = final_of(model(input_ids=ids))
        hidden = [cut_model(model, structure, (1, 3))[0](ids)]
        hidden.append(cut_model(model, structure, (1, 3))[1](hidden[0]))
    blind = copy.deepcopy(model)
    mine = [f"{structure.chain.path}.{index}." for index in (1, 2)]
    for path, parameter in blind.named_parameters():
        if not any(path.startswith(prefix) for prefix in mine):
            torch.nn.init.constant_(parameter, float("nan"))
    middle = StockSegment(blind, replace(structure, chain=find_chain(blind)), 1, 3)
    with torch.no_grad():
        assert torch.equal(middle(hidden[0]), hidden[1])
        assert torch.allclose(run_segments(cut_model(model, structure, (1, 3)), ids), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_gradients_through_three_segments_are_the_wholes(name: str, ids: Tensor) -> None:
    model = tiny_model(name)
    structure = trace(model, find_chain(model), ids)
    found = []
    for output in (final_of(model(input_ids=ids)), run_segments(cut_model(model, structure, (1, 3)), ids)):
        model.zero_grad()
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        found.append({key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][key], found[1][key], rtol=1e-9, atol=1e-12) for key in found[0])
