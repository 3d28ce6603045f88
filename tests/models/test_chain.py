"""Discovery of the chain of blocks in the module tree of any model."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoModel, SwinConfig

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models.chain import block_list_of, block_lists, find_chain
from tests.models.blocks import KNOWN


@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", "model.layers"), ("gpt2", "transformer.h"), ("mpt", "transformer.blocks"), ("bert", "encoder.layer")],
)
def test_the_chain_is_found_where_the_library_keeps_it(name: str, path: str) -> None:
    chain = find_chain(tiny_model(name, "eager"))
    assert chain.path == path and len(chain.blocks) == 4


def test_stages_give_way_to_the_blocks_inside_them() -> None:
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=4)
    lists = block_lists(AutoModel.from_config(config))
    assert [(chain.path, len(chain.blocks)) for chain in lists] == [
        ("encoder.layers.0.blocks", 2),
        ("encoder.layers.1.blocks", 3),
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("t5", r"a 't5' model has 2 lists of blocks \(encoder.block, decoder.block\), and one chain can be cut"),
        ("albert", r"albert_layers' of a 'albert' model holds 1 blocks, and its configuration says 4"),
    ],
)
def test_what_is_no_chain_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        find_chain(tiny_model(name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "path"), [("vit", "layers"), ("deit", "layers"), ("dinov2", "encoder.layer"), ("llama", "layers")]
)
def test_blocks_of_one_chain_can_be_cut(name: str, path: str) -> None:
    model = KNOWN[name].model()
    found = block_list_of(model)
    assert found.can_cut and find_chain(model).path == path
    assert list(found.blocks) == [f"{path}.{index}" for index in range(3)]
    assert all(model.get_submodule(path) is block for path, block in found.blocks.items())


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("swin", [f"encoder.layers.{stage}.blocks.{index}" for stage in (0, 1) for index in (0, 1)]),
        ("swinv2", [f"encoder.layers.{stage}.blocks.{index}" for stage in (0, 1) for index in (0, 1)]),
        ("t5-encoder", [f"{side}.block.{index}" for side in ("encoder", "decoder") for index in range(3)]),
    ],
)
def test_blocks_of_stages_and_of_an_encoder_with_a_decoder_are_listed_but_never_cut(
    name: str, paths: list[str]
) -> None:
    found = block_list_of(KNOWN[name].model())
    assert not found.can_cut and list(found.blocks) == paths


def test_a_model_without_blocks_has_no_list() -> None:
    model = KNOWN["llama"].model()
    model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="no list of transformer blocks is found in a 'llama' model"):
        block_list_of(model)
