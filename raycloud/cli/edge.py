"""``raycloud edge``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raycloud.cli.options import ApiKey, AsJson, Certificates, Token, print_json

if TYPE_CHECKING:
    from raycloud.edge.served_model import ServedModel
    from raycloud.link.meter import Meter
    from raycloud.models.text_model import TextModel

app = typer.Typer(help="Run a model on an edge device without ray, or train one with others.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="A directory, GGUF file, hub id or builtin: name.")]
CloudEndpoint = Annotated[
    str | None,
    typer.Option(help="Address of the cloud that runs the middle blocks, wss://host/v1/split; default: none."),
]
Codec = Annotated[
    str, typer.Option(help="Codec of the hidden states that the cloud offers; auto is int8 if calibrated.")
]


def _check(cloud: str | None, certificates: str | None) -> None:
    """Refuse an unusable address before torch is loaded, which takes seconds."""
    if cloud is not None:
        from raycloud.link.websocket import check_cloud

        check_cloud(cloud, certificates)


@dataclass(frozen=True)
class _TextSource:
    model: TextModel
    meter: Meter | None = None


def _watched_folder(model: str, cloud: str | None) -> Path:
    """Folder that ``--watch`` looks at.

    Raises:
        ModelError: the model cannot be swapped while it is served.
    """
    from raycloud.errors import ModelError

    folder = Path(model).expanduser()
    if cloud is not None:
        raise ModelError("--watch needs a whole model: with --cloud both parts would have to change at once")
    if not folder.is_dir():
        raise ModelError(f"--watch needs a directory as --model, got '{model}'")
    return folder


def _text_source(model: str, cloud: str | None, token: str | None, codec: str, certificates: str | None) -> _TextSource:
    """Load the model that generates text: a whole model in this process, or one whose middle blocks run in the cloud.

    Args:
        model: model to load.
        cloud: address of the cloud; None for a whole model.
        token: bearer token for the cloud.
        codec: codec of the hidden states that cross the link.
        certificates: file of trusted certificates; None for those of the system.
    """
    from raycloud.edge.endpoint import CloudEndpoint, load_split
    from raycloud.edge.whole_model import load_whole
    from raycloud.link.meter import Meter
    from raycloud.report.console import console

    if cloud is None:
        return _TextSource(load_whole(model, console.print))
    meter = Meter()
    reached = CloudEndpoint(cloud, token, certificates)
    return _TextSource(load_split(model, reached, codec=codec, meter=meter, notify=console.print), meter)


@app.command("serve")
def serve(
    model: Model,
    cloud: CloudEndpoint = None,
    token: Token = None,
    codec: Codec = "auto",
    certificates: Certificates = None,
    host: Annotated[
        str, typer.Option(help="Host to listen on; hosts other than loopback need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65_535)] = 9000,
    api_key: ApiKey = None,
    name: Annotated[str | None, typer.Option(help="Name of the model for clients; default: its last part.")] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name of this machine that clients may use when no API key is required."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Swap newer versions of a model's directory in while it is served.")
    ] = False,
) -> None:
    """Serve a model to OpenAI clients on this machine."""
    _check(cloud, certificates)
    folder = _watched_folder(model, cloud) if watch else None
    from contextlib import ExitStack

    from raycloud.edge.model_watch import ModelWatch
    from raycloud.edge.server import Server, address_of, bind, create_app
    from raycloud.link.auth import tokens_of
    from raycloud.report.console import console

    with bind(host, port, api_key or None) as listening, ExitStack() as stack:
        served: TextModel | ServedModel
        if folder is None:
            source = _text_source(model, cloud, token, codec, certificates)
            served, meter = source.model, source.meter
        else:
            served, meter = stack.enter_context(ModelWatch(folder, console.print)), None
        called = name or Path(model.removeprefix("builtin:")).name
        keys, hosts = tokens_of(api_key), allow_host or ()
        server = Server(create_app(served, called, tokens=keys, allow_hosts=hosts, meter=meter))
        key = "yours" if api_key else "anything"
        console.print(f"serving '{called}': base_url={address_of(listening)} api_key={key} (Ctrl-C ends)")
        server.run(sockets=[listening])
    # On a signal the server returns, or raises the signal again; report both as an interrupt.
    raise KeyboardInterrupt


@app.command("chat")
def chat(
    model: Model,
    cloud: CloudEndpoint = None,
    token: Token = None,
    codec: Codec = "auto",
    certificates: Certificates = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.", min=0, max=2)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed that makes sampled answers reproducible.")] = None,
) -> None:
    """Chat with a model in the terminal."""
    _check(cloud, certificates)
    from raycloud.edge.chat import Conversation, make_prompt
    from raycloud.edge.chat import chat as talk
    from raycloud.models.sampling import Sampling
    from raycloud.report.console import console

    writer = _text_source(model, cloud, token, codec, certificates)
    conversation = Conversation(writer.model, max_tokens, Sampling(temperature=temperature, seed=seed))
    talk(conversation, console, make_prompt(console), writer.meter)


@app.command("learn")
def learn(
    cloud: Annotated[str, typer.Option(help="Address of the cloud, wss://host/v1/rounds.")],
    job: Annotated[str, typer.Option(help="Name of the job: the last part of its result directory.")],
    data: Annotated[
        str, typer.Option(help="This device's texts: a JSONL, JSON or Parquet file, a built-in set, a hub id.")
    ],
    device: Annotated[
        str | None, typer.Option(help="Name of this device's edge in the job's recipe; default: the only one.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the state and the final model; default: learn/JOB.")
    ] = None,
    send_tokens: Annotated[
        bool, typer.Option("--send-tokens", help="Allow token ids of the texts to leave for the teacher.")
    ] = False,
    send_hidden: Annotated[
        bool, typer.Option("--send-hidden", help="Allow hidden states of the texts to leave for the cloud's blocks.")
    ] = False,
    max_bytes: Annotated[
        str | None, typer.Option(help="Most bytes over the link in a round, such as 500MB; default: no limit.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory that training may take, as estimated, such as 2GB.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for all cores.", min=0)] = 0,
    token: Token = None,
    certificates: Certificates = None,
    as_json: AsJson = False,
) -> None:
    """Take part in a distillation or split fine-tuning on a cluster: this device trains on its own texts, without ray.

    The same command continues after an interruption.
    """
    _check(cloud, certificates)
    from contextlib import ExitStack

    from raycloud.edge.learn import JobEndpoint
    from raycloud.edge.learn import learn as take_part
    from raycloud.edge.learn_session import LearnOptions
    from raycloud.edge.learn_terms import Allowance, size_of
    from raycloud.report.console import ProgressBars, console, progress_bars
    from raycloud.report.device import print_learnt

    endpoint = JobEndpoint(cloud, job, token, certificates)
    allowed = Allowance(
        send_tokens,
        send_hidden,
        None if max_bytes is None else size_of(max_bytes),
        None if max_memory is None else size_of(max_memory),
    )
    options = LearnOptions(data, folder or Path("learn") / Path(job).name, device, allowed, threads)
    with ExitStack() as stack:
        shown: list[ProgressBars] = []

        def show_progress(what: str, done: int, total: int, note: str) -> None:
            if not shown:
                shown.append(stack.enter_context(progress_bars(total)))
            shown[0].move(what, done, note)

        summary = take_part(job, endpoint.connect, options, notify=console.print, on_progress=show_progress)
    print_learnt(summary)
    print_json(as_json, summary)
