"""Registry of the benchmarks by name, with the keys of their JSON objects. Importing it loads no benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raycloud.benchmarks.measure import Measured

COMMON_KEYS = ("quick", "machine", "commit")
"""Keys that all benchmarks share: whether it was a quick run, the processor, and the commit of the code."""


@dataclass(frozen=True)
class Benchmark:
    """Subject of a benchmark, and the keys of its JSON object beside the common ones."""

    about: str
    keys: tuple[str, ...]


BENCHMARKS = {
    "distill-step": Benchmark(
        "One forward-KL step: the dense formulation against ours.",
        ("ms_dense", "ms_ours", "mb_dense", "mb_ours", "speedup", "memory_ratio", "difference"),
    ),
    "codecs": Benchmark(
        "Bytes and perplexity of a real model with each codec of the link.",
        ("model", "texts", "tokens", "header_bytes", "codecs", "best"),
    ),
    "split-exact": Benchmark(
        "Equality of a model cut in three with the whole model, at every pair of cuts.",
        ("families", "pairs", "runs", "mismatches"),
    ),
    "families": Benchmark(
        "Text models of the library in segments: which types are accepted, and whether any of them is silently wrong.",
        (
            "types",
            "configurations",
            "accepted",
            "silently_wrong",
            "compose",
            "generate",
            "loads_parts",
            "fast",
            "twins",
            "general_vs_fast",
            "self_check_s",
            "self_check_again_s",
            "families",
        ),
    ),
    "split-speed": Benchmark(
        "Tokens per second of a split model, in one process and over Serve's WebSocket, against the whole model.",
        ("unsplit_tok_s", "local_ratio", "websocket_ratio"),
    ),
    "split-plan": Benchmark(
        "Predicted times of split plans against measured ones, the regret of the recommendation, and a model of 70B.",
        ("plans", "profile", "plan_error", "plan_regret", "large_s", "large_mb"),
    ),
    "split-wire": Benchmark(
        "Traffic on the link: bytes against a formula, and a search for token ids and text in a whole session.",
        ("codecs", "header_bytes", "rows", "equal", "leaks", "controls_found"),
    ),
    "split-faults": Benchmark(
        "Fault injection: killed replicas, cut sockets, damaged frames, slow readers; no token may be wrong.",
        ("faults_injected", "completed_exact", "clear_errors", "wrong_tokens", "leaked_sessions"),
    ),
    "retrain": Benchmark(
        "Block retraining on drifting digits and texts against its rivals, at equal operations and memory.",
        (
            "ours_minus_best_rival",
            "ours_minus_head_only",
            "ours_minus_last_block",
            "ours_minus_first_block",
            "ours_minus_random_block",
            "ours_minus_lora",
            "ours_minus_full",
            "ours_minus_lisa",
            "ours_minus_misa",
            "ours_minus_green_trainer",
            "ours_minus_surgical",
            "ours_minus_published_greedy",
            "ours_minus_head_then_first",
            "ours_minus_greedy",
            "ours_minus_power_law",
            "ours_minus_one_shot",
            "over_budget",
            "regret",
            "memory_share",
            "text",
            "law_error",
            "plan_s",
            "rows",
        ),
    ),
    "objectives": Benchmark(
        "Every distillation objective against its dense formulation: time, memory, difference.",
        ("objectives",),
    ),
    "alignment": Benchmark(
        "Alignment of two tokenisations of the same texts: byte offsets against time warping and rapidfuzz.",
        ("pair", "exact_span_share", "pairs_per_s", "speedup_vs_dtw", "speedup_vs_rapidfuzz", "pairs"),
    ),
    "signals": Benchmark(
        "Bytes of each kind of teacher signal, and the error of the gradient that a student gets from it.",
        ("model", "tokens", "hidden_size", "payloads"),
    ),
    "scale": Benchmark(
        "Cost of one more edge for the cloud, with up to 64 students of one teacher, extrapolated to 10,000.",
        ("rows", "weights_bytes", "extrapolation"),
    ),
    "split-pipeline": Benchmark(
        "Duration of a split fine-tuning step over a slow link, with one micro-batch in flight and with several.",
        ("rows", "worst_ratio"),
    ),
    "split-tune": Benchmark(
        "Accuracy of split fine-tuning against bytes on the link, with the unsplit model and the published cut.",
        ("rows", "test_sentences", "seeds", "byte_ratio_36", "worst_drop_36", "worst_gain_36"),
    ),
    "split-tune-language": Benchmark(
        "Perplexity of a language model tuned with adapters across two cuts, against bytes on the link.",
        ("rows", "best_byte_ratio_at_1_percent", "perplexity_before", "plain_float32_bytes", "steps"),
    ),
}


def measure(name: str, *, quick: bool) -> Measured:
    """Run a benchmark in full, or with the sizes of its ``QUICK``.

    Raises:
        FetchError: a model or data set that it needs is not available.
        RaycloudError: it cannot run for another reason.
    """
    module = import_module(f"raycloud.benchmarks.{name.replace('-', '_')}")
    found: Measured = module.run(**(module.QUICK if quick else {}))
    return found
