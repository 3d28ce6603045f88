"""Tiny models of many types through serving, split fine-tuning and distillation, on one Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve
from transformers import AutoModelForCausalLM

from raycloud.benchmarks.family_configs import DECODERS, tiny_config
from raycloud.edge.endpoint import CloudEndpoint, load_split
from raycloud.errors import RaycloudError
from raycloud.jobs import distill
from raycloud.link.auth import Authenticator
from raycloud.serving.replicas import new_api, replicated_app
from raycloud.serving.split import SplitSettings, build_api
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.run import run as split_tune
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.server import InferenceServer
from raycloud.split.inference.server_info import ServerInfo
from raycloud.split.parts import export, load_cloud
from raycloud.split.plan import PlanSet, SplitPlan
from tests.cluster.recipes import small
from tests.ports import free_port
from tests.tokenizers import BOS, EOS, PAD, tokenizer_of

TYPES = (*("qwen3_moe", "qwen3_5_text", "gpt_oss", "phi3", "gemma2", "olmo2", "smollm3", "deepseek_v3", "granite"),)
KEPT = [0, 3]
"""Blocks of the students: of each type with kinds of blocks, one of each kind."""
CAPPED = {"gemma2": {"final_logit_softcapping": 2.0}}
"""Settings that make the rule of a type's logits matter: tiny models' logits are far below the usual cap."""
TOKEN, NEW = "s3cret", 12
WORDS = ("red", "blue", "green", "tall", "cold", "warm", "soft", "loud")
PROMPT = torch.randint(5, 261, (33,), generator=torch.Generator().manual_seed(3)).tolist()


def saved(name: str, folder: Path) -> Path:
    """Save a tiny random model of a type, with a tokenizer of bytes."""
    kind, options = DECODERS[name]
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    own = CAPPED.get(name, {})
    config = tiny_config(kind, {**options, **ids, **own, "vocab_size": 264, "max_position_embeddings": 512})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and float(parameter.std()) < 0.05:  # too little of it to notice an error
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def by_the_library(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NEW, eos_token_id=None)
    return made[0, len(PROMPT) :].tolist()  # type: ignore[no-any-return]


def deployment(folder: Path, names: list[str]) -> serve.Application:
    """Build one deployment with the cloud's parts of all models, each under a path of its own."""
    settings = SplitSettings(model="", token=TOKEN, num_cpus=0.2, threads=1)

    def build() -> FastAPI:
        torch.set_num_threads(1)
        hosts: list[InferenceServer] = []

        async def leave() -> None:
            for host in hosts:
                await host.leave()

        api = new_api("types", leave)
        for name in names:
            part = load_cloud(str(folder / name / "parts" / "cloud"))
            codecs = CutCodecs(part.config.hidden_size)
            hosts.append(host := InferenceServer(InferenceEngine(part, None, 1), codecs, settings.limits))
            told = ServerInfo.of(part, codecs, settings.limits)
            api.mount(f"/{name}", build_api(name, part, host, told, None, Authenticator([TOKEN])))
        return api

    return replicated_app("types", build, settings, edges=4, idle=8)


def tuned(name: str, folder: Path, data: Path, changes: dict[str, Any]) -> dict[str, float]:
    """Take two steps of split fine-tuning with both sides here."""
    recipe = SplitTuneRecipe.parse(
        {
            "output": str(folder / f"tuned-{'-'.join(changes)}"),
            "model": str(folder / "model"),
            "start_block": 1,
            "end_block": 3,
            "task": {"kind": "language", "max_prompt_length": 300},
            "data": {
                "source": str(data),
                "validation": str(data.with_name("held-out.jsonl")),
                "max_length": 320,
                "limit": 8,
                "held_out_samples": 4,
            },
            "uplink": {"kind": "low_rank", "rank": 6, "dtype": "int8"},
            "training": {"lr": 5e-3, "batch_size": 4},
            "epochs": 1,
            "device": "cpu",
            "threads": 1,
            **changes,
        }
    )
    summary = split_tune(recipe)
    return {key: summary[key] for key in ("perplexity_before", "perplexity")}


def distilled(folder: Path, data: Path) -> dict[str, Any]:
    """Run one round of distillation as a job, with a student of two blocks; every step has all eight texts."""
    recipe = small(
        folder / "model",
        folder / "distilled",
        dtype="float32",
        student={"blocks": KEPT},
        edges=[{"name": "store"}],
        data={"source": str(data), "validation": str(data.with_name("held-out.jsonl")), "max_length": 64},
        signal={"codec": "float32"},
        training={"batch_size": len(WORDS), "lr": 3e-3},
        rounds={"count": 1, "steps": 3},
        evaluation={"held_out_samples": 4, "by": None, "max_new_tokens": 1},
    )
    summary = distill.run(recipe)
    records = [json.loads(line) for line in (folder / "distilled" / "metrics.jsonl").read_text().splitlines()]
    steps = [(one["loss"], one["tokens"]) for one in records if one["kind"] == "step"]
    return {"missed": summary["missed"], "steps": steps}


def attempt(seen: dict[str, Any], what: str, run: Callable[[], Any]) -> None:
    try:
        seen[what] = run()
    except RaycloudError as error:
        seen[what] = f"{type(error).__name__}: {error}"


def main(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    data, held_out = folder / "rows.jsonl", folder / "held-out.jsonl"
    for path, end in ((data, "."), (held_out, "!")):
        texts = [f"It is {word}{end}" for word in WORDS]
        rows = [
            {"instruction": f"Say {word}", "input": "", "output": text, "text": text}
            for word, text in zip(WORDS, texts, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: dict[str, Any] = {name: {} for name in TYPES}
    for name in TYPES:
        model = saved(name, folder / name / "model")
        seen[name]["library"] = by_the_library(model)
        export(str(model), PlanSet.of(SplitPlan(1, 3)), folder / name / "parts")
        attempt(seen[name], "frozen", lambda n=name: tuned(n, folder / n, data, {"trainable": "last"}))
        attempt(seen[name], "lora", lambda n=name: tuned(n, folder / n, data, {"lora": {"r": 2}}))
    ray.init(num_cpus=4, resources={"cloud": 2, "edge": 2}, include_dashboard=False, object_store_memory=200_000_000)
    port = free_port()
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment(folder, list(TYPES)), name="types")
        for name in TYPES:

            def text(name: str = name) -> list[int]:
                cloud = CloudEndpoint(f"ws://127.0.0.1:{port}/{name}/v1/split", TOKEN)
                edge = load_split(str(folder / name / "parts" / "edge"), cloud, codec="float32", patience_s=240)
                return list(edge.source.stream(PROMPT, NEW))

            attempt(seen[name], "served", text)
        serve.delete("types")
        serve.shutdown()
        for name in TYPES:
            attempt(seen[name], "distilled", lambda n=name: distilled(folder / n, data))
    finally:
        ray.shutdown()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
