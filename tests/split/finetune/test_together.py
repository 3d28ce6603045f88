"""Edges that share one cloud part: results of their rounds, and independence of the edges."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.errors import LinkError, TrainingError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import Frame, parse_body
from raycloud.link.server import RequestRefused
from raycloud.models.segments import Segment
from raycloud.rounds.aggregators import mean
from raycloud.rounds.contribution import Contribution
from raycloud.split.finetune.bottleneck import Bottleneck, fit_low_rank
from raycloud.split.finetune.checkpoints import CheckpointStore, bottleneck_tensors
from raycloud.split.finetune.client import RemoteCloudClient
from raycloud.split.finetune.edge import UShapedEdge
from raycloud.split.finetune.group import Group
from raycloud.split.finetune.group_client import GroupClient, RoundResult
from raycloud.split.finetune.group_rounds import latest_group
from raycloud.split.finetune.messages import (
    GroupConfig,
    GroupWeightsReply,
    PushReply,
    PushRequest,
    RoundRequest,
    TuneKind,
)
from raycloud.split.finetune.recovery import last_common_checkpoint, train
from raycloud.split.finetune.server import TuneLimits
from tests.clock import Clock
from tests.split.finetune.wiring import WIDTH, Service, batches, head_of, model_of, split

STEPS = 2
"""Steps of a round."""
ROUND = 5
"""Steps of a round that is longer than all of its latest checkpoints."""


def fresh(code_seed: int = 5) -> UShapedEdge:
    def coded(ahead: Segment) -> Bottleneck:
        chance = torch.Generator().manual_seed(code_seed)
        return fit_low_rank(torch.randn(200, WIDTH, generator=chance), 8, num_outliers=2)

    return split(model_of("bert"), 2, 6, head=head_of(), code=coded, dtype="int8", max_in_flight=4)


def texts(edge: int, step: int) -> Sequence[Batch]:
    """Make the batch of an edge's step; the second edge's has half as many texts."""
    return batches(100 * edge + step, 2 if edge == 0 else 1, language=False)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with closing(Service(fresh(), tmp_path / "cloud")) as service:
        yield service


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.fixture
def rounds_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Fake clock by which the deadlines of rounds are measured: on a busy machine an edge may need seconds."""
    made = Clock()
    monkeypatch.setattr("raycloud.split.finetune.group_rounds.time", made)
    return made


class Member:
    """Edge that trains with others, in a thread."""

    def __init__(
        self,
        service: Service,
        folder: Path,
        name: str = "a",
        *,
        names: Sequence[str] = ("a", "b"),
        rounds: int = 2,
        every: int = 2,
        steps: int = STEPS,
        deadline_s: float = 120.0,
        averaged: bool = True,
        code_seed: int = 5,
        batches_of: Callable[[int], Sequence[Batch]] | None = None,
    ) -> None:
        self.service, self.name, self.rounds, self.every = service, name, rounds, every
        self.kept = CheckpointStore(folder / name, steps)
        self.run = hashlib.sha256(str(folder / name).encode()).hexdigest()[:32]
        self.edge = fresh(code_seed)
        self.decoder = self.edge.cloud.trainer.decoder  # type: ignore[attr-defined]
        place = sorted(names).index(name)
        self.batches_of = batches_of or (lambda step: texts(place, step))
        self.asked = GroupConfig(
            group="us", name=name, edges=list(names), steps=steps, deadline_s=deadline_s, averaged=averaged
        )
        self.results: list[RoundResult] = []
        self.then: Callable[[], None] = lambda: None

    def at(self, step: int | None) -> RemoteCloudClient:
        asked = self.service.begin.model_copy(update={"run": self.run, "restore": step, "group": self.asked})
        return RemoteCloudClient(self.connect, asked, self.decoder, patience_s=20)

    def connect(self, session: str) -> Channel:
        if self.service.loopback.loop.is_closed():
            raise LinkDown("the cloud is being killed")
        return self.service.connect(session)

    def train(self) -> UShapedEdge:
        samples = lambda step: sum(len(batch.ids) for batch in self.batches_of(step))  # noqa: E731
        found = last_common_checkpoint(self.kept, self.at)
        self.edge.cloud = self.at(None) if found is None else found[1]
        try:
            train(
                self.edge,
                self.batches_of,
                steps=self.rounds * self.asked.steps,
                every=self.every,
                kept=self.kept,
                cloud_at=self.at,
                group_client=GroupClient(self.asked, samples, self.results.append),
                then=self.then,
            )
        finally:
            self.edge.cloud.close()
        return self.edge


def both(pool: ThreadPoolExecutor, *members: Member) -> list[UShapedEdge]:
    runs: list[Future[UShapedEdge]] = [pool.submit(member.train) for member in members]
    return [run.result(timeout=240) for run in runs]


def average(works: Sequence[dict[str, Tensor]], samples: Sequence[int]) -> dict[str, Tensor]:
    return mean([Contribution(work, number) for work, number in zip(works, samples, strict=True)])


def of_the_group(service: Service) -> Group:
    [path] = service._folder.glob("*/groups/us")
    return latest_group(path)


def damage(service: Service, number: int) -> None:
    """Flip a bit in a tensor of the group's round file; safetensors reads it without an error."""
    [path] = service._folder.glob(f"*/groups/us/{number}/state.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def alone(edge: int, steps: int, code_seed: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train an edge and its cloud for some steps without others, as a reference."""
    side = fresh(code_seed)
    for step in range(steps):
        side.step(texts(edge, step))
    return side.trained_weights(), side.cloud.trainer.state()  # type: ignore[attr-defined]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name] - theirs[name]).flatten().double() for name in ours])
    assert float(apart.norm() / torch.cat([theirs[name].flatten().double() for name in ours]).norm()) < 1e-6


def test_edges_with_equal_texts_learn_what_one_learns(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Each edge alone would fit another bottleneck; both train with the first one's."""
    a = Member(service, tmp_path, "a", batches_of=lambda step: texts(0, step))
    b = Member(service, tmp_path, "b", batches_of=lambda step: texts(0, step), code_seed=6)
    sides = both(pool, a, b)
    ours, theirs = alone(0, 2 * STEPS)
    for side in sides:
        assert_equal(side.trained_weights(), ours)
    cloud = of_the_group(service).cloud
    assert_equal(cloud, {name: theirs[name] for name in cloud})
    assert [(one.round, one.counted, one.members) for one in b.results] == [
        (number, True, ("a", "b")) for number in range(3)
    ]
    assert all(one.sent and one.received for one in a.results)


def test_a_round_is_the_mean_by_samples(service: Service, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    sides = both(pool, *(Member(service, tmp_path, name, rounds=1) for name in "ab"))
    edges, clouds = zip(*(alone(number, STEPS) for number in range(2)), strict=True)
    mean = average(edges, [2, 1])
    for side in sides:
        assert_close(side.trained_weights(), mean)
    group = of_the_group(service)
    assert_close(group.cloud, average([{name: cloud[name] for name in group.cloud} for cloud in clouds], [2, 1]))
    assert all(
        torch.equal(side.trained_weights()["head.classifier.bias"], mean["head.classifier.bias"]) for side in sides
    )
    damage(service, 1)
    with pytest.raises(TrainingError, match=r"state\.safetensors' is damaged or was changed") as caught:
        of_the_group(service)  # what comes of a run is never an older round
    assert "\n" not in str(caught.value)


def test_private_parts_stay_and_only_the_blocks_are_averaged(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    members = [
        Member(service, tmp_path, name, rounds=1, averaged=False, code_seed=seed) for name, seed in (("a", 5), ("b", 6))
    ]
    sides = both(pool, *members)
    edges, clouds = zip(*(alone(number, STEPS, 5 + number) for number in range(2)), strict=True)
    for side, edge in zip(sides, edges, strict=True):
        assert_equal(side.trained_weights(), edge)
    group = of_the_group(service)
    assert group.edge == {} and all(name.startswith("middle.") for name in group.cloud)
    assert_close(group.cloud, average([{name: cloud[name] for name in group.cloud} for cloud in clouds], [2, 1]))
    assert all(one.sent == one.received == 0 for member in members for one in member.results)


@pytest.mark.waits
def test_nobody_waits_for_long_for_who_never_comes(service: Service, tmp_path: Path) -> None:
    member = Member(service, tmp_path, deadline_s=0.5)
    member.train()
    assert [one.missed for one in member.results] == [{"b": "absent"}] * 3
    assert member.results[0].waited_s >= 0.4


@pytest.mark.waits
def test_a_slow_edge_is_told_that_its_round_is_over_and_goes_on_with_the_others(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path, rounds_clock: Clock
) -> None:
    gone_on = Told(round=1)

    def slowly(step: int) -> Sequence[Batch]:
        for _ in range(1200 if step == 1 else 0):
            rounds_clock.sleep(2)
            if gone_on.event.wait(0.1):
                break
        return texts(1, step)

    quick = Member(service, tmp_path, "a", deadline_s=2)
    slow = Member(service, tmp_path, "b", deadline_s=2, batches_of=slowly)
    quick.results = gone_on
    sides = both(pool, quick, slow)
    assert [one.missed for one in quick.results][:2] == [{}, {"b": "late"}]
    first = next(one for one in slow.results if one.round)
    assert not first.counted and first.members == ("a",) and first.missed == {"b": "late"}
    # It left its round between two steps, and ends with the group's weights whether or not it was in time again.
    group = of_the_group(service)
    for side in sides:
        assert_equal(side.trained_weights(), {name: group.edge[name] for name in side.trained_weights()})


class Killed(Exception):
    """The edge dies."""


class Told(list[RoundResult]):
    """Meetings, and an event for that of a round or of a later one."""

    def __init__(self, round: int) -> None:
        super().__init__()
        self._round, self.event = round, threading.Event()

    def append(self, one: RoundResult) -> None:
        super().append(one)
        if one.round >= self._round:
            self.event.set()


@pytest.mark.waits
def test_a_killed_edge_is_missed_and_joins_the_next_round(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path, rounds_clock: Clock
) -> None:
    gone_on, back = Told(round=1), Told(round=1)

    def dies(step: int) -> Sequence[Batch]:
        if step == 1:
            raise Killed
        return texts(1, step)

    def waits(step: int) -> Sequence[Batch]:
        if step == STEPS + 1:  # in the second round
            back.event.wait(120)
        return texts(0, step)

    other = Member(service, tmp_path, "a", rounds=3, deadline_s=3, batches_of=waits)
    dead = Member(service, tmp_path, "b", rounds=3, deadline_s=3, batches_of=dies)
    again = Member(service, tmp_path, "b", rounds=3, deadline_s=3)
    other.results, again.results = gone_on, back
    run = pool.submit(other.train)
    with pytest.raises(Killed):
        dead.train()
    assert gone_on.event.wait(120)
    side, theirs = again.train(), run.result(timeout=240)
    assert [(one.round, one.counted) for one in again.results[:1]] == [(1, False)]
    assert other.results[1].members == ("a",)
    assert other.results[2].members == ("a", "b")
    assert_equal(side.trained_weights(), theirs.trained_weights())


@pytest.mark.waits
def test_a_cloud_that_is_killed_and_links_that_break_change_no_bit(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    events = {2: service.kill, 4: service.cut, 6: service.kill, 8: service.cut, 10: service.kill, 12: service.kill}
    steps, lock = 0, threading.Lock()

    def disturbed(edge: int) -> Callable[[int], Sequence[Batch]]:
        def at(step: int) -> Sequence[Batch]:
            nonlocal steps
            with lock:
                steps += 1
                if (event := events.pop(steps, None)) is not None:
                    event()
            return texts(edge, step)

        return at

    calm = [Member(service, tmp_path / "calm", name) for name in "ab"]
    for member in calm:
        member.asked = member.asked.model_copy(update={"group": "calm"})
    expected = both(pool, *calm)
    members = [Member(service, tmp_path, name, batches_of=disturbed(at)) for at, name in enumerate("ab")]
    sides = both(pool, *members)
    assert events == {}
    for side, wanted in zip(sides, expected, strict=True):
        assert_equal(side.trained_weights(), wanted.trained_weights())


@pytest.mark.waits
def test_a_group_whose_latest_round_is_damaged_goes_on_from_the_one_before(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both members are one step before the second round and have three newer checkpoints: they also go back."""

    def dies(edge: int) -> Callable[[int], Sequence[Batch]]:
        def at(step: int) -> Sequence[Batch]:
            if step == 2 * ROUND + 4:
                raise Killed
            return texts(edge, step)

        return at

    members = [
        Member(service, tmp_path, name, rounds=3, every=1, steps=ROUND, batches_of=dies(at))
        for at, name in enumerate("ab")
    ]
    for run in [pool.submit(member.train) for member in members]:
        with pytest.raises(Killed):
            run.result(timeout=240)
    assert [one.round for one in members[0].results] == [0, 1, 2]
    service.kill()
    damage(service, 2)
    capsys.readouterr()
    again = [Member(service, tmp_path, name, rounds=3, every=1, steps=ROUND) for name in "ab"]
    sides = both(pool, *again)
    said = capsys.readouterr().out.splitlines()
    [told] = [line for line in said if "going on from the round before it" in line]
    assert "a group's round" in told and "is damaged or was changed" in told
    assert any(f"is of a round after the group's, which ends with step {2 * ROUND}" in line for line in said)
    assert [(one.round, one.members) for one in again[0].results] == [(2, ("a", "b")), (3, ("a", "b"))]
    calm = [Member(service, tmp_path / "calm", name, rounds=3, every=1, steps=ROUND) for name in "ab"]
    for member in calm:
        member.asked = member.asked.model_copy(update={"group": "calm"})
    for side, wanted in zip(sides, both(pool, *calm), strict=True):
        assert_equal(side.trained_weights(), wanted.trained_weights())


def test_a_group_without_an_undamaged_round_is_one_line(service: Service, tmp_path: Path) -> None:
    Member(service, tmp_path, names=("a",), rounds=1).train()
    service.kill()
    for number in (0, 1):
        damage(service, number)
    with pytest.raises(LinkError, match=r"state\.safetensors' is damaged or was changed") as caught:
        Member(service, tmp_path, names=("a",)).train()
    assert "\n" not in str(caught.value)
    [path] = service._folder.glob("*/groups/us")
    assert CheckpointStore(path).steps() == [0, 1]


def refused(member: Member, message: str) -> None:
    with pytest.raises(LinkError, match=message):
        member.train()


@pytest.mark.waits
def test_what_a_member_may_not_ask(service: Service, tmp_path: Path) -> None:
    Member(service, tmp_path, deadline_s=0.1, names=("a", "b"), rounds=1).train()
    refused(Member(service, tmp_path / "x", deadline_s=0.2), "the group 'us' was begun with another deadline_s")
    stranger = Member(service, tmp_path / "x", deadline_s=0.1)
    stranger.asked = stranger.asked.model_copy(update={"name": "c"})
    refused(stranger, "edge 'c' is none of the group's: a, b")
    again = Member(service, tmp_path / "x", deadline_s=0.1, names=("a", "b"), rounds=1)
    refused(again, "edge 'a' has trained in group 'us' in another run; allowed: that run resumed, or another group")


def test_a_cloud_lost_behind_the_last_round_gives_its_weights_again(tmp_path: Path) -> None:
    """The latest checkpoint is older than the round: evaluation must use the weights of the group."""
    [batch] = batches(77, 1, language=False)
    said: dict[bool, Tensor] = {}
    for killed in (False, True):
        with closing(Service(fresh(), tmp_path / f"cloud {killed}")) as service:
            left = iter([service.kill] * killed)
            member = Member(service, tmp_path / str(killed), names=("a",), rounds=1)

            def then(killed: bool = killed, left: Iterator[Callable[[], None]] = left, member: Member = member) -> None:
                next(left, lambda: None)()
                said[killed] = member.edge.predict(batch)

            member.then = then
            member.train()
    assert torch.equal(said[True], said[False])


@pytest.mark.waits
def test_members_at_two_hosts_come_together_again(service: Service, tmp_path: Path) -> None:
    """Both replicas start the group; the one that is behind detects it, and its member continues on the other."""
    elsewhere = Service(fresh(), tmp_path / "cloud")
    with closing(elsewhere):
        here = Member(service, tmp_path, "a", deadline_s=0.1)
        there = Member(elsewhere, tmp_path, "b", deadline_s=0.1)
        met = iter([True])

        def overtaken(step: int) -> Sequence[Batch]:
            if step == 1 and next(met, False):
                here.train()
            return texts(1, step)

        there.batches_of = overtaken
        there.train()
    assert [one.round for one in here.results] == [0, 1, 2]
    assert there.results[-1].round == 2 and not there.results[-1].counted
    assert_equal(there.edge.trained_weights(), here.edge.trained_weights())


@pytest.mark.waits
def test_a_group_is_remembered_only_where_a_session_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.client.time", Clock())
    with closing(Service(fresh(), tmp_path / "cloud", TuneLimits(sessions=1))) as service:
        first = Member(service, tmp_path, "a", names=("a",))
        with closing(first.at(None)):
            other = Member(service, tmp_path, "b", names=("b",))
            other.asked = other.asked.model_copy(update={"group": "them"})
            asked = service.begin.model_copy(update={"group": other.asked})
            with pytest.raises(LinkError, match="as many edges as it takes"):
                RemoteCloudClient(service.connect, asked, other.decoder, patience_s=50)
            assert len(service.server._group_servers) == 1


def test_an_older_session_of_an_edge_speaks_for_it_no_more(service: Service, tmp_path: Path) -> None:
    older, newer = (Member(service, tmp_path / name, "a", names=("a",), rounds=1) for name in ("older", "newer"))
    newer.run = older.run

    def overtaken(step: int) -> Sequence[Batch]:
        if step == 1 and not newer.results:
            newer.train()
        return texts(0, step)

    older.batches_of = overtaken
    refused(older, "another session speaks for edge 'a'")
    assert [one.round for one in newer.results] == [0, 1]


def test_weights_beyond_what_is_granted_are_refused(tmp_path: Path) -> None:
    with closing(Service(fresh(), tmp_path / "cloud", TuneLimits(part_bytes=100))) as service:
        refused(Member(service, tmp_path, names=("a",)), r"PUSH: \d+ raw bytes; allowed: 100")


def pushed(cloud: RemoteCloudClient, number: int, edge: UShapedEdge) -> bool:
    weights = save({name: tensor.contiguous() for name, tensor in edge.trained_weights().items()})
    cloud.send(Frame.of(TuneKind.PUSH, PushRequest(round=number, samples=1), weights))
    return parse_body(cloud.receive(), PushReply).accepted


def test_a_contribution_counts_once_and_not_too_late(service: Service, tmp_path: Path) -> None:
    member, other = Member(service, tmp_path, "a"), Member(service, tmp_path, "b")
    with closing(member.at(None)) as cloud, closing(other.at(None)) as theirs:
        first = bottleneck_tensors(member.edge.modules)
        begin = save({name: tensor.contiguous() for name, tensor in first.items()})
        for client in (cloud, theirs):
            client.send(Frame.of(TuneKind.PUSH, PushRequest(round=0, samples=1), begin))
            assert parse_body(client.receive(), PushReply).accepted
        for client in (cloud, theirs):
            client.send(Frame(TuneKind.PULL))
            assert parse_body(client.receive(), GroupWeightsReply).ended == 0
        changed = fresh()
        with torch.no_grad():
            for parameter in changed.modules["head"].parameters():
                parameter.add_(1.0)
        assert pushed(cloud, 1, member.edge) and pushed(cloud, 1, changed), "the second changes nothing"
        assert pushed(theirs, 1, member.edge)
        assert_equal(of_the_group(service).edge, member.edge.trained_weights())
        assert not pushed(theirs, 1, changed)
        with pytest.raises(LinkError, match="work for round 3 came in round 2"):
            pushed(theirs, 3, changed)


def test_weights_wait_until_all_requests_before_them_are_answered(service: Service, tmp_path: Path) -> None:
    """Otherwise the memory of a session would be that of several edges' weights."""
    with closing(Member(service, tmp_path, names=("a",)).at(None)):
        [session] = service.server.held()
        session.pending[session.next_seq] = asyncio.Future(loop=service.loopback.loop)
        push = Frame.of(TuneKind.PUSH, PushRequest(round=0, samples=1))
        with pytest.raises(RequestRefused, match="1 requests are in flight; a PUSH waits for them"):
            service.server.begin(session, push)
        session.pending.clear()


def test_an_edge_without_a_group_meets_nobody(service: Service) -> None:
    edge: Any = fresh()
    edge.cloud = service.at(None)
    with closing(edge.cloud):
        edge.cloud.send(Frame.of(TuneKind.ROUND, RoundRequest()))
        with pytest.raises(LinkError, match="for edges that train in a group"):
            edge.cloud.receive()


def test_codes_that_do_not_learn_are_kept_as_well() -> None:
    """Bottlenecks are stored: they were fitted to texts, so a restarted cloud or another edge could not make them
    again."""
    edge = fresh()
    edge.encoder.requires_grad_(False)
    kept = edge.trained_weights()
    assert torch.equal(kept["encoder.weight"], edge.encoder.weight) and "encoder.apart" in kept  # type: ignore[arg-type]
