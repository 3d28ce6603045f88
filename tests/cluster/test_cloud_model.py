"""Actor of the cloud's model, without Ray: a device that is away while rounds go on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raycloud.cluster.cloud_model import CloudModel
from raycloud.rounds.service import DeviceGone
from tests.retrain.in_process import DIGITS, recipe_of


def test_an_older_window_of_an_absent_device_is_not_awaited(tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, source={"steps": 0}, edges=[{"name": "shop", "windows": ["invert"] * 2, "device": True}])
    cloud = CloudModel(recipe, tmp_path, "run")
    cloud.prepare()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(cloud.device_window, "shop", 0)
        second = threads.submit(cloud.device_window, "shop", 1)
        with pytest.raises(DeviceGone, match="the device 'shop' was asked for something newer"):
            first.result(60)
        assert not second.done()
        third = threads.submit(cloud.device_window, "shop", 2)
        with pytest.raises(DeviceGone):
            second.result(60)
        cloud._newest["shop"] = 3
        with pytest.raises(DeviceGone):
            third.result(60)
