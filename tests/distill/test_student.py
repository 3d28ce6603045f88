"""Equality of tokenizers, and the files that a student keeps of its source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from raycloud.distill.objectives import DIVERGENCES
from raycloud.distill.recipe import ObjectiveRecipe, StudentRecipe
from raycloud.distill.student import build_student, check_objective, differing_tokenizer, initial_student
from raycloud.models.loading import Pretrained, load_tokenizer
from raycloud.models.weights import weights_of
from raycloud.training.lora import save_model
from tests.tokenizers import EOS, GEMMA, TURN, tokenizer_of

TINYLLAMA = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "tinyllama-1.1b-3T"


def saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Make a model directory with only the files of a tokenizer."""
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    return str(folder)


def test_tokenizers_that_differ_in_the_name_of_eos_are_one(tmp_path: Path) -> None:
    """Base and instruct models of most families differ in this way."""
    teacher = tokenizer_of(template=GEMMA, eos_token="<end_of_turn>")
    base = StudentRecipe(model=saved(tmp_path / "base", tokenizer_of()))
    assert differing_tokenizer(base, teacher) is None
    for name in DIVERGENCES:
        objective = ObjectiveRecipe.model_validate({"kd": {"name": name}})
        check_objective(objective, two_tokenizers=differing_tokenizer(base, teacher) is not None)


def test_a_token_more_makes_another_tokenizer(tmp_path: Path) -> None:
    more = tokenizer_of()
    more.add_tokens(["<another>"])
    assert differing_tokenizer(StudentRecipe(model=saved(tmp_path / "more", more)), tokenizer_of()) is not None


def test_a_published_tokenizer_with_another_eos_is_the_same(tmp_path: Path) -> None:
    if not TINYLLAMA.is_dir():
        pytest.skip(f"no tokenizer at '{TINYLLAMA}'")
    teacher = load_tokenizer(str(TINYLLAMA))
    teacher.eos_token = "<unk>"
    assert teacher.eos_token_id != load_tokenizer(str(TINYLLAMA)).eos_token_id
    assert differing_tokenizer(StudentRecipe(model=str(TINYLLAMA)), teacher) is None


def test_a_saved_student_has_all_ends_of_its_teacher(tmp_path: Path) -> None:
    """EOS ids from the generation configuration, the end of turn in the template, and the tokenizer."""
    tokenizer = tokenizer_of(template=GEMMA)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [EOS, 9]
    recipe = StudentRecipe(blocks=[1])
    made, _ = initial_student(Pretrained(model, tokenizer, "teacher"), recipe, lambda tokenizer: [], "cpu")
    # On its way from the cloud to an edge and back it is a configuration and weights.
    student = build_student(made.config, weights_of(made), {}, recipe, torch.device("cpu"))
    save_model(student, tokenizer, tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert loaded.generation_config.eos_token_id == [EOS, TURN, 9]
