"""Job that fine-tunes a cloud teacher: Ray Train runs the workers, the driver logs records and writes the model."""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raycloud.cluster.run_log import RunLog, driver_queue
from raycloud.cluster.teacher.config import deepspeed_config, weights_type
from raycloud.cluster.teacher.loop import HELD_OUT_LOSS
from raycloud.cluster.teacher.memory import ParameterCounts, estimate, library_estimate
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe, bundles
from raycloud.cluster.teacher.shards import ShardedCheckpoint, first_undamaged
from raycloud.cluster.teacher.tokens import tokenise
from raycloud.cluster.teacher.worker import train
from raycloud.data.batches import SampleOrder
from raycloud.data.checks import check_eos, check_positions
from raycloud.data.prompts import bounds_of, check_rows, prompt_and_response
from raycloud.data.sources import SplitRows, limit_rows, load_split_rows
from raycloud.data.splits import Row
from raycloud.data.tokens import TokenFile
from raycloud.durable import write_folder
from raycloud.errors import MissingExtra, ModelError, RaycloudError, TrainingError
from raycloud.evaluation.perplexity import perplexity
from raycloud.jobs.runner import Summary, check_same_inputs, cluster_run, finished_summary
from raycloud.models.loading import check_model, load, load_tokenizer, pick_device, resolve
from raycloud.models.verdict import structure_of
from raycloud.report.bos import format_bos
from raycloud.report.console import console, print_and_log, progress_bars, timed
from raycloud.report.table import print_table
from raycloud.report.tensorboard import tensorboard_events
from raycloud.report.tune_teacher import memory_rows, print_summary, write_page
from raycloud.results import Mode, ResultDir, record_inputs
from raycloud.training.lora import add_adapters, check_targets, experts_left_out, save_adapter, save_model

_LOG = logging.getLogger(__name__)


def run(recipe: TuneTeacherRecipe, mode: Mode = "new") -> Summary:
    """Fine-tune a teacher and write its result directory.

    Args:
        recipe: recipe of the fine-tuning.
        mode: ``new``, ``resume`` (from the last checkpoint) or ``overwrite``.

    Returns:
        The headline numbers, as in ``summary.json``.

    Raises:
        RaycloudError: an error that the user can fix, raised before anything is written where possible.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtra("'raycloud tune-teacher'", "deepspeed")
    if (done := finished_summary(recipe, recipe.output, mode)) is not None:
        return done
    inputs = check_same_inputs(recipe.data, recipe.output, mode)
    config, tokenizer, parts = _preflight(recipe)
    parts = parts.trained(limit_rows(parts.train, recipe.data.limit))
    with cluster_run(recipe, recipe.output, mode, bundles(recipe)) as (results, log):
        record_inputs(results.path, inputs)
        print_and_log(_LOG, parts.message(recipe.data))
        return _TuneTeacherRun(recipe, results, log, config, tokenizer, parts).whole()


def _preflight(recipe: TuneTeacherRecipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, SplitRows]:
    """Fetch built-in models and data and check the recipe before any writing; return config, tokenizer and rows."""
    where = resolve(recipe.model, console.print)
    config = check_model(where)
    if not structure_of(config).causal:
        raise ModelError(f"model '{recipe.model}' is an encoder; allowed: causal language models")
    if recipe.lora is not None:
        check_targets(config, recipe.lora)
        if left_out := experts_left_out(config, recipe.lora):
            print_and_log(_LOG, f"warning: {left_out}", logging.WARNING)
    tokenizer = load_tokenizer(where)
    check_eos("model", recipe.model, tokenizer)
    check_positions("data.max_length", recipe.data.max_length, config)
    parts = load_split_rows(recipe.data, recipe.evaluation.split, console.print)
    check_rows(parts.train, recipe.data.format)
    check_rows(parts.held_out, recipe.data.format)
    prompt_and_response(parts.train[0], recipe.data.format, tokenizer)
    console.print(format_bos(bounds_of(tokenizer, recipe.data.format, recipe.data.bos).bos))
    device = pick_device(recipe.device)
    deepspeed_config(recipe, device)
    parameters = ParameterCounts.of(config, recipe)
    print_table(*memory_rows(estimate(config, parameters, recipe, weights_type(recipe, device)).rows))
    if (theirs := library_estimate(parameters, recipe)) is not None:
        console.print(
            f"DeepSpeed's own estimate of weights, gradients and optimiser: {theirs[0] / 2**30:.2f} GiB on the device, "
            f"{theirs[1] / 2**30:.2f} GiB on the host"
        )
    return config, tokenizer, parts


class _TuneTeacherRun:
    """State of one run of the job, which starts from the state of its result directory."""

    def __init__(
        self,
        recipe: TuneTeacherRecipe,
        results: ResultDir,
        log: RunLog,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        parts: SplitRows,
    ) -> None:
        self.recipe, self.results, self.log = recipe, results, log
        self.config, self.tokenizer, self.parts = config, tokenizer, parts
        self.state = results.path / "state"
        self.begun = time.monotonic()

    def whole(self) -> Summary:
        held_out = limit_rows(self.parts.held_out, self.recipe.evaluation.held_out_samples)
        with timed("texts tokenised"):
            files = {"train": self._tokens("train", self.parts.train), "held_out": self._tokens("held_out", held_out)}
        steps = self._steps(TokenFile(files["train"]))
        return self._finish(self._train(files, steps))

    def _tokens(self, name: str, rows: list[Row]) -> Path:
        path = self.state / f"{name}.arrow"
        if not path.is_file():
            tokenise(rows, self.tokenizer, self.recipe.data, path)
        return path

    def _steps(self, samples: TokenFile) -> int:
        if self.recipe.steps is not None:
            return self.recipe.steps
        training = self.recipe.training
        order = SampleOrder(samples.lengths, training.batch_size, self.recipe.seed)
        return max(1, self.recipe.epochs * order.steps_per_epoch // training.gradient_accumulation_steps)

    def _train(self, files: dict[str, Path], steps: int) -> Path:
        """Run the workers to the end and return the best undamaged checkpoint."""
        recipe, placement = self.recipe, self.recipe.workers.placement
        device = pick_device(recipe.device)
        model = recipe.model
        if Path(model).expanduser().exists():  # workers do not run in the driver's directory
            model = str(Path(model).expanduser().absolute())
        if (given := recipe.deepspeed.config) is not None:
            given = str(Path(given).expanduser().absolute())
        deepspeed = recipe.deepspeed.model_copy(update={"config": given})
        records = driver_queue()
        config = {
            "recipe": recipe.model_copy(update={"model": model, "deepspeed": deepspeed}).model_dump(mode="json"),
            "pad": self.tokenizer.pad_token_id,
            "steps": steps,
            "records": records,
            "log": self.log,
            **{name: str(path) for name, path in files.items()},
        }
        resources = {"CPU": placement.num_cpus, "GPU": placement.num_gpus, "cloud": 1.0}
        trainer = TorchTrainer(
            train,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if device.type == "cuda" else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=recipe.workers.count,
                use_gpu=placement.num_gpus > 0,
                resources_per_worker={name: amount for name, amount in resources.items() if amount},
            ),
            run_config=ray.train.RunConfig(
                # The same place and name as before: Ray Train resumes from the last checkpoint there.
                storage_path=str(self.state),
                name="train",
                failure_config=ray.train.FailureConfig(max_failures=recipe.workers.failures),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=max(2, recipe.checkpoints.keep),  # the latest may be both damaged and the best
                    checkpoint_score_attribute=HELD_OUT_LOSS,
                    checkpoint_score_order="min",
                ),
            ),
        )
        with self._following(records, steps), _interruptible():
            try:
                found = trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise _plain(error) from error
        candidates = [*(found.best_checkpoints or ()), (found.checkpoint, found.metrics)]
        finite = [one for one in candidates if math.isfinite(one[1][HELD_OUT_LOSS])]
        if not finite:
            raise TrainingError("no checkpoint has a finite held-out loss; a smaller training.lr may help")
        ordered = [Path(one.path) for one, metrics in sorted(finite, key=lambda one: one[1][HELD_OUT_LOSS])]
        return first_undamaged(dict.fromkeys(ordered))

    @contextmanager
    def _following(self, records: Queue, steps: int) -> Iterator[None]:
        """Store and show the workers' records while the block runs.

        OSError: a record cannot be written; a run with gaps in its log does not count as complete.
            OSError: it cannot be written; a run whose log has holes does not count as done.
        """
        ended = threading.Event()

        def follow() -> None:
            with progress_bars(steps) as progress, ExitStack() as events:
                add = events.enter_context(tensorboard_events(self.results.path))
                while True:
                    try:
                        record = records.get(timeout=0.5)
                    except Empty:
                        if ended.is_set():
                            return
                        continue
                    self._write(record)
                    if record["kind"] == "start":  # drop the events of steps that are repeated
                        events.close()
                        add = events.enter_context(tensorboard_events(self.results.path))
                        for earlier in self.results.metrics():
                            add(earlier)
                    else:
                        add(record)
                    if record["kind"] == "step":
                        speed = record["read"] / record["seconds"]
                        progress.move("steps", record["step"], f"loss {record['loss']:.3f}  {speed:.0f} tokens/s")
                    elif record["kind"] == "held_out":
                        print_and_log(_LOG, f"step {record['step']}: held-out loss {record[HELD_OUT_LOSS]:.4f}")

        with ThreadPoolExecutor(1) as aside:
            following = aside.submit(follow)
            try:
                yield
            finally:
                ended.set()
            following.result()

    def _write(self, record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            # Steps after the checkpoint are repeated.
            step = record["step"]
            if step or len(self.results.metrics()) > 1:
                print_and_log(_LOG, f"goes on from step {step}")
                self.results.filter_metrics(lambda one: one["step"] <= step)
        self.results.log_metrics(record)

    def _finish(self, best: Path) -> Summary:
        recipe, results = self.recipe, self.results
        with timed("model written"):
            shards = ShardedCheckpoint(best)
            params, trained = self._export(shards)
        records = results.metrics()
        steps = [record for record in records if record["kind"] == "step"]
        held_out = {record["step"]: record[HELD_OUT_LOSS] for record in records if record["kind"] == "held_out"}
        before, after = held_out[0], held_out[shards.facts["step"]]
        seconds = sum(record["seconds"] for record in steps)
        summary = {
            "run": results.run_id,
            "bos": bounds_of(self.tokenizer, recipe.data.format, recipe.data.bos).bos,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "ppl_before": perplexity(before),
            "ppl_after": perplexity(after),
            "best_step": shards.facts["step"],
            "rows": self.parts.counts,
            "steps": len(steps),
            "trained_tokens": sum(record["tokens"] for record in steps),
            "tokens_per_s": sum(record["read"] for record in steps) / seconds,
            "params": params,
            "trained_params": trained,
            "workers": recipe.workers.count,
            "stage": recipe.deepspeed.stage,
            "restarts": sum(record["kind"] == "start" for record in records) - 1,
            "seconds": seconds,
        }
        write_page(results.path, summary, records, recipe.dump())
        results.write_summary(summary)
        shutil.rmtree(self.state)
        print_summary(summary)
        console.print(f"results: {results.path}")
        return summary

    def _export(self, shards: ShardedCheckpoint) -> tuple[int, int]:
        """Write ``model/``, and trained adapters separately; return the numbers of all and of trained parameters."""
        recipe = self.recipe
        model = load(recipe.model, device="cpu", dtype="float32").model
        if recipe.lora is not None:
            model = add_adapters(model, recipe.lora, recipe.seed)
        with torch.no_grad():
            own = dict(model.named_parameters())
            for name in shards.names:
                own[name].copy_(shards.weight(name))
        if recipe.lora is not None:  # before they are merged
            write_folder(self.results.path / "adapter", lambda to: save_adapter(model, to, recipe.model))

        write_folder(self.results.path / "model", lambda to: save_model(model, self.tokenizer, to))
        return model.num_parameters(), sum(torch.Size(shape).numel() for shape in shards.facts["shapes"].values())


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C: Ray Train would end its workers and exit the process without an error."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def _plain(error: ray.train.TrainingFailedError) -> RaycloudError:
    """Return the worker's own one-line error if it raised one, else a ``TrainingError`` with the last line."""
    failures = getattr(error, "worker_failures", {}) or {-1: getattr(error, "controller_failure", error)}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or getattr(failure, "_base_exc", None) or failure
        if isinstance(cause, RaycloudError):
            return cause
    rank, first = next(iter(failures.items()))
    lines = str(first).strip().splitlines() or [type(first).__name__]
    return TrainingError(f"worker {rank} failed: {lines[-1]}")
