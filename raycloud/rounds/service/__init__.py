"""Rounds over a link: a device asks for its task, pulls weights, pushes its contribution, and needs no Ray."""

from __future__ import annotations

from raycloud.rounds.service.client import RoundClient
from raycloud.rounds.service.limits import RoundLimits
from raycloud.rounds.service.server import DeviceGone, DeviceMember, DeviceUpdate, RoundServer

__all__ = ["DeviceGone", "DeviceMember", "DeviceUpdate", "RoundClient", "RoundLimits", "RoundServer"]
