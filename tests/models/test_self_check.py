"""Segments of any model by the library's own forward, and the check that accepts or refuses a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models import fast_path
from raycloud.models.cache import KVCache
from raycloud.models.segments import Segment, cut_segments
from raycloud.models.self_check import check_structure, check_weights, run_parts, whole_output
from raycloud.models.stock_cache import StockCache
from raycloud.models.stock_path import AbsentBlock, StockPath

SOME = ((0, 2), (1, 3), (2, 2), (4, 4))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 96, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_oss", "bloom", "qwen3_5_text", "lfm2", "mamba"])
def test_segments_of_a_decoder_are_measured_to_make_up_the_whole(name: str) -> None:
    model = tiny_model(name, "eager")
    checked = check_structure(model, cuts=SOME, tolerance=1e-4)
    assert checked.structure.causal and checked.prefill <= 1e-6 and checked.padded <= 1e-6
    assert checked.structure.logits.kind == "head" and checked.structure.has_norm
    assert checked.decode is not None and checked.decode <= 1e-4


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "deberta-v2"])
def test_segments_of_an_encoder_keep_no_cache(name: str) -> None:
    checked = check_structure(tiny_model(name, "eager"), cuts=SOME, tolerance=1e-4)
    assert not checked.structure.causal and checked.decode is None and checked.structure.logits.kind == "none"


@pytest.mark.parametrize(
    ("name", "kind", "setting", "value"),
    [
        ("llama", "head", "", 1.0),
        ("granite", "divisor", "logits_scaling", 2.0),
        ("cohere", "factor", "logit_scale", 0.5),
        ("gemma2", "cap", "final_logit_softcapping", 30.0),
    ],
)
def test_how_logits_come_from_the_head(name: str, kind: str, setting: str, value: float) -> None:
    model = tiny_model(name, "eager")
    rule = check_structure(model, cuts=((1, 3),), tolerance=1e-4).structure.logits
    assert (rule.kind, rule.setting, rule.value(model.config)) == (kind, setting, value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zamba2", "more than hidden states: original_hidden_states would have to cross a cut"),
        ("gemma3n_text", "hidden states of 4 dimensions"),
        ("rwkv", "outside of a cache"),
        ("recurrent_gemma", "decoding in steps"),  # its state is in its modules: sessions would share it
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        check_structure(tiny_model(name, "eager"), cuts=SOME, tolerance=1e-4)
    assert "\n" not in str(raised.value)


def leak(self: AbsentBlock, *args: Any, **kwargs: Any) -> Any:
    """Forward of a stand-in that ignores the given hidden states."""
    hidden = args[0] if args else kwargs["hidden_states"]
    given = original(self, *args, **kwargs)
    return given if self._index else hidden * 1.01


original = AbsentBlock.forward


def without_mask(self: StockPath, store: KVCache, start: int, total: int) -> dict[str, Any]:
    """Arguments without what tells padding, for all but the first segment."""
    return text_arguments(self, store, start, total) if self._lo == 0 else {}


text_arguments = StockPath._text_arguments


@pytest.mark.parametrize(
    ("where", "name", "wrong", "said"),
    [
        (AbsentBlock, "forward", leak, "prefill"),
        (StockPath, "_text_arguments", without_mask, "padded batch"),
        (StockCache, "get_query_offset", lambda self, layer_idx=0: 0, "decoding in steps"),
        (StockCache, "crop", lambda self, keep: None, "decoding in steps"),
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


def test_the_fast_path_is_taken_only_where_it_is_measured_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite multiplies its embeddings in the base model's forward, which a layout of Llama's modules does not see."""
    assert check_structure(tiny_model("llama"), cuts=SOME).structure.layout == "rotary"
    granite = check_structure(tiny_model("granite"), cuts=SOME)
    assert granite.structure.layout is None and granite.fast is not None and granite.fast > 0.1
    monkeypatch.setattr(fast_path, "attention_window", lambda config, index: None)
    assert check_structure(tiny_model("gemma3_text"), cuts=SOME).structure.layout is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "roberta", "deberta-v2"])
def test_a_segment_needs_no_weights_of_others(name: str, ids: Tensor) -> None:
    model = tiny_model(name, "eager")
    structure = check_structure(model, cuts=SOME).structure.model_copy(update={"layout": None})
    with torch.no_grad():
        whole, parts = whole_output(model, structure, ids), cut_segments(model, 1, 3, structure)
        first = parts[0](ids)
        second = parts[1](first)
        assert torch.allclose(run_parts(parts, ids), whole, rtol=1e-9, atol=1e-12)
    blind = copy.deepcopy(model)
    segment = Segment(blind, 1, 3, structure=structure)
    mine = {id(parameter) for parameter in segment.parameters()}
    for parameter in blind.parameters():
        if id(parameter) not in mine:
            torch.nn.init.constant_(parameter, float("nan"))
    with torch.no_grad():
        assert torch.equal(segment.hidden(first), second)
    assert len(mine) < len(list(model.parameters())) / 1.5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_gradients_through_three_segments_are_the_wholes(name: str, ids: Tensor) -> None:
    model = tiny_model(name)
    structure = check_structure(model, cuts=SOME).structure.model_copy(update={"layout": None})
    found = []
    for run in (
        lambda: whole_output(model, structure, ids),
        lambda: run_parts(cut_segments(model, 1, 3, structure), ids),
    ):
        model.zero_grad()
        output = run()
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        found.append({key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][key], found[1][key], rtol=1e-9, atol=1e-12) for key in found[0])


def test_a_number_that_is_none_is_noticed_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """``max`` keeps the first of its values if the others are not numbers."""
    forward, calls = StockPath.finish, [0]

    def late(self: StockPath, hidden: Tensor) -> Tensor:
        calls[0] += 1
        return forward(self, hidden) * (float("nan") if calls[0] == 2 else 1.0)

    monkeypatch.setattr(StockPath, "finish", late)
    with pytest.raises(ModelError, match=r"differs from the whole by inf \(prefill\)"):
        check_structure(tiny_model("llama", "eager"), cuts=SOME, tolerance=1e-4)


def test_parts_are_compared_with_the_whole_on_real_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    structure = check_structure(model, cuts=SOME).structure
    check_weights(model, structure)
    monkeypatch.setattr(fast_path.FastPath, "finish", lambda self, hidden: hidden)
    with pytest.raises(ModelError, match="on its own weights"):
        check_weights(model, structure)


def test_a_segment_of_the_general_path_trains_and_evaluates_its_embedding(ids: Tensor) -> None:
    """Dropout behind the embedding belongs to the base model's forward, and follows the segment's mode."""
    model = tiny_model("distilbert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first = Segment(model, 0, 1)
    with torch.no_grad():
        calm = first.eval().hidden(ids)
        assert torch.equal(first.hidden(ids), calm)
        assert not torch.equal(first.train().hidden(ids), calm)
        assert torch.equal(first.eval().hidden(ids), calm)


def test_continuations_share_keys_and_values_but_no_recurrent_state(ids: Tensor) -> None:
    for name, shared in (("bloom", True), ("qwen3_5_text", False)):
        model = tiny_model(name, "eager")
        segment = Segment(model)
        assert segment.structure.layout is None and segment.structure.rolls_back is shared
        trunk = segment.new_cache()
        with torch.no_grad():
            segment.hidden(ids[:1, :8], cache=trunk)
            if not shared:
                with pytest.raises(ModelError, match="recurrent states, which several continuations"):
                    trunk.branch(3)
                continue
            others = ids[0, 8:11, None]
            found = segment(others, cache=trunk.branch(3))[:, 0]
            for row, token in enumerate(others):
                whole = model(input_ids=torch.cat([ids[:1, :8], token[None]], dim=1)).logits[0, -1]
                assert torch.allclose(found[row], whole, rtol=1e-5, atol=1e-5)
