"""Fingerprints of weights change with every byte."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from raycloud.models.checkpoint import Checkpoint
from raycloud.models.weights import fingerprint, tensor_digest
from tests.models.families import tiny


def test_a_fingerprint_sees_the_last_bit_of_every_value() -> None:
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        before = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
        seen = set()
        for place in range(0, 2000, 97):
            after = before.clone()
            after.view(bits).view(-1)[place] ^= 1
            seen.add(fingerprint({"weight": after}))
        assert len(seen) == len(range(0, 2000, 97)) and fingerprint({"weight": before}) not in seen, dtype


def test_a_fingerprint_sees_names_and_shapes_and_not_how_wide_values_are_held() -> None:
    weight = torch.randn(4, 6).bfloat16()
    assert fingerprint({"a": weight}) != fingerprint({"b": weight})
    assert fingerprint({"a": weight}) != fingerprint({"a": weight.reshape(6, 4)})
    assert fingerprint({"a": weight}) == fingerprint({"a": weight.float()})
    assert tensor_digest(weight) != tensor_digest(weight.float())
    assert tensor_digest(weight.t()) == tensor_digest(weight.t().contiguous())
    assert len({tensor_digest(torch.tensor(value)) for value in (0.0, -0.0, 1.0)}) == 3


def test_a_checkpoint_has_another_fingerprint_for_any_byte(tmp_path: Path) -> None:
    """Regression: an earlier fingerprint sampled values, and such a value of a matrix was not among them."""
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    before = Checkpoint(str(tmp_path)).fingerprint
    assert Checkpoint(str(tmp_path)).fingerprint == before
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"].view(torch.int32)[5, 3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert Checkpoint(str(tmp_path)).fingerprint != before
    config = tmp_path / "config.json"
    same = Checkpoint(str(tmp_path)).fingerprint
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert Checkpoint(str(tmp_path)).fingerprint != same
