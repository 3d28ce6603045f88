"""Registry of jobs: one record for each, which the command line, search, reports and the Python API read.

It imports neither ray nor torch: a record names recipe, functions and report as ``module:name``, loaded when used.
To add a job, write its recipe, its file and its report, and add its record to :data:`JOBS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from raycloud.errors import MissingExtra, RecipeError, ResultError
from raycloud.recipe import Bundle, Recipe, read_yaml
from raycloud.report.runs import NO_REPORT, RunReport
from raycloud.results import Mode


@dataclass(frozen=True)
class Lazy:
    """Function or class named ``module:name``, imported at its first use; calling it calls what it names."""

    target: str

    def load(self) -> Any:
        """Import the module and return what is named."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call what is named."""
        return self.load()(*args, **options)


@dataclass(frozen=True)
class Result:
    """Result of a finished run.

    Args:
        path: result directory; None for an evaluation that stores nothing.
        summary: headline numbers, as in ``summary.json``.
        model: folder of the trained model inside ``path``; empty for a job that writes none.
    """

    path: Path | None
    summary: dict[str, Any]
    model: str = ""

    @property
    def model_path(self) -> Path:
        """Folder of the trained model, which ``transformers`` loads.

        Raises:
            ResultError: the run has written no such model, or several.
        """
        where = self.path / self.model if self.path is not None and self.model else None
        if where is None or not where.is_dir():
            raise ResultError(f"the run in '{self.path}' has written no single model")
        return where


@dataclass(frozen=True)
class SearchSupport:
    """Facts about a job that a search needs; its recipes have ``output``, ``data`` and ``seed``.

    Args:
        driver: resources of the process that runs a trial, without the job's actors.
        check: function of a recipe that raises an error if it cannot be run; it needs no cluster.
        timed: whether the summary includes times. Trials then run one after the other in one process, which may keep
            loaded models.
        rungs: whether the recipe lists in ``rungs`` the steps at which a trial calls ``report(step, summary)``, a
            third argument of the job's function. The call may end the trial by raising.
    """

    driver: Bundle
    check: Callable[[Any], object]
    timed: bool = False
    rungs: bool = False


@dataclass(frozen=True)
class Job:
    """Registration of a job.

    The functions ``run_here`` and ``run_on_ray`` take a recipe and a mode and return the summary.

    Args:
        name: name in recipes, the value of ``job``.
        verb: words after ``raycloud`` that run it.
        recipe: class of its recipes.
        run_here: function that runs it in this process, without ray; None if it always needs actors.
        run_on_ray: function that runs it with actors on Ray, used if ``bundles`` names any; None if it never does.
        bundles: function of a recipe that returns the resources of each actor, without the driver.
        report: page of its result directories and its headline numbers.
        model: folder in the result directory with the trained model; empty if there is none.
        restore: function of a result directory, the name of a history and the weights of one of its versions that
            writes the trained model again; None for a job that keeps no versions. See :mod:`raycloud.jobs.versions`.
        search: support for searches; None if the job cannot be searched.
        help: one line of help of the verb; empty for a verb with options of its own, see ``raycloud.cli``.
        example: override of the recipe that the help shows.
    """

    name: str
    verb: str
    recipe: Lazy
    run_here: Callable[..., dict[str, Any]] | None = None
    run_on_ray: Callable[..., dict[str, Any]] | None = None
    bundles: Callable[[Any], list[Bundle]] = lambda recipe: []
    report: RunReport = NO_REPORT
    model: str = ""
    restore: Callable[..., None] | None = None
    search: SearchSupport | None = None
    help: str = ""
    example: str = ""

    @cached_property
    def recipe_class(self) -> type[Recipe]:
        """Class of its recipes."""
        found: type[Recipe] = self.recipe.load()
        return found

    def run(self, recipe: Any, mode: Mode = "new", **options: Any) -> Result:
        """Run a recipe to its end.

        Args:
            recipe: recipe of this job.
            mode: ``new``, ``resume`` or ``overwrite``.
            options: further arguments of the job's function, such as ``report`` of a job with rungs.

        Raises:
            MissingExtra: the recipe needs Ray, and it is not installed.
            RaycloudError: an error that the user can fix.
        """
        if self.run_here is not None and not self.bundles(recipe):
            summary = self.run_here(recipe, mode, **options)
        else:
            summary = self._on_ray(recipe, mode, **options)
        path = Path(recipe.output).expanduser().absolute() if recipe.output is not None else None
        return Result(path, summary, self.model)

    def _on_ray(self, recipe: Any, mode: Mode, **options: Any) -> dict[str, Any]:
        assert self.run_on_ray is not None
        try:
            return self.run_on_ray(recipe, mode, **options)
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            which = "" if self.run_here is None else " with edges"
            raise MissingExtra(f"'raycloud {self.verb}{which}'", "cluster") from None


_JOBS = (
    Job(
        name="tune_teacher",
        verb="tune-teacher",
        help="Fine-tune a teacher in the cloud with Ray Train and DeepSpeed.",
        example="deepspeed.stage=3",
        recipe=Lazy("raycloud.cluster.teacher.recipe:TuneTeacherRecipe"),
        bundles=Lazy("raycloud.cluster.teacher.recipe:bundles"),
        run_on_ray=Lazy("raycloud.jobs.tune_teacher:run"),
        model="model",
        report=RunReport(("ppl_before", "ppl_after", "tokens_per_s"), Lazy("raycloud.report.tune_teacher:render")),
    ),
    Job(
        name="distill",
        verb="distill",
        help="Distil edge students from a cloud teacher.",
        example="rounds.count=2",
        recipe=Lazy("raycloud.distill.recipe:DistillRecipe"),
        bundles=Lazy("raycloud.distill.recipe:bundles"),
        run_on_ray=Lazy("raycloud.jobs.distill:run"),
        model="student",
        restore=Lazy("raycloud.distill.versions:restore_student"),
        report=RunReport(
            ("student_ppl_before", "student_ppl_after", "gap_closed", "agreement_after"),
            Lazy("raycloud.report.distill:render"),
        ),
        # The driver waits for its actors and assembles a model at the end.
        search=SearchSupport({"CPU": 0.1}, Lazy("raycloud.jobs.distill:check")),
    ),
    Job(
        name="evaluate",
        verb="evaluate",
        recipe=Lazy("raycloud.evaluation.recipe:EvaluateRecipe"),
        run_here=Lazy("raycloud.jobs.evaluate:run"),
        report=RunReport(("average:ROUGE-L",)),
    ),
    Job(
        name="split_evaluate",
        verb="split evaluate",
        recipe=Lazy("raycloud.split.recipe:SplitEvaluateRecipe"),
        run_here=Lazy("raycloud.split.evaluation:run"),
        report=RunReport(("perplexity",)),
        search=SearchSupport({"CPU": 1.0}, Lazy("raycloud.split.evaluation:check"), timed=True, rungs=True),
    ),
    Job(
        name="split_tune",
        verb="split-tune",
        recipe=Lazy("raycloud.split.finetune.recipe:SplitTuneRecipe"),
        bundles=Lazy("raycloud.split.finetune.recipe:bundles"),
        run_here=Lazy("raycloud.split.finetune.run:run"),
        run_on_ray=Lazy("raycloud.jobs.split_tune:run"),
        model="model",
        restore=Lazy("raycloud.split.finetune.merge:restore_group"),
        report=RunReport(("accuracy", "perplexity", "bytes_per_step"), Lazy("raycloud.report.split_tune:render")),
    ),
    Job(
        name="retrain",
        verb="retrain",
        help="Retrain the blocks worth it at edges whose domains drift.",
        example="budget.full_steps=20",
        recipe=Lazy("raycloud.retrain.recipe:RetrainRecipe"),
        bundles=Lazy("raycloud.retrain.recipe:bundles"),
        run_on_ray=Lazy("raycloud.jobs.retrain:run"),
        model="model",
        report=RunReport(
            ("accuracy_before", "accuracy_after", "perplexity_before", "perplexity_after", "over_budget"),
            Lazy("raycloud.report.retrain:render"),
        ),
        restore=Lazy("raycloud.retrain.cloud_run:restore_model"),
        # The driver waits for its actors.
        search=SearchSupport({"CPU": 0.1}, Lazy("raycloud.jobs.retrain:check")),
    ),
)

JOBS = {job.name: job for job in _JOBS}
"""Jobs by name, in the order in which messages list them."""

REPORTS: Mapping[str, RunReport] = {
    **{job.name: job.report for job in _JOBS},
    "search": RunReport(("trials", "failed", "best"), Lazy("raycloud.report.search:render")),
    "privacy": RunReport((), Lazy("raycloud.report.privacy:render")),
}
"""Reports of all kinds of result directories: those of jobs, and those of two verbs that run no recipe of a job."""


def job_named(name: object) -> Job:
    """Return the job with this name.

    Raises:
        RecipeError: there is no such job.
    """
    if not isinstance(name, str) or name not in JOBS:
        raise RecipeError(f"no job {name!r}; allowed: {', '.join(JOBS)}")
    return JOBS[name]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in a file, of whichever job it is.

    Raises:
        RecipeError: the file names no job, or the recipe is not valid.
    """
    values = read_yaml(path)
    if "job" not in values:
        raise RecipeError(f"{path}: missing key 'job'")
    return job_named(values["job"]).recipe_class.load(path, overrides)
