"""Optimizer that proposes trials: Optuna behind Ray Tune's searcher, initialised with all rows that exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.samplers import RandomSampler, TPESampler
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raycloud.errors import RecipeError
from raycloud.search.domain import Choice, Domain, Point
from raycloud.search.rows import TrialRow
from raycloud.search.space import Space, Trial, trial_at

_GUIDED_DRAWS, _MAX_DRAWS = 20, 500
"""Numbers of draws in a row without a new trial after which to draw uniformly, and to treat the space as exhausted."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def objectives(space: Space, row: TrialRow) -> dict[str, float] | None:
    """Return a row's values of all metrics of the space; None if the row failed or lacks one."""
    values = {metric.name: row.metrics.get(metric.name) for metric in space.metrics}
    known = {name: value for name, value in values.items() if value is not None}
    return known if row.error is None and len(known) == len(values) else None


class _Sampler(TPESampler):
    """TPE sampler that samples uniformly while ``evenly`` is set: in a small space TPE soon repeats its proposals."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.evenly, self._even = False, RandomSampler(seed=seed)

    def infer_relative_search_space(self, *where: Any, **named: Any) -> Any:
        return {} if self.evenly else super().infer_relative_search_space(*where, **named)

    def sample_independent(self, *where: Any, **named: Any) -> Any:
        if self.evenly:
            return self._even.sample_independent(*where, **named)
        return super().sample_independent(*where, **named)


class OptunaProposals(Searcher):
    """Proposals for the trials of a sampled space, without repetition.

    Args:
        space: loaded space.
        overrides: overrides of its base recipe.
        known: points and rows of finished trials.
        first: points to propose first, such as those of unfinished trials.
    """

    def __init__(
        self, space: Space, overrides: Sequence[str], known: Sequence[tuple[Point, TrialRow]], first: Iterable[Point]
    ) -> None:
        super().__init__()
        self._space, self._overrides = space, overrides
        # Another seed after every interruption: the same random first points would all be known already.
        self._sampler = _Sampler(space.seeds[0] + len(known))
        names = [metric.name for metric in space.metrics]
        modes: list[str] = [metric.direction for metric in space.metrics]
        several = len(names) > 1
        self._optuna = OptunaSearch(
            OptunaSearch.convert_search_space({key: _tune(domain) for key, domain in space.sample.items()}),
            metric=names if several else names[0],
            mode=modes if several else modes[0],
            points_to_evaluate=[*(point for point, _ in known), *first],
            sampler=self._sampler,
        )
        self._seen = set[str]()
        self._asked = dict[str, str]()
        for number, (point, row) in enumerate(known):
            self._seen.add(trial_at(space, point, overrides).fingerprint)
            asked = f"known {number}"
            self._optuna.suggest(asked)
            self._tell(asked, objectives(space, row))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        """Return the next trial as ``{"trial": Trial.plain()}``, or ``FINISHED`` if no new one is found."""
        for attempt in range(_MAX_DRAWS):
            asked, self._sampler.evenly = f"{trial_id} {attempt}", attempt >= _GUIDED_DRAWS
            trial = self._trial(self._optuna.suggest(asked) or {})
            if trial is None or trial.fingerprint in self._seen:
                self._tell(asked, None)
                continue
            self._seen.add(trial.fingerprint)
            self._asked[trial_id] = asked
            return {"trial": trial.plain()}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report the result of a proposal to Optuna."""
        row = TrialRow.model_validate_json(result["row"]) if result and not error else None
        self._tell(self._asked.pop(trial_id), objectives(self._space, row) if row else None)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignore results at rungs, which only the scheduler uses."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search resumes from its rows."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: there is no saved state."""

    def _trial(self, drawn: dict[str, Any]) -> Trial | None:
        point = {key: domain.plain(drawn[key]) for key, domain in self._space.sample.items()}
        try:
            return trial_at(self._space, point, self._overrides)
        except RecipeError:
            return None

    def _tell(self, asked: str, values: dict[str, float] | None) -> None:
        self._optuna.on_trial_complete(asked, values, error=values is None)


def _tune(domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return tune.choice(domain.values)
    if not domain.whole:
        return (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
    low, high = int(domain.low), int(domain.high)
    if domain.log:
        return tune.lograndint(low, high + 1)
    # Tune's qrandint includes the upper end, its randint excludes it.
    return tune.qrandint(low, high, domain.step) if domain.step > 1 else tune.randint(low, high + 1)
