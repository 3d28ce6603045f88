"""Text model whose middle runs in the cloud: only hidden states leave this device."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from ssl import SSLCertVerificationError
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request

from pydantic import ValidationError

from raycloud.errors import LinkError, LinkSetupError
from raycloud.fetch import cache_dir, cached_folder
from raycloud.link.auth import bearer
from raycloud.link.channel import Channel, MeteredChannel
from raycloud.link.codecs.floats import CODECS
from raycloud.link.meter import Meter
from raycloud.link.network import EmulatedChannel, Network
from raycloud.link.proxy import open_url
from raycloud.link.websocket import SESSION_HEADER, WebSocketChannel, check_cloud, trusting
from raycloud.models.devices import Device, DType
from raycloud.models.text_model import TextModel
from raycloud.split.calibration import Calibration
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.client import PATIENCE_S, RemoteBlocks, SessionConfig
from raycloud.split.inference.generation import SplitTokenSource, text_model
from raycloud.split.inference.server_info import ServerInfo
from raycloud.split.parts import fingerprint_of, load_edge

# Codecs that hardly change the output of the model, from the fewest bytes to the most.
_PREFERRED = ("int8", "bfloat16", "float32")
_PATH, _OTHER_PATHS = "/v1/split", ("/v1/split-tune", "/v1/signals")
_MAX_ANSWER = 256 * 2**20


@dataclass(frozen=True)
class CloudEndpoint:
    """Address of the cloud's service and the settings of the connection."""

    url: str
    """Address of the service, ``wss://host[:port]/v1/split``."""
    token: str | None = None
    certificates: str | None = None
    """File of certificates to trust instead of the system's."""
    network: Network | None = None
    """Network to emulate by slowing down the link, for experiments."""

    def __post_init__(self) -> None:
        check_cloud(self.url, self.certificates)

    def channel(self, meter: Meter, session: str) -> Channel:
        """New channel of a session."""
        headers = {SESSION_HEADER: session}
        channel: Channel = WebSocketChannel(self.url, token=self.token, headers=headers, certificates=self.certificates)
        if self.network is not None:
            channel = EmulatedChannel(channel, self.network)
        return MeteredChannel(channel, meter)

    def check_path(self) -> None:
        """Check that the address is that of a service for generation; open one connection and close it.

        Raises:
            LinkSetupError: there is no service at the address, or another one.
            LinkError: the cloud cannot be reached.
        """
        if urlsplit(self.url).path.endswith(_OTHER_PATHS):
            raise self._wrong_path_error()
        try:
            self.channel(Meter(), secrets.token_hex(16)).close()
        except LinkSetupError:  # the token was accepted for the server information, so the path is wrong
            raise self._wrong_path_error() from None

    def _wrong_path_error(self) -> LinkSetupError:
        return LinkSetupError(
            f"the path '{urlsplit(self.url).path}' of {self.url} leads to no split model; a cloud serves {_PATH}, and "
            f"for other commands {' and '.join(_OTHER_PATHS)}"
        )

    def server_info(self) -> ServerInfo:
        """Server information of the cloud.

        Raises:
            LinkError: the cloud cannot be reached, refuses the token, or does not serve a split model.
        """
        try:
            return ServerInfo.model_validate(json.loads(self._get("models"))["data"][0]["split"])
        except (ValueError, KeyError, IndexError, TypeError, ValidationError):
            raise LinkSetupError(f"{self.url} does not say what it serves; is it a raycloud split model?") from None

    def calibration(self, fingerprint: str) -> Calibration:
        """Calibration of the cloud's codecs, downloaded once.

        Raises:
            LinkError: it cannot be downloaded, or has another fingerprint.
        """
        if not fingerprint.isalnum():
            raise LinkError(f"{self.url} announces a calibration with an odd fingerprint")

        def download(folder: Path) -> None:
            (folder / _CALIBRATION).write_bytes(self._get("calibration"))
            if Calibration.load(folder / _CALIBRATION).fingerprint != fingerprint:
                raise LinkError(f"{self.url} sent a calibration that is not the one it announced")

        return Calibration.load(cached_folder(cache_dir() / "calibrations" / fingerprint[:24], download) / _CALIBRATION)

    def _get(self, what: str) -> bytes:
        parts = urlsplit(self.url)
        scheme = "https" if parts.scheme == "wss" else "http"
        path = parts.path.rsplit("/", 1)[0] + f"/{what}"
        request = Request(urlunsplit((scheme, parts.netloc, path, "", "")), headers=bearer(self.token))
        context = trusting(self.certificates) if scheme == "https" else None
        try:
            with open_url(request, timeout_s=20, context=context) as answer:
                content: bytes = answer.read(_MAX_ANSWER)
                return content
        except HTTPError as error:
            if error.code in (401, 403):
                raise LinkSetupError(f"{self.url} refused the token (HTTP {error.code}); give --token") from None
            if error.code == 404:
                raise self._wrong_path_error() from None
            raise LinkError(f"{self.url} answered HTTP {error.code}") from None
        except (URLError, OSError) as error:
            why = getattr(error, "reason", error)
            if isinstance(why, SSLCertVerificationError):
                raise LinkSetupError(f"{self.url}: its certificate is not trusted ({why.verify_message})") from None
            raise LinkError(f"{self.url} cannot be reached: {why}") from None


_CALIBRATION = "codecs.safetensors"


def load_split(
    source: str,
    cloud: CloudEndpoint,
    *,
    codec: str = "auto",
    meter: Meter | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    patience_s: float = PATIENCE_S,
    notify: Callable[[str], None] = lambda line: None,
) -> TextModel:
    """Load the edge's parts of a model and connect them to the middle in the cloud.

    Args:
        source: the same model that the cloud serves, whole or as an exported ``edge`` directory.
        cloud: the cloud's service, which determines where the model is cut.
        codec: a codec that the cloud offers; ``auto`` takes int8 if it is calibrated, else bfloat16.
        meter: meter of the link's traffic.
        device: device of the edge's parts.
        dtype: type of their parameters.
        patience_s: time in seconds to restore a broken link before a generation fails.
        notify: called with one line before each download or conversion.

    Raises:
        LinkError: the cloud cannot be reached, refuses, or serves another model.
        ModelError: the model cannot be loaded.
    """
    info = cloud.server_info()
    cloud.check_path()
    here = fingerprint_of(source, notify)  # before another model is cut at blocks that it may not have
    if here != info.fingerprint:
        raise LinkSetupError(
            f"'{source}' is not the model that {cloud.url} serves; their fingerprints are {here[:12]} and "
            f"{info.fingerprint[:12]}"
        )
    part = load_edge(source, info.plans, device=device, dtype=dtype, notify=notify)
    chosen = next(name for name in _PREFERRED if name in info.codecs) if codec == "auto" else codec
    if chosen not in info.codecs:
        raise LinkSetupError(f"{cloud.url} does not offer codec '{chosen}'; it offers: {', '.join(info.codecs)}")
    calibration = None if chosen in CODECS else cloud.calibration(info.calibration)
    config = SessionConfig(
        part.fingerprint,
        part.plans,
        CutCodecs(part.config.hidden_size, calibration),
        chosen,
        info.max_tokens,
        patience_s,
    )
    connect = partial(cloud.channel, meter or Meter())
    cloud_blocks = partial(RemoteBlocks, connect, config)
    split = SplitTokenSource(part.first, part.last, cloud_blocks, part.plans, max_length=info.max_tokens)
    return text_model(part, split)
