"""``raycloud edge``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from raycloud.link.meter import Meter
    from raycloud.models.text import TextModel

app = typer.Typer(help="The edge device: an OpenAI-compatible server and a chat, without ray.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="A directory, GGUF file, hub id or builtin: name.")]
Cloud = Annotated[
    str | None, typer.Option(help="The cloud that runs the middle, wss://host/v1/split; a whole model if left out.")
]
CloudToken = Annotated[str | None, typer.Option(envvar="RAYCLOUD_TOKEN", help="What the cloud asks edges for.")]
Codec = Annotated[str, typer.Option(help="Of those that the cloud offers; auto takes int8 where it is calibrated.")]
Certificates = Annotated[
    str | None, typer.Option(help="A file of certificates to trust instead of the system's, for a cloud's own.")
]


@dataclass(frozen=True)
class _Writer:
    model: TextModel
    meter: Meter | None = None


def _writer(model: str, cloud: str | None, token: str | None, codec: str, certificates: str | None) -> _Writer:
    """What writes the text: a whole model in this process, or one whose middle is in the cloud."""
    from raycloud.edge.cloud import Cloud, remote
    from raycloud.edge.local import whole
    from raycloud.link.meter import Meter
    from raycloud.report.console import console

    if cloud is None:
        return _Writer(whole(model, console.print))
    meter = Meter()
    reached = Cloud(cloud, token, certificates)
    return _Writer(remote(model, reached, codec=codec, meter=meter, notify=console.print), meter)


@app.command("serve")
def serve(
    model: Model,
    cloud: Cloud = None,
    cloud_token: CloudToken = None,
    codec: Codec = "auto",
    certificates: Certificates = None,
    host: Annotated[str, typer.Option(help="Where to listen; other hosts than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.", min=0, max=65_535)] = 9000,
    token: Annotated[
        str | None, typer.Option(envvar="RAYCLOUD_EDGE_TOKEN", help="Clients must bring it as their API key.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call it; the model's last part if left out.")] = None,
) -> None:
    """Serve a model to OpenAI clients on this machine."""
    from raycloud.edge.server import Server, address_of, bind, create_app
    from raycloud.report.console import console

    with bind(host, port, token or None) as listening:
        writer = _writer(model, cloud, cloud_token, codec, certificates)
        called = name or Path(model.removeprefix("builtin:")).name
        server = Server(create_app(writer.model, called, token=token or None, meter=writer.meter))
        key = "your token" if token else "anything"
        console.print(f"serving '{called}': base_url={address_of(listening)} api_key={key} (Ctrl-C ends)")
        # The server ends by itself or by raising the signal once more, as it comes.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        console.print("stopped")


@app.command("chat")
def chat(
    model: Model,
    cloud: Cloud = None,
    cloud_token: CloudToken = None,
    codec: Codec = "auto",
    certificates: Certificates = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 always says the most likely.", min=0, max=2)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
) -> None:
    """Chat with a model in the terminal."""
    from raycloud.edge.chat import Conversation, asker
    from raycloud.edge.chat import chat as talk
    from raycloud.models.sampling import Sampling
    from raycloud.report.console import console

    writer = _writer(model, cloud, cloud_token, codec, certificates)
    conversation = Conversation(writer.model, max_tokens, Sampling(temperature=temperature, seed=seed))
    talk(conversation, console, asker(console), writer.meter)
