"""The fine-tuning of a cloud teacher: Ray Train runs the workers, this drives them and writes what they made."""

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

from raycloud.cluster.jobs.frame import Result, finished, on_cluster
from raycloud.cluster.run_log import RunLog, driver_queue
from raycloud.cluster.teacher.config import deepspeed_config, weights_type
from raycloud.cluster.teacher.loop import HELD_OUT
from raycloud.cluster.teacher.memory import Parameters, estimate, library_estimate
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.cluster.teacher.shards import Shards
from raycloud.cluster.teacher.tokens import tokenise
from raycloud.cluster.teacher.worker import train
from raycloud.data.batches import SampleOrder
from raycloud.data.prompts import example
from raycloud.data.sources import load_rows, training_rows
from raycloud.data.splits import Row, spread
from raycloud.data.tokens import TokenFile
from raycloud.errors import MissingExtra, ModelError, RaycloudError, TrainingError
from raycloud.models.anatomy import anatomy_of
from raycloud.models.loading import load, load_config, load_tokenizer, pick_device, quiet_transformers, resolve
from raycloud.report.console import bars, console, tell, working
from raycloud.report.events import event_files
from raycloud.report.teacher import memory_rows, print_summary, print_table, write_page
from raycloud.results import Mode, ResultDir, write_folder
from raycloud.training.lora import attach, check_targets, merge, save_adapter

_LOG = logging.getLogger(__name__)


def run(recipe: TuneTeacherRecipe, mode: Mode = "new") -> Result:
    """Fine-tune as the recipe says and leave a result directory behind.

    Args:
        recipe: what to do.
        mode: ``new``, ``resume`` (from the last checkpoint) or ``overwrite``.

    Raises:
        RaycloudError: whatever the user can mend, before anything is written where possible.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtra("'raycloud tune-teacher'", "deepspeed")
    ResultDir.check(recipe.output, recipe, mode)
    config, tokenizer = _preflight(recipe)
    with on_cluster(recipe, mode) as (results, log):
        return _Run(recipe, results, log, config, tokenizer).whole()


def _preflight(recipe: TuneTeacherRecipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Fetch what is built in, and find what is wrong with the recipe while nothing is written yet."""
    where = resolve(recipe.model, console.print)
    config = load_config(where)
    if not anatomy_of(config).causal:
        raise ModelError(f"model '{recipe.model}' is an encoder; allowed: causal language models")
    if recipe.lora is not None:
        check_targets(config, recipe.lora)
    tokenizer = load_tokenizer(where)
    example(training_rows(recipe.data, console.print)[0], recipe.data.format, tokenizer)
    load_rows(recipe.data.source, recipe.held_out.split)
    device = pick_device(recipe.device)
    deepspeed_config(recipe, device)
    parameters = Parameters.of(config, recipe)
    print_table(*memory_rows(estimate(config, parameters, recipe, weights_type(recipe, device)).rows))
    if (theirs := library_estimate(parameters, recipe)) is not None:
        console.print(
            f"DeepSpeed's own estimate of weights, gradients and optimiser: {theirs[0] / 2**30:.2f} GiB on the device, "
            f"{theirs[1] / 2**30:.2f} GiB on the host"
        )
    return config, tokenizer


class _Run:
    """One run of the job, from wherever its directory stands."""

    def __init__(
        self,
        recipe: TuneTeacherRecipe,
        results: ResultDir,
        log: RunLog,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.recipe, self.results, self.log = recipe, results, log
        self.config, self.tokenizer = config, tokenizer
        self.state = results.path / "state"
        self.begun = time.monotonic()

    def whole(self) -> Result:
        if (done := finished(self.results)) is not None:
            return done
        rows = training_rows(self.recipe.data)
        held_out = load_rows(self.recipe.data.source, self.recipe.held_out.split)
        held_out = [held_out[place] for place in spread(len(held_out), self.recipe.held_out.samples)]
        with working("texts tokenised"):
            files = {"train": self._tokens("train", rows), "held_out": self._tokens("held_out", held_out)}
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
        return max(1, self.recipe.epochs * order.steps_per_epoch // training.accumulate)

    def _train(self, files: dict[str, Path], steps: int) -> ray.train.Checkpoint:
        """Run the workers to the end; the best checkpoint."""
        recipe, place = self.recipe, self.recipe.workers.placement
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
        resources = {"CPU": place.num_cpus, "GPU": place.num_gpus, "cloud": 1.0}
        trainer = TorchTrainer(
            train,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if device.type == "cuda" else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=recipe.workers.count,
                use_gpu=place.num_gpus > 0,
                resources_per_worker={name: amount for name, amount in resources.items() if amount},
            ),
            run_config=ray.train.RunConfig(
                # The same place and name: Ray Train goes on from the last checkpoint that is there.
                storage_path=str(self.state),
                name="train",
                failure_config=ray.train.FailureConfig(max_failures=recipe.workers.failures),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=recipe.checkpoints.keep,
                    checkpoint_score_attribute=HELD_OUT,
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
        best: ray.train.Checkpoint = min(candidates, key=lambda one: one[1][HELD_OUT])[0]
        return best

    @contextmanager
    def _following(self, records: Queue, steps: int) -> Iterator[None]:
        """Write down and show what the workers say, until this ends.

        Raises:
            OSError: it cannot be written; a run whose log has holes does not count as done.
        """
        ended = threading.Event()

        def follow() -> None:
            with bars(steps) as progress, ExitStack() as events:
                add = events.enter_context(event_files(self.results.path))
                while True:
                    try:
                        record = records.get(timeout=0.5)
                    except Empty:
                        if ended.is_set():
                            return
                        continue
                    self._write(record)
                    if record["kind"] == "start":  # what was told of steps that are done again is told no more
                        events.close()
                        add = events.enter_context(event_files(self.results.path))
                        for earlier in self.results.metrics():
                            add(earlier)
                    else:
                        add(record)
                    if record["kind"] == "step":
                        speed = record["read"] / record["seconds"]
                        progress.move("steps", record["step"], f"loss {record['loss']:.3f}  {speed:.0f} tokens/s")
                    elif record["kind"] == "held_out":
                        tell(_LOG, f"step {record['step']}: held-out loss {record[HELD_OUT]:.4f}")

        with ThreadPoolExecutor(1) as aside:
            following = aside.submit(follow)
            try:
                yield
            finally:
                ended.set()
            following.result()

    def _write(self, record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            # What was done after the checkpoint is done again.
            step = record["step"]
            if step or len(self.results.metrics()) > 1:
                tell(_LOG, f"goes on from step {step}")
                self.results.keep_metrics(lambda one: one["step"] <= step)
        self.results.log(record)

    def _finish(self, best: ray.train.Checkpoint) -> Result:
        recipe, results = self.recipe, self.results
        with working("model written"), best.as_directory() as folder:
            shards = Shards(Path(folder))
            params, trained = self._export(shards)
        records = results.metrics()
        steps = [record for record in records if record["kind"] == "step"]
        held_out = {record["step"]: record[HELD_OUT] for record in records if record["kind"] == "held_out"}
        before, after = held_out[0], held_out[shards.facts["step"]]
        seconds = sum(record["seconds"] for record in steps)
        summary = {
            "run": results.run_id,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "ppl_before": math.exp(before),
            "ppl_after": math.exp(after),
            "best_step": shards.facts["step"],
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
        return Result(results.path, summary)

    def _export(self, shards: Shards) -> tuple[int, int]:
        """Write ``model/``, and the adapters by themselves where they were trained; parameters in all and trained."""
        recipe = self.recipe
        model = load(recipe.model, device="cpu", dtype="float32").model
        if recipe.lora is not None:
            model = attach(model, recipe.lora, recipe.seed)
        with torch.no_grad():
            own = dict(model.named_parameters())
            for name in shards.names:
                own[name].copy_(shards.weight(name))
        if recipe.lora is not None:  # before they are merged
            write_folder(self.results.path / "adapter", lambda to: save_adapter(model, to, recipe.model))

        def fill(to: Path) -> None:
            with quiet_transformers():
                merge(model).save_pretrained(to)
                self.tokenizer.save_pretrained(to)

        write_folder(self.results.path / "model", fill)
        return model.num_parameters(), sum(torch.Size(shape).numel() for shape in shards.facts["shapes"].values())


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train answers Ctrl-C by ending its workers and then the process, as if all were well; here that is a stop."""
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
    """The worker's own one-line error where it is one."""
    failures = getattr(error, "worker_failures", {}) or {-1: getattr(error, "controller_failure", error)}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or getattr(failure, "_base_exc", None) or failure
        if isinstance(cause, RaycloudError):
            return cause
    rank, first = next(iter(failures.items()))
    lines = str(first).strip().splitlines() or [type(first).__name__]
    return TrainingError(f"worker {rank} failed: {lines[-1]}")
