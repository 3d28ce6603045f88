"""Over a link both sides learn what they learn in one process, whatever happens to link, cloud and edge."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.errors import LinkError
from raycloud.link.channel import Channel
from raycloud.link.frames import HEADER_BYTES
from raycloud.models.segments import Segment
from raycloud.split.finetune.code import Code, narrow, tensors_of
from raycloud.split.finetune.edge import EdgeSide
from raycloud.split.finetune.host import TuneLimits
from raycloud.split.finetune.loop import train
from raycloud.split.finetune.state import Checkpoints
from raycloud.training.lora import LoraRecipe
from tests.split.finetune.wiring import WIDTH, Service, batches, calibration, head_of, model_of, split, values

N = 12


def coded(ahead: Segment) -> Code:
    chance = torch.Generator().manual_seed(5)
    return narrow(torch.randn(200, WIDTH, generator=chance), 8, outliers=2)


def fresh(changes: bool = False) -> EdgeSide:
    return split(model_of("bert"), 2, 5, head=head_of(), code=coded, back=10, form="int8", changes=changes, depth=4)


def lessons(edge: EdgeSide, step: int) -> list[Batch]:
    """Other texts in every step, or the same again where that matters."""
    return batches(step % 4 if edge.memory.kept else step, 5, language=False)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with closing(Service(fresh(), tmp_path / "cloud")) as service:
        yield service


def run(edge: EdgeSide, service: Service, folder: Path, told: Callable[[int], None] = lambda step: None) -> None:
    kept = Checkpoints(folder)
    latest = max(kept.steps(), default=None)
    edge.cloud = service.at(latest)
    try:
        if latest is None:
            edge.fit(calibration(language=False))
        train(
            edge,
            lambda step: lessons(edge, step),
            steps=N,
            every=3,
            kept=kept,
            cloud_at=service.at,
            told=lambda step: told(step.step),
        )
    finally:
        edge.cloud.close()


def of_the_edge(edge: EdgeSide) -> dict[str, Tensor]:
    return values(dict(edge.modules))


def of_the_cloud(service: Service) -> dict[str, Tensor]:
    [path] = service._folder.glob(f"*/*/{N}.safetensors")
    return load_file(path)


def undisturbed(changes: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    edge = fresh(changes)
    cloud = edge.cloud.side  # type: ignore[attr-defined]
    for step in range(N):
        edge.step(lessons(edge, step))
    return of_the_edge(edge), cloud.state()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_over_a_link_ends_with_the_weights_of_one_process(service: Service, tmp_path: Path) -> None:
    edge = fresh()
    run(edge, service, tmp_path / "edge")
    ours, theirs = undisturbed()
    assert_equal(of_the_edge(edge), ours)
    assert_equal(of_the_cloud(service), theirs)


def test_a_cloud_that_is_killed_again_after_three_checkpoints_comes_back(service: Service, tmp_path: Path) -> None:
    """What it went on from the first time is no longer kept by then."""
    killed: list[int] = []

    def told(step: int) -> None:
        if step in (1, N - 1) and step not in killed:
            killed.append(step)
            service.kill()

    edge = fresh()
    run(edge, service, tmp_path / "edge", told)
    assert killed == [1, N - 1]
    ours, theirs = undisturbed()
    assert_equal(of_the_edge(edge), ours)
    assert_equal(of_the_cloud(service), theirs)


def test_a_cloud_that_never_stays_is_given_up(service: Service, tmp_path: Path) -> None:
    killed: list[int] = []

    def told(step: int) -> None:
        if step == 4:
            killed.append(step)
            service.kill()

    with pytest.raises(
        LinkError, match=r"lost the session; it keeps that of a silent edge 60 s \(6 times after step 3"
    ):
        run(fresh(), service, tmp_path / "edge", told)
    assert len(killed) == 6


class Killed(Exception):
    """The edge dies."""


@pytest.mark.parametrize("changes", [False, True], ids=["as they are", "changes"])
def test_twenty_failures_of_link_cloud_and_edge_change_no_bit(tmp_path: Path, changes: bool) -> None:
    """Whatever breaks breaks at a random message, and each thing a few times."""
    with closing(Service(fresh(changes), tmp_path / "cloud")) as service:
        _fail_twenty_times(service, tmp_path, changes)


def _fail_twenty_times(service: Service, tmp_path: Path, changes: bool) -> None:
    chance, happened = random.Random(7), list[str]()
    planned = ["link"] * 10 + ["cloud"] * 5 + ["edge"] * 5
    chance.shuffle(planned)
    countdown = chance.randint(1, 8)

    class Breaking:
        """Passes messages on until something happens."""

        def __init__(self, inner: Channel) -> None:
            self._inner = inner

        def send(self, data: bytes) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == 0 and len(happened) < len(planned):
                countdown = chance.randint(4, 12)
                happened.append(planned[len(happened)])
                match happened[-1]:
                    case "link":
                        self._inner.close()
                    case "cloud":
                        service.kill()
                    case "edge":
                        raise Killed
            self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            return self._inner.receive(timeout_s)

        def close(self) -> None:
            self._inner.close()

    connect = service.connect
    service.connect = lambda session: Breaking(connect(session))  # type: ignore[method-assign]
    while True:
        edge = fresh(changes)
        try:
            run(edge, service, tmp_path / "edge")
            break
        except Killed:
            continue
    assert sorted(happened) == sorted(planned[: len(happened)])
    assert len(happened) == len(planned), f"only {len(happened)} failures happened"
    ours, theirs = undisturbed(changes)
    assert_equal(of_the_edge(edge), ours)
    assert_equal(of_the_cloud(service), theirs)


def test_no_token_label_or_mask_is_in_a_whole_run(service: Service, tmp_path: Path) -> None:
    """What crosses is searched for every text's ids, labels and mask in the usual widths; what is put there is found.

    Headers are left out: their counters are small numbers in a row, as labels are.
    """
    crossed = bytearray()

    class Tapped:
        def __init__(self, inner: Channel) -> None:
            self._inner = inner

        def send(self, data: bytes) -> None:
            crossed.extend(data[HEADER_BYTES:])
            self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            crossed.extend(data[HEADER_BYTES:])
            return data

        def close(self) -> None:
            self._inner.close()

    connect = service.connect
    service.connect = lambda session: Tapped(connect(session))  # type: ignore[method-assign]
    run(fresh(), service, tmp_path / "edge")
    widths = {torch.uint8, torch.int16, torch.int32, torch.int64}
    secrets = [
        tensor.to(width).numpy().tobytes()
        for step in range(N)
        for batch in batches(step, 3, language=False)
        # Four labels in one byte each are found anywhere by chance.
        for tensor in (*(ids[:6] for ids in batch.ids), batch.labels, *batch.valid[:, :11].int())
        for width in (widths if len(tensor) > 4 else widths - {torch.uint8})
        if len(set(tensor.tolist())) > 2
    ]
    assert len(secrets) > 400
    assert not [secret for secret in secrets if secret in crossed]
    control = bytes(crossed) + secrets[17]
    assert [secret for secret in secrets if secret in control]


def test_a_cloud_refuses_what_it_has_not(service: Service) -> None:
    changes = [
        ({"fingerprint": "other"}, "is not tiny"),
        ({"first": 1}, r"blocks \[1, 5\) are asked for, \[2, 5\) are here"),
        ({"restore": 3}, "no checkpoint of step 3"),
        ({"up": service.begin.up.model_copy(update={"width": 100})}, "rows have 32"),
        ({"down": service.begin.down.model_copy(update={"apart": 20})}, "rows have 32"),
        ({"lora": LoraRecipe(r=33)}, "lora.r=33; allowed: up to 32"),
    ]
    for change, message in changes:
        service.begin, before = service.begin.model_copy(update=change), service.begin
        with pytest.raises(LinkError, match=message):
            service.at(service.begin.restore)
        service.begin = before


def test_a_decoder_that_is_none_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = fresh()
    monkeypatch.setattr("raycloud.split.finetune.cloud.tensors_of", lambda decoder: b"x" * len(tensors_of(decoder)))
    edge.cloud = service.at(None)
    with closing(edge.cloud), pytest.raises(LinkError, match="the cloud's code cannot be used: the decoder cannot be"):
        edge.fit(calibration(language=False))


def test_a_code_is_fitted_before_the_first_step_and_only_where_there_is_one(service: Service) -> None:
    edge = fresh()
    edge.cloud = service.at(None)
    with closing(edge.cloud):
        edge.fit(calibration(language=False))
        edge.step(batches(0, 1, language=False))
        with pytest.raises(LinkError, match="rows to fit a code to came in step 1"):
            edge.fit(calibration(language=False))


@pytest.mark.parametrize("trained", [True, False])
def test_a_lost_cloud_comes_back_with_both_codes(service: Service, tmp_path: Path, trained: bool) -> None:
    """Also those that do not learn: nothing else has them."""
    cuts = {name: getattr(service.begin, name).model_copy(update={"trained": trained}) for name in ("up", "down")}
    service.begin = service.begin.model_copy(update=cuts)
    edge, batch = fresh(), batches(50, 1, language=False)[0]
    edge.cloud = service.at(None)
    edge.fit(calibration(language=False))
    edge.step(batches(0, 2, language=False))
    edge.settle()
    edge.cloud.save(1)
    kept, before = edge.state(), edge.predict(batch)
    edge.cloud.close()
    service.kill()
    again = fresh()
    again.load(kept)
    again.cloud = service.at(1)
    with closing(again.cloud):
        assert torch.equal(again.predict(batch), before)


def test_only_the_latest_runs_are_kept(tmp_path: Path) -> None:
    with closing(Service(fresh(), tmp_path / "cloud", TuneLimits(runs=2))) as service:
        first = service.at(None)  # goes on, and is spared
        first.save(0)
        for number in range(1, 5):
            service.begin = service.begin.model_copy(update={"run": str(number) * 32})
            with closing(service.at(None)) as cloud:
                cloud.save(0)
        kept = {path.parent.name[0] for path in (tmp_path / "cloud").glob("*/*/0.safetensors")}
        assert kept == {"0", "3", "4"}
        first.close()


def test_texts_beyond_what_is_granted_are_refused(tmp_path: Path) -> None:
    edge = fresh()
    with closing(Service(edge, tmp_path / "cloud", TuneLimits(tokens=8))) as service:
        edge.cloud = service.at(None)
        with closing(edge.cloud), pytest.raises(LinkError, match="allowed: 8 tokens in all"):
            edge.step(batches(0, 1, language=False))


@pytest.mark.parametrize("limits", [TuneLimits(micros=1), TuneLimits(outstanding=40)], ids=["micros", "tokens"])
def test_micro_batches_beyond_what_is_granted_are_refused_though_none_is_computed(
    limits: TuneLimits, tmp_path: Path
) -> None:
    edge, gate = fresh(), threading.Event()
    with closing(Service(edge, tmp_path / "cloud", limits)) as service:
        edge.cloud = service.at(None)
        edge.fit(calibration(language=False))
        service.host._engine.submit(gate.wait)
        threading.Timer(0.5, gate.set).start()
        with closing(edge.cloud), pytest.raises(LinkError, match=r"2 micro-batches and \d+ tokens .* a smaller depth"):
            edge.step(batches(0, 5, language=False))


def test_a_micro_batch_counts_until_its_gradient_has_come(tmp_path: Path) -> None:
    edge = fresh()  # two of its four micro-batches on their way are gradients
    with closing(Service(edge, tmp_path / "cloud", TuneLimits(micros=2))) as service:
        edge.cloud = service.at(None)
        edge.fit(calibration(language=False))
        with closing(edge.cloud):
            for step in range(2):
                edge.step(batches(step, 5, language=False))


def test_a_memory_beyond_what_is_granted_is_refused(tmp_path: Path) -> None:
    edge = fresh(changes=True)
    with closing(Service(edge, tmp_path / "cloud", TuneLimits(memory_bytes=100))) as service:
        edge.cloud = service.at(None)
        with closing(edge.cloud), pytest.raises(LinkError, match="takes more than 100 bytes"):
            edge.step(batches(0, 3, language=False))


def test_a_step_with_a_loss_that_is_no_number_is_skipped_by_both_sides(service: Service) -> None:
    edge = fresh()
    cloud = edge.cloud.side  # type: ignore[attr-defined]
    before = values({"cloud": cloud.middle, **edge.modules})
    loss = edge.task.loss
    edge.task.loss = lambda outputs, batch: loss(outputs * float("nan"), batch)  # type: ignore[method-assign]
    assert edge.step(batches(0, 2, language=False)).skipped
    assert_equal(values({"cloud": cloud.middle, **edge.modules}), before)
    edge.task.loss = loss  # type: ignore[method-assign]
    assert not edge.step(batches(1, 2, language=False)).skipped
    assert (cloud.step, edge.trainer.step_index) == (2, 2)
