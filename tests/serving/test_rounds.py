"""Door for devices on Ray Serve: what it says where no job takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from raycloud.edge.learn import JobEndpoint
from raycloud.errors import LinkSetupError, RecipeError
from raycloud.link.client import SessionRefused
from raycloud.rounds.service import RoundClient
from raycloud.serving.rounds import RoundsSettings, app

CONFIG = Path(__file__).parents[2] / "serve_apps" / "rounds.yaml"
TOKEN = "s3cret"


@pytest.fixture(scope="module")
def url(serve_port: int) -> Iterator[str]:
    serve.run(app(RoundsSettings(token=TOKEN)), name="rounds", route_prefix="/rounds")
    yield f"ws://127.0.0.1:{serve_port}/rounds/v1/rounds"
    serve.delete("rounds")


def test_a_job_that_does_not_run_is_refused_in_one_line(url: str) -> None:
    endpoint = JobEndpoint(url, "nothing", TOKEN)
    with pytest.raises(SessionRefused, match="no job 'nothing' takes devices here now") as refused:
        RoundClient(lambda session: endpoint.connect("rounds", session))
    assert len(str(refused.value).splitlines()) == 1


def test_a_wrong_token_is_refused(url: str) -> None:
    endpoint = JobEndpoint(url, "nothing", "wrong")
    with pytest.raises(LinkSetupError, match="refused the token"):
        RoundClient(lambda session: endpoint.connect("rounds", session))


def test_the_config_file_is_one_that_serve_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    RoundsSettings.model_validate(config.applications[0].args)
    monkeypatch.delenv("RAYCLOUD_TOKEN", raising=False)
    with pytest.raises(RecipeError, match="no token"):
        app(RoundsSettings())
