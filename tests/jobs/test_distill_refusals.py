"""The distillation job refuses impossible recipes before it writes anything, and ends if nothing answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycloud.errors import ClusterError, DataError, ModelError
from raycloud.jobs.distill import run
from tests.cluster.recipes import small

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": {"model": "./nowhere"}}, ModelError, "no model at './nowhere'"),
        ({"student": {"blocks": 5}}, ModelError, "student.blocks is 5; allowed: 1 to 4"),
        (
            {"student": {"lora": {"target_modules": ["c_fc"]}}},
            ModelError,
            "lora.target_modules: no linear map 'c_fc' in the blocks",
        ),
        ({"data": {"source": "missing.jsonl"}}, DataError, "no data file at 'missing.jsonl'"),
        ({"edges": [{"name": "a", "where": {"domain": ["sport"]}}]}, DataError, "there are: movie, news"),
        ({"data": {"format": "alpaca"}}, DataError, "needs the text column 'instruction'"),
        ({"evaluation": {"by": "topic"}}, DataError, "no column 'topic'; allowed: null, domain, text"),
        ({"teacher": {"model": "builtin:minilm-l6"}}, ModelError, "is an encoder; allowed: causal"),
        (
            {"student": {"model": "builtin:minilm-l6"}},
            ModelError,
            "student.model 'builtin:minilm-l6' is an encoder; allowed: causal",
        ),
        ({"student": {"placement": {"num_gpus": 1}}}, ClusterError, "of the resource 'GPU', this job needs 2"),
        ({"teacher": {"replicas": 5}}, ClusterError, "has 4 of the resource 'cloud', this job needs 5"),
        ({"edges": [{"name": f"e{n}"} for n in range(9)]}, ClusterError, "has 8 of the resource 'edge'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(small(tiny_llama, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.waits
def test_rounds_that_nobody_answers_end_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tiny_llama, tmp_path / "run", rounds={"count": 1, "steps": 3, "deadline_s": 0.2, "empty": 2})
    with pytest.raises(ClusterError, match="no student answered in 2 attempts at round 1"):
        run(recipe)
