"""Result directories that several modules of these tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.recipes import small


@pytest.fixture(scope="session")
def distilled(local_ray: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Result directory of an undisturbed distillation; tests leave it as it is."""
    from raycloud.jobs.distill import run

    path = tmp_path_factory.mktemp("distilled") / "run"
    run(small(tiny_llama, path))
    return path
