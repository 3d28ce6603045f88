"""Parts of a cut model: they hold their own tensors and nothing else, exported or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raycloud.errors import ModelError, ResultError
from raycloud.models.loading import load
from raycloud.split.generation import in_process
from raycloud.split.parts import MANIFEST, export, load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import FAMILIES, tiny

PLANS = PlanSet.of(SplitPlan(1, 3))


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


def on_meta(module: torch.nn.Module) -> list[str]:
    return [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_parts_of_every_family_say_what_the_whole_model_says(family: str, tmp_path: Path) -> None:
    tiny(family, dtype=torch.float32).save_pretrained(tmp_path)
    plans = PlanSet.of(SplitPlan(2, 5))
    edge, cloud = (load_part(str(tmp_path), plans, device="cpu") for load_part in (load_edge, load_cloud))
    assert not on_meta(edge.first) and not on_meta(edge.last) and not on_meta(cloud.middle)
    assert edge.fingerprint == cloud.fingerprint
    ids = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
        logits = in_process(edge, cloud).open().advance(ids, logits=30)
    assert torch.allclose(logits, reference, atol=1e-5)


def test_exported_parts_hold_only_their_own_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = export(str(tiny_llama), PLANS, tmp_path / "parts")
    edge, cloud = tmp_path / "parts" / "edge", tmp_path / "parts" / "cloud"
    assert {name.split(".")[2] for name in names(cloud)} == {"1", "2"}
    assert {name.split(".")[2] for name in names(edge) if ".layers." in name} == {"0", "3"}
    assert (edge / "tokenizer.json").is_file() and not (cloud / "tokenizer.json").exists()
    assert sizes["cloud"] < sizes["edge"]
    manifest = json.loads((cloud / MANIFEST).read_text())
    assert manifest["side"] == "cloud" and manifest["fingerprint"] == load_edge(str(edge)).fingerprint

    prompt = [5, 6, 7, 8]
    text = list(in_process(load_edge(str(edge)), load_cloud(str(cloud))).stream(prompt, 10))
    whole = load(str(tiny_llama), device="cpu").model
    reference = whole.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=None)
    assert text == reference[0, 4:].tolist()


def test_what_cannot_be_loaded_says_why(tiny_llama: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    export(str(tiny_llama), PLANS, parts)
    with pytest.raises(ResultError, match="exists"):
        export(str(tiny_llama), PLANS, parts)
    export(str(tiny_llama), PLANS, parts, overwrite=True)
    with pytest.raises(ModelError, match="is the cloud part"):
        load_edge(str(parts / "cloud"))
    with pytest.raises(ModelError, match="does not hold the tensor"):
        load_cloud(str(parts / "cloud"), PlanSet.of(SplitPlan(0, 3)))
    with pytest.raises(ModelError, match="whole model: say where to cut it"):
        load_edge(str(tiny_llama))
    with pytest.raises(ModelError, match="cut 5 is beyond"):
        load_edge(str(tiny_llama), PlanSet.of(SplitPlan(1, 5)))
    (parts / "cloud" / MANIFEST).write_text("{")
    with pytest.raises(ModelError, match=r"damaged .*part\.json"):
        load_cloud(str(parts / "cloud"))


def test_other_weights_have_another_fingerprint(tiny_llama: Path, tmp_path: Path) -> None:
    before = load_cloud(str(tiny_llama), PLANS).fingerprint
    loaded = load(str(tiny_llama), device="cpu").model
    with torch.no_grad():
        loaded.get_parameter("model.norm.weight")[0] += 1
    loaded.save_pretrained(tmp_path)
    assert load_cloud(str(tmp_path), PLANS).fingerprint != before


_PEAK = """
import json, sys
from raycloud.benchmarks.measure import _status_kib
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan
import torch
torch.set_num_threads(1)
before = _status_kib("VmRSS")
plans = PlanSet.of(SplitPlan(2, 6))
loads = {"edge": load_edge, "cloud": load_cloud}
part = loads[sys.argv[2]](sys.argv[1], plans, device="cpu", dtype=sys.argv[3])
modules = [part.middle] if sys.argv[2] == "cloud" else [part.first, part.last]
tensors = {id(p): p for module in modules for p in module.parameters()}.values()
total = sum(float(t.detach().sum()) for t in tensors)  # every page is used once
print(json.dumps({
    "grown": (_status_kib("VmHWM") - before) * 1024, "bytes": sum(t.nbytes for t in tensors),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("side", "dtype"), [("edge", "float32"), ("cloud", "float32"), ("cloud", "bfloat16")])
def test_a_part_takes_no_more_memory_than_its_own_tensors(side: str, dtype: str, tmp_path: Path) -> None:
    """A sharded checkpoint of more than 2 GB; its parts may grow a fresh process by their bytes and 300 MB."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    size = _write_checkpoint(config, tmp_path)
    assert size >= 2e9
    command = [sys.executable, "-c", _PEAK, str(tmp_path), side, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 0.2e9
    assert found["grown"] <= found["bytes"] + 300e6, found


def _write_checkpoint(config: object, folder: Path) -> int:
    """One shard per block, written one after the other."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in shapes.items():
        block = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = tensor.shape
    weight_map, total = {}, 0
    for shard, tensors in shards.items():
        filled = {name: torch.full(shape, 0.01) for name, shape in tensors.items()}
        save_file(filled, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in filled.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
