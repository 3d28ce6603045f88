"""A model whose middle is in the cloud, ready to write text: only hidden states leave this device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from pydantic import ValidationError

from raycloud.errors import LinkError
from raycloud.fetch import cache_dir, prepared
from raycloud.link.channel import Channel, Metered
from raycloud.link.codecs import CODECS
from raycloud.link.meter import Meter
from raycloud.link.network import Network, Shaped
from raycloud.link.websocket import WebSocketChannel, check_url, trusting
from raycloud.models.loading import Device, DType
from raycloud.models.text import TextModel
from raycloud.split.calibration import Calibration
from raycloud.split.generation import SplitModel, text_model
from raycloud.split.offer import Offer
from raycloud.split.parts import load_edge
from raycloud.split.remote import RemoteMiddle, Terms
from raycloud.split.terms import Codecs

SESSION_HEADER = "x-session-id"
"""What Ray Serve's consistent-hash router keeps a session at one replica by."""

# From the most to the least sparing of those that do not change what the model says by much.
_PREFERRED = ("int8", "bfloat16", "float32")
_MAX_ANSWER = 256 * 2**20


@dataclass(frozen=True)
class Cloud:
    """Where the middle runs and how to reach it."""

    url: str
    """``wss://host[:port]/v1/split``."""
    token: str | None = None
    certificates: str | None = None
    """A file of certificates to trust instead of the system's."""
    network: Network | None = None
    """Slows the link down to this, for experiments."""

    def __post_init__(self) -> None:
        check_url(self.url)

    def channel(self, meter: Meter, session: str) -> Channel:
        """A new channel for a session."""
        headers = {SESSION_HEADER: session}
        channel: Channel = WebSocketChannel(self.url, token=self.token, headers=headers, certificates=self.certificates)
        if self.network is not None:
            channel = Shaped(channel, self.network)
        return Metered(channel, meter)

    def offer(self) -> Offer:
        """What the cloud offers.

        Raises:
            LinkError: it cannot be reached, refuses the token, or is no split model.
        """
        try:
            return Offer.model_validate(json.loads(self._get("models"))["data"][0]["split"])
        except (ValueError, KeyError, IndexError, TypeError, ValidationError):
            raise LinkError(f"{self.url} does not say what it serves; is it a raycloud split model?") from None

    def calibration(self, fingerprint: str) -> Calibration:
        """The calibration of the cloud's codecs, downloaded once.

        Raises:
            LinkError: it cannot be had, or is not what was announced.
        """
        if not fingerprint.isalnum():
            raise LinkError(f"{self.url} announces a calibration with an odd fingerprint")

        def download(folder: Path) -> None:
            (folder / _CALIBRATION).write_bytes(self._get("calibration"))
            if Calibration.load(folder / _CALIBRATION).fingerprint != fingerprint:
                raise LinkError(f"{self.url} sent a calibration that is not the one it announced")

        return Calibration.load(prepared(cache_dir() / "calibrations" / fingerprint[:24], download) / _CALIBRATION)

    def _get(self, what: str) -> bytes:
        parts = urlsplit(self.url)
        scheme = "https" if parts.scheme == "wss" else "http"
        path = parts.path.rsplit("/", 1)[0] + f"/{what}"
        request = Request(urlunsplit((scheme, parts.netloc, path, "", "")))
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        context = trusting(self.certificates) if scheme == "https" else None
        try:
            with urlopen(request, timeout=20, context=context) as answer:
                content: bytes = answer.read(_MAX_ANSWER)
                return content
        except HTTPError as error:
            if error.code in (401, 403):
                raise LinkError(f"{self.url} refused the token (HTTP {error.code}); give --cloud-token") from None
            raise LinkError(f"{self.url} answered HTTP {error.code}") from None
        except (URLError, OSError) as error:
            raise LinkError(f"{self.url} cannot be reached: {getattr(error, 'reason', error)}") from None


_CALIBRATION = "codecs.safetensors"


def remote(
    source: str,
    cloud: Cloud,
    *,
    codec: str = "auto",
    meter: Meter | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    patience_s: float = 30.0,
    notify: Callable[[str], None] = lambda line: None,
) -> TextModel:
    """The edge's parts of a model and a link to its middle.

    Args:
        source: the same model that the cloud serves, whole or as an exported ``edge`` directory.
        cloud: where the middle is; it says where the model is cut.
        codec: one that the cloud offers; ``auto`` takes int8 where it is calibrated, bfloat16 otherwise.
        meter: counts what crosses.
        device: where the edge's parts go.
        dtype: their parameters' type.
        patience_s: how long a broken link may take to mend before a generation fails.
        notify: told one line before each download or conversion.

    Raises:
        LinkError: the cloud cannot be reached, refuses, or serves another model.
        ModelError: the model cannot be loaded.
    """
    offer = cloud.offer()
    part = load_edge(source, offer.plans, device=device, dtype=dtype, notify=notify)
    if part.fingerprint != offer.fingerprint:
        raise LinkError(f"'{source}' is not the model that {cloud.url} serves; their fingerprints differ")
    chosen = next(name for name in _PREFERRED if name in offer.codecs) if codec == "auto" else codec
    if chosen not in offer.codecs:
        raise LinkError(f"{cloud.url} does not offer codec '{chosen}'; it offers: {', '.join(offer.codecs)}")
    calibration = None if chosen in CODECS else cloud.calibration(offer.calibration)
    terms = Terms(
        part.fingerprint,
        part.plans,
        Codecs(part.config.hidden_size, calibration),
        chosen,
        offer.max_tokens,
        patience_s,
    )
    connect = partial(cloud.channel, meter or Meter())
    middle = partial(RemoteMiddle, connect, terms)
    split = SplitModel(part.first, part.last, middle, part.plans, max_length=offer.max_tokens)
    return text_model(part, split)
