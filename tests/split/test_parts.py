"""Parts of a cut model, exported or not, which hold only their own tensors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raycloud.errors import ChecksumError, ModelError, ResultError, StorageError
from raycloud.models.loading import load
from raycloud.split.inference.generation import local_split_model
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


_FULL = """
import resource, signal, sys
from pathlib import Path
from raycloud.errors import StorageError
from raycloud.split.parts import export
from raycloud.split.plan import PlanSet, SplitPlan

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export(sys.argv[1], PlanSet.of(SplitPlan(1, 3)), Path(sys.argv[2]))
except StorageError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_that_names_the_folder(tiny_llama: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", _FULL, str(tiny_llama), str(tmp_path / "parts")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"cannot write '{tmp_path / 'parts'}': File too large"], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_flipped_byte_of_an_exported_part_is_named(side: str, tiny_llama: Path, tmp_path: Path) -> None:
    export(str(tiny_llama), PLANS, tmp_path / "parts")
    (tmp_path / "parts" / side).rename(tmp_path / "device")  # each goes to a machine of its own
    read = load_edge if side == "edge" else load_cloud
    read(str(tmp_path / "device"), device="cpu")
    [path] = (tmp_path / "device").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match=f"{path.name}' is damaged or was changed"):
        read(str(tmp_path / "device"), device="cpu")


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
        logits = local_split_model(edge, cloud).open().advance(ids, logits=30)
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
    text = list(local_split_model(load_edge(str(edge)), load_cloud(str(cloud))).stream(prompt, 10))
    whole = load(str(tiny_llama), device="cpu").model
    reference = whole.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=None)
    assert text == reference[0, 4:].tolist()


def _without_tokenizer(model: Path) -> str:
    for path in model.glob("token*"):
        path.unlink()
    return "holds no tokenizer"


def _without_a_tensor(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    lost = next(name for name in tensors if ".layers.2." in name)  # of the cloud's part, which is written second
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, model / "model.safetensors")
    return "does not hold the tensors"


@pytest.mark.parametrize("spoil", [_without_tokenizer, _without_a_tensor])
def test_nothing_is_said_to_be_written_before_the_model_is_checked(
    spoil: Callable[[Path], str], tiny_llama: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    said, told = spoil(model), list[str]()
    with pytest.raises(ModelError, match=said):
        export(str(model), PLANS, tmp_path / "parts", notify=told.append)
    assert told == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write into '.*file'"):
        export(str(tiny_llama), PLANS, tmp_path / "file" / "parts", notify=told.append)
    assert told == []


def test_what_cannot_be_loaded_says_why(tiny_llama: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    export(str(tiny_llama), PLANS, parts)
    with pytest.raises(ResultError, match="exists"):
        export(str(tiny_llama), PLANS, parts)
    export(str(tiny_llama), PLANS, parts, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ResultError, match="holds no exported parts; it is not overwritten"):
        export(str(tiny_llama), PLANS, tmp_path / "home", overwrite=True)
    (tmp_path / "link").symlink_to("home")
    export(str(tiny_llama), PLANS, tmp_path / "link", overwrite=True)
    assert not (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "home").iterdir()] == [
        "thesis.tex"
    ]
    with pytest.raises(ModelError, match="is the cloud part"):
        load_edge(str(parts / "cloud"))
    with pytest.raises(ModelError, match="does not hold the tensors"):
        load_cloud(str(parts / "cloud"), PlanSet.of(SplitPlan(0, 3)))
    with pytest.raises(ModelError, match="whole model: say where to cut it"):
        load_edge(str(tiny_llama))
    with pytest.raises(ModelError, match="cut 5 is beyond"):
        load_edge(str(tiny_llama), PlanSet.of(SplitPlan(1, 5)))
    (parts / "cloud" / "checksums.json").unlink()
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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded checkpoint of more than 2 GB."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    assert _write_checkpoint(config, folder) >= 2e9
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("side", "dtype"), [("edge", "float32"), ("cloud", "float32"), ("cloud", "bfloat16")])
def test_a_part_takes_no_more_memory_than_its_own_tensors(side: str, dtype: str, large: Path) -> None:
    """Loading a part may grow a new process by its bytes and 300 MB."""
    command = [sys.executable, "-c", _PEAK, str(large), side, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 0.2e9
    assert found["grown"] <= found["bytes"] + 300e6, found


def _write_checkpoint(config: object, folder: Path) -> int:
    """Write one shard per block, one after the other."""
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
