"""Training over a link gives the weights of one process, for any failure of link, cloud or edge."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.errors import LinkError, TrainingError
from raycloud.link.channel import Channel
from raycloud.link.frames import HEADER_BYTES, Frame
from raycloud.models.segments import Segment
from raycloud.split.finetune.bottleneck import Bottleneck, decoder_to_bytes, fit_low_rank, max_decoder_bytes
from raycloud.split.finetune.checkpoints import CheckpointStore
from raycloud.split.finetune.edge import UShapedEdge
from raycloud.split.finetune.edge_trainer import token_counts
from raycloud.split.finetune.messages import TuneKind
from raycloud.split.finetune.recovery import last_common_checkpoint, train
from raycloud.split.finetune.server import TuneLimits
from raycloud.split.finetune.traffic import bottleneck_traffic
from raycloud.training.recipe import LoraRecipe
from tests.split.finetune.wiring import WIDTH, Service, batches, calibration, head_of, model_of, split, values

N = 12


def coded(ahead: Segment) -> Bottleneck:
    chance = torch.Generator().manual_seed(5)
    return fit_low_rank(torch.randn(200, WIDTH, generator=chance), 8, num_outliers=2)


def fresh(changes: bool = False) -> UShapedEdge:
    return split(
        model_of("bert"),
        2,
        5,
        head=head_of(),
        code=coded,
        downlink_rank=10,
        dtype="int8",
        activation_delta=changes,
        max_in_flight=4,
    )


def lessons(edge: UShapedEdge, step: int) -> list[Batch]:
    """Make new texts for every step, or the same ones where that matters."""
    return batches(step % 4 if edge.activation_cache.kept else step, 5, language=False)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with closing(Service(fresh(), tmp_path / "cloud")) as service:
        yield service


def run(edge: UShapedEdge, service: Service, folder: Path, told: Callable[[int], None] = lambda step: None) -> None:
    kept = CheckpointStore(folder)
    latest = last_common_checkpoint(kept, service.at)
    edge.cloud = service.at(None) if latest is None else latest[1]
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
            on_step=lambda step: told(step.step),
        )
    finally:
        edge.cloud.close()


def of_the_edge(edge: UShapedEdge) -> dict[str, Tensor]:
    return values(dict(edge.modules))


def of_the_cloud(service: Service) -> dict[str, Tensor]:
    [path] = service._folder.glob(f"*/*/{N}/state.safetensors")
    return load_file(path)


@cache
def undisturbed(changes: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    edge = fresh(changes)
    cloud = edge.cloud.trainer  # type: ignore[attr-defined]
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole run, with the checkpoints of edge and cloud."""
    folder = tmp_path_factory.mktemp("finished")
    with closing(Service(fresh(), folder / "cloud")) as service:
        run(fresh(), service, folder / "edge")
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Iterator[Service]:
    """Cloud with a copy of the checkpoints of a whole run; those of the edge are beside it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with closing(Service(fresh(), tmp_path / "cloud")) as service:
        yield service


def damage(path: Path, how: str) -> None:
    """Damage a file so that safetensors reads it, cannot read it, or does not find it."""
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content[:100] if how == "shorter" else content)


@pytest.mark.parametrize("whose", ["edge", "cloud"])
@pytest.mark.parametrize("how", ["flipped", "shorter", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    how: str, whose: str, again: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = CheckpointStore(tmp_path / "edge").steps()
    assert steps[-1] == N and len(steps) == CheckpointStore.KEPT
    [newest] = (tmp_path / whose).glob(f"{'**/' if whose == 'cloud' else ''}{N}/state.safetensors")
    damage(newest, how)
    capsys.readouterr()
    edge, made = fresh(), list[int]()
    run(edge, again, tmp_path / "edge", made.append)
    assert made == list(range(steps[-2], N))
    [said] = [line for line in capsys.readouterr().out.splitlines() if "trying the checkpoint before it" in line]
    assert str(N) in said
    ours, theirs = undisturbed()
    assert_equal(of_the_edge(edge), ours)
    assert_equal(of_the_cloud(again), theirs)


def test_without_an_undamaged_checkpoint_none_is_removed(again: Service, tmp_path: Path) -> None:
    steps = CheckpointStore(tmp_path / "edge").steps()
    for path in (tmp_path / "edge").glob("*/state.safetensors"):
        damage(path, "flipped")
    with pytest.raises(TrainingError, match=f"cannot read the checkpoint '.*{N}'") as caught:
        run(fresh(), again, tmp_path / "edge")
    assert "\n" not in str(caught.value)
    assert CheckpointStore(tmp_path / "edge").steps() == steps


def test_a_cloud_that_is_killed_again_after_three_checkpoints_comes_back(service: Service, tmp_path: Path) -> None:
    """The state it resumed from the first time is no longer stored by then."""
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


@pytest.mark.waits
@pytest.mark.parametrize("changes", [False, True], ids=["as they are", "changes"])
def test_twenty_failures_of_link_cloud_and_edge_change_no_bit(tmp_path: Path, changes: bool) -> None:
    """Each failure happens at random messages, a few times."""
    with closing(Service(fresh(changes), tmp_path / "cloud")) as service:
        _fail_twenty_times(service, tmp_path, changes)


def _fail_twenty_times(service: Service, tmp_path: Path, changes: bool) -> None:
    chance, happened = random.Random(7), list[str]()
    planned = ["link"] * 10 + ["cloud"] * 5 + ["edge"] * 5
    chance.shuffle(planned)
    countdown = chance.randint(1, 8)

    class Breaking:
        """Channel that passes messages on until an event happens."""

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
    """No text's ids, labels and mask are found in the traffic, in the usual integer widths; planted ones are found.

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
        ({"start_block": 1}, r"blocks \[1, 5\) are asked for, \[2, 5\) are here"),
        ({"restore": 3}, "no checkpoint of step 3"),
        ({"uplink": service.begin.uplink.model_copy(update={"width": 100})}, "hidden states have 32"),
        ({"downlink": service.begin.downlink.model_copy(update={"num_outliers": 20})}, "hidden states have 32"),
        ({"lora": LoraRecipe(r=33)}, "lora.r=33; allowed: up to 32"),
    ]
    for change, message in changes:
        service.begin, before = service.begin.model_copy(update=change), service.begin
        with pytest.raises(LinkError, match=message):
            service.at(service.begin.restore)
        service.begin = before


def test_a_decoder_that_is_none_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = fresh()
    monkeypatch.setattr(
        "raycloud.split.finetune.cloud.decoder_to_bytes", lambda decoder: b"x" * len(decoder_to_bytes(decoder))
    )
    edge.cloud = service.at(None)
    with (
        closing(edge.cloud),
        pytest.raises(LinkError, match="the cloud's bottleneck cannot be used: the decoder cannot be"),
    ):
        edge.fit(calibration(language=False))


def test_bytes_told_in_advance_are_those_that_cross_a_link_in_pieces(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycloud.link.frames.PIECE_BYTES", 500)
    edge = fresh()
    edge.cloud = cloud = service.at(None)
    with closing(edge.cloud):
        fitted_to, mine = calibration(language=False), batches(0, 3, language=False)
        edge.fit(fitted_to)
        edge.step(mine)
        edge.wait_for_optimiser()
        told = bottleneck_traffic(
            [token_counts(batch) for batch in fitted_to], edge.wire_formats, WIDTH, uplink=True, downlink=True
        )
        told += edge.traffic(0, [token_counts(batch) for batch in mine])
        assert told == {kind: size for kind, size in cloud.meter.payload.items() if not kind.startswith("OPEN")}


def test_a_decoder_larger_than_any_is_refused(service: Service) -> None:
    cloud = service.at(None)
    with closing(cloud):
        cloud.send(Frame(TuneKind.CODE, raw=bytes(max_decoder_bytes(WIDTH) + 1)))
        with pytest.raises(LinkError, match=rf"CODE: \d+ raw bytes; allowed: {max_decoder_bytes(WIDTH)}"):
            cloud.receive()


def test_hidden_states_beyond_what_is_granted_are_refused(tmp_path: Path) -> None:
    edge = fresh()
    with closing(Service(edge, tmp_path / "cloud", TuneLimits(message_bytes=8))) as service:
        edge.cloud = service.at(None)
        with closing(edge.cloud), pytest.raises(LinkError, match=r"FWD: \d+ raw bytes; allowed: 8"):
            edge.step(batches(0, 1, language=False))


def test_a_code_is_fitted_before_the_first_step_and_only_where_there_is_one(service: Service) -> None:
    edge = fresh()
    edge.cloud = service.at(None)
    with closing(edge.cloud):
        edge.fit(calibration(language=False))
        edge.step(batches(0, 1, language=False))
        with pytest.raises(LinkError, match="hidden states to fit a bottleneck to came in step 1"):
            edge.fit(calibration(language=False))


@pytest.mark.parametrize("trained", [True, False])
def test_a_lost_cloud_comes_back_with_both_codes(service: Service, tmp_path: Path, trained: bool) -> None:
    """Weights that are not trained are stored too, because nothing else has them."""
    cuts = {
        name: getattr(service.begin, name).model_copy(update={"trained": trained}) for name in ("uplink", "downlink")
    }
    service.begin = service.begin.model_copy(update=cuts)
    edge, batch = fresh(), batches(50, 1, language=False)[0]
    edge.cloud = service.at(None)
    edge.fit(calibration(language=False))
    edge.step(batches(0, 2, language=False))
    edge.wait_for_optimiser()
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
        kept = {path.parent.name[0] for path in (tmp_path / "cloud").glob("*/*/0")}
        assert kept == {"0", "3", "4"}
        first.close()


def test_texts_beyond_what_is_granted_are_refused(tmp_path: Path) -> None:
    edge = fresh()
    with closing(Service(edge, tmp_path / "cloud", TuneLimits(tokens=8))) as service:
        edge.cloud = service.at(None)
        with closing(edge.cloud), pytest.raises(LinkError, match="allowed: 8 tokens in all"):
            edge.step(batches(0, 1, language=False))


@pytest.mark.parametrize("limits", [TuneLimits(micro_batches=1), TuneLimits(outstanding=40)], ids=["micros", "tokens"])
def test_micro_batches_beyond_what_is_granted_are_refused_though_none_is_computed(
    limits: TuneLimits, tmp_path: Path
) -> None:
    edge, gate = fresh(), threading.Event()
    with closing(Service(edge, tmp_path / "cloud", limits)) as service:
        edge.cloud = service.at(None)
        edge.fit(calibration(language=False))
        service.server._engine.submit(gate.wait)
        threading.Timer(0.5, gate.set).start()
        with (
            closing(edge.cloud),
            pytest.raises(LinkError, match=r"2 micro-batches and \d+ tokens .* a smaller max_in_flight"),
        ):
            edge.step(batches(0, 5, language=False))


def test_a_micro_batch_counts_until_its_gradient_has_come(tmp_path: Path) -> None:
    edge = fresh()  # two of its four micro-batches on their way are gradients
    with closing(Service(edge, tmp_path / "cloud", TuneLimits(micro_batches=2))) as service:
        edge.cloud = service.at(None)
        edge.fit(calibration(language=False))
        with closing(edge.cloud):
            for step in range(2):
                edge.step(batches(step, 5, language=False))


def test_a_memory_beyond_what_is_granted_is_refused(tmp_path: Path) -> None:
    edge = fresh(True)
    with closing(Service(edge, tmp_path / "cloud", TuneLimits(activation_cache_bytes=100))) as service:
        edge.cloud = service.at(None)
        with closing(edge.cloud), pytest.raises(LinkError, match="takes more than 100 bytes"):
            edge.step(batches(0, 3, language=False))


def test_a_step_with_a_loss_that_is_no_number_is_skipped_by_both_sides(service: Service) -> None:
    edge = fresh()
    cloud = edge.cloud.trainer  # type: ignore[attr-defined]
    before = values({"cloud": cloud.middle, **edge.modules})
    loss = edge.task.loss
    edge.task.loss = lambda outputs, batch: loss(outputs * float("nan"), batch)  # type: ignore[method-assign]
    assert edge.step(batches(0, 2, language=False)).skipped
    assert_equal(values({"cloud": cloud.middle, **edge.modules}), before)
    edge.task.loss = loss  # type: ignore[method-assign]
    assert not edge.step(batches(1, 2, language=False)).skipped
    assert (cloud.step, edge.trainer.step_index) == (2, 2)
