"""Constrained generation always gives valid JSON."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from raycloud.errors import MissingExtra
from raycloud.models.constraints import Grammars
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.sampling import Sampler, Sampling

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def grammars(smol: PreTrainedTokenizerBase) -> Grammars:
    return Grammars(smol, {smol.eos_token_id, 0})


def test_random_logits_make_json_of_the_schema(smol: PreTrainedTokenizerBase, grammars: Grammars) -> None:
    said = set()
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        how = Sampling(temperature=1.0, seed=seed)
        ends = {smol.eos_token_id, 0}
        sampler = Sampler(how, torch.device("cpu"), [5, 6], ends, grammars.json(SCHEMA))
        ids = []
        # More logits than tokens, as models have that pad their vocabulary.
        while (token := sampler.pick(4 * torch.randn(len(smol) + 64, generator=random))) not in ends:
            ids.append(token)
        made = json.loads(smol.decode(ids))
        assert set(made) == {"name", "age"} and made["name"] in ("Ada", "Bob") and 0 <= made["age"] <= 130
        said.add(made["name"])
    assert said == {"Ada", "Bob"}


@pytest.mark.parametrize(
    ("schema", "words"), [({"type": "nope"}, "Invalid type"), ({"$ref": "http://x/y"}, "http://x/y")]
)
def test_what_is_no_schema(grammars: Grammars, schema: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        grammars.json(schema)
    assert "\n" not in str(caught.value)


def test_the_library_is_an_extra(smol: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(MissingExtra, match=r"raycloud\[constrained\]"):
        Grammars(smol, {0}).json(SCHEMA)
