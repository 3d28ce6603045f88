"""Edges that share one cloud part: what comes of their rounds, and that none of them is in the others' way."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import Kind, with_bytes
from raycloud.models.segments import Segment
from raycloud.split.finetune.code import Code, narrow
from raycloud.split.finetune.company import Company, Meeting
from raycloud.split.finetune.edge import EdgeSide
from raycloud.split.finetune.group import Group, average
from raycloud.split.finetune.host import TuneLimits
from raycloud.split.finetune.loop import train
from raycloud.split.finetune.meeting import read
from raycloud.split.finetune.messages import Meet, Together
from raycloud.split.finetune.remote import RemoteCloud
from raycloud.split.finetune.state import Checkpoints
from tests.split.finetune.wiring import WIDTH, Service, batches, head_of, model_of, split

STEPS = 2
"""Of a round."""


def fresh(code_seed: int = 5) -> EdgeSide:
    def coded(ahead: Segment) -> Code:
        chance = torch.Generator().manual_seed(code_seed)
        return narrow(torch.randn(200, WIDTH, generator=chance), 8, outliers=2)

    return split(model_of("bert"), 2, 6, head=head_of(), code=coded, form="int8", depth=4)


def texts(edge: int, step: int) -> Sequence[Batch]:
    """A step of an edge; the second one's has half as many texts."""
    return batches(100 * edge + step, 2 if edge == 0 else 1, language=False)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with closing(Service(fresh(), tmp_path / "cloud")) as service:
        yield service


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


class Member:
    """An edge that trains with others, in a thread."""

    def __init__(
        self,
        service: Service,
        folder: Path,
        name: str = "a",
        *,
        names: Sequence[str] = ("a", "b"),
        rounds: int = 2,
        deadline_s: float = 20.0,
        averaged: bool = True,
        code_seed: int = 5,
        batches_of: Callable[[int], Sequence[Batch]] | None = None,
    ) -> None:
        self.service, self.name, self.rounds = service, name, rounds
        self.kept = Checkpoints(folder / name)
        self.run = hashlib.sha256(str(folder / name).encode()).hexdigest()[:32]
        self.edge = fresh(code_seed)
        self.decoder = self.edge.cloud.side.decoder  # type: ignore[attr-defined]
        place = sorted(names).index(name)
        self.batches_of = batches_of or (lambda step: texts(place, step))
        self.asked = Together(
            group="us", name=name, edges=list(names), steps=STEPS, deadline_s=deadline_s, averaged=averaged
        )
        self.meetings: list[Meeting] = []
        self.then: Callable[[], None] = lambda: None

    def at(self, step: int | None) -> RemoteCloud:
        asked = self.service.begin.model_copy(update={"run": self.run, "restore": step, "together": self.asked})
        return RemoteCloud(self.connect, asked, self.decoder, patience_s=20)

    def connect(self, session: str) -> Channel:
        if self.service.loopback.loop.is_closed():
            raise LinkDown("the cloud is being killed")
        return self.service.connect(session)

    def train(self) -> EdgeSide:
        samples = lambda step: sum(len(batch.ids) for batch in self.batches_of(step))  # noqa: E731
        self.edge.cloud = self.at(max(self.kept.steps(), default=None))
        try:
            train(
                self.edge,
                self.batches_of,
                steps=self.rounds * STEPS,
                every=2,
                kept=self.kept,
                cloud_at=self.at,
                company=Company(self.asked, samples, self.meetings.append),
                then=self.then,
            )
        finally:
            self.edge.cloud.close()
        return self.edge


def both(pool: ThreadPoolExecutor, *members: Member) -> list[EdgeSide]:
    runs: list[Future[EdgeSide]] = [pool.submit(member.train) for member in members]
    return [run.result(timeout=60) for run in runs]


def of_the_group(service: Service) -> Group:
    [path] = service._folder.glob("*/groups/us.safetensors")
    return read(path)[2]


def alone(edge: int, steps: int, code_seed: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an edge and its cloud learn in so many steps without others."""
    side = fresh(code_seed)
    for step in range(steps):
        side.step(texts(edge, step))
    return side.learnt(), side.cloud.side.state()  # type: ignore[attr-defined]


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
    """Each of them would calibrate another code; both train with the first one's."""
    a = Member(service, tmp_path, "a", batches_of=lambda step: texts(0, step))
    b = Member(service, tmp_path, "b", batches_of=lambda step: texts(0, step), code_seed=6)
    sides = both(pool, a, b)
    ours, theirs = alone(0, 2 * STEPS)
    for side in sides:
        assert_equal(side.learnt(), ours)
    cloud = of_the_group(service).cloud
    assert_equal(cloud, {name: theirs[name] for name in cloud})
    assert [(one.round, one.counted, one.members) for one in b.meetings] == [
        (number, True, ("a", "b")) for number in range(3)
    ]
    assert all(one.sent and one.received for one in a.meetings)


def test_a_round_is_the_mean_by_samples(service: Service, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    sides = both(pool, *(Member(service, tmp_path, name, rounds=1) for name in "ab"))
    edges, clouds = zip(*(alone(number, STEPS) for number in range(2)), strict=True)
    mean = average(edges, [2, 1])
    for side in sides:
        assert_close(side.learnt(), mean)
    group = of_the_group(service)
    assert_close(group.cloud, average([{name: cloud[name] for name in group.cloud} for cloud in clouds], [2, 1]))
    assert all(torch.equal(side.learnt()["head.classifier.bias"], mean["head.classifier.bias"]) for side in sides)


def test_private_parts_stay_and_only_the_blocks_are_averaged(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    members = [
        Member(service, tmp_path, name, rounds=1, averaged=False, code_seed=seed) for name, seed in (("a", 5), ("b", 6))
    ]
    sides = both(pool, *members)
    edges, clouds = zip(*(alone(number, STEPS, 5 + number) for number in range(2)), strict=True)
    for side, edge in zip(sides, edges, strict=True):
        assert_equal(side.learnt(), edge)
    group = of_the_group(service)
    assert group.edge == {} and all(name.startswith("middle.") for name in group.cloud)
    assert_close(group.cloud, average([{name: cloud[name] for name in group.cloud} for cloud in clouds], [2, 1]))
    assert all(one.sent == one.received == 0 for member in members for one in member.meetings)


def test_nobody_waits_for_long_for_who_never_comes(service: Service, tmp_path: Path) -> None:
    member = Member(service, tmp_path, deadline_s=0.5)
    started = time.monotonic()
    member.train()
    assert time.monotonic() - started < 15
    assert [one.missed for one in member.meetings] == [{"b": "absent"}] * 3
    waits = [one.waited_s for one in member.meetings]
    assert waits[0] >= 0.4 and max(waits[1:]) < 0.4


def test_a_slow_edge_is_told_that_its_round_is_over_and_goes_on_with_the_others(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    gone_on = Told(round=1)

    def slowly(step: int) -> Sequence[Batch]:
        if step == 1:
            gone_on.event.wait(20)
        return texts(1, step)

    quick = Member(service, tmp_path, "a", deadline_s=0.2)
    slow = Member(service, tmp_path, "b", deadline_s=0.2, batches_of=slowly)
    quick.meetings = gone_on
    sides = both(pool, quick, slow)
    assert [one.missed for one in quick.meetings][:2] == [{}, {"b": "late"}]
    first = next(one for one in slow.meetings if one.round)
    assert not first.counted and first.members == ("a",) and first.missed == {"b": "late"}
    # It left its round between two steps, and ends with the group's weights whether or not it was in time again.
    group = of_the_group(service)
    for side in sides:
        assert_equal(side.learnt(), {name: group.edge[name] for name in side.learnt()})


class Killed(Exception):
    """The edge dies."""


class Told(list[Meeting]):
    """Meetings, and an event for that of a round or of a later one."""

    def __init__(self, round: int) -> None:
        super().__init__()
        self._round, self.event = round, threading.Event()

    def append(self, one: Meeting) -> None:
        super().append(one)
        if one.round >= self._round:
            self.event.set()


def test_a_killed_edge_is_missed_and_joins_the_next_round(
    service: Service, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    gone_on, back = Told(round=1), Told(round=1)

    def dies(step: int) -> Sequence[Batch]:
        if step == 1:
            raise Killed
        return texts(1, step)

    def waits(step: int) -> Sequence[Batch]:
        if step == STEPS + 1:  # in the second round
            back.event.wait(20)
        return texts(0, step)

    other = Member(service, tmp_path, "a", rounds=3, deadline_s=0.5, batches_of=waits)
    dead = Member(service, tmp_path, "b", rounds=3, deadline_s=0.5, batches_of=dies)
    again = Member(service, tmp_path, "b", rounds=3, deadline_s=0.5)
    other.meetings, again.meetings = gone_on, back
    run = pool.submit(other.train)
    with pytest.raises(Killed):
        dead.train()
    assert gone_on.event.wait(20)
    side, theirs = again.train(), run.result(timeout=60)
    assert [(one.round, one.counted) for one in again.meetings[:1]] == [(1, False)]
    assert other.meetings[1].members == ("a",)
    assert other.meetings[2].members == ("a", "b")
    assert_equal(side.learnt(), theirs.learnt())


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
        assert_equal(side.learnt(), wanted.learnt())


def refused(member: Member, message: str) -> None:
    with pytest.raises(LinkError, match=message):
        member.train()


def test_what_a_member_may_not_ask(service: Service, tmp_path: Path) -> None:
    Member(service, tmp_path, deadline_s=0.1, names=("a", "b"), rounds=1).train()
    refused(Member(service, tmp_path / "x", deadline_s=0.2), "the group 'us' was begun with another deadline_s")
    stranger = Member(service, tmp_path / "x", deadline_s=0.1)
    stranger.asked = stranger.asked.model_copy(update={"name": "c"})
    refused(stranger, "edge 'c' is none of the group's: a, b")
    again = Member(service, tmp_path / "x", deadline_s=0.1, names=("a", "b"), rounds=1)
    refused(again, "edge 'a' has trained in group 'us' in another run; allowed: that run resumed, or another group")


def test_a_cloud_lost_behind_the_last_round_gives_its_weights_again(tmp_path: Path) -> None:
    """The latest checkpoint is from ahead of the round: what is judged must be what the group made of it."""
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


def test_members_at_two_hosts_come_together_again(service: Service, tmp_path: Path) -> None:
    """Both begin the group; the one that is behind finds out, and its member goes on where the other's is."""
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
    assert [one.round for one in here.meetings] == [0, 1, 2]
    assert there.meetings[-1].round == 2 and not there.meetings[-1].counted
    assert_equal(there.edge.learnt(), here.edge.learnt())


def test_a_group_is_remembered_only_where_a_session_is(tmp_path: Path) -> None:
    with closing(Service(fresh(), tmp_path / "cloud", TuneLimits(sessions=1))) as service:
        first = Member(service, tmp_path, "a", names=("a",))
        with closing(first.at(None)):
            other = Member(service, tmp_path, "b", names=("b",))
            other.asked = other.asked.model_copy(update={"group": "them"})
            asked = service.begin.model_copy(update={"together": other.asked})
            with pytest.raises(LinkError, match="as many edges as it takes"):
                RemoteCloud(service.connect, asked, other.decoder, patience_s=0.5)
            assert len(service.host._meetings) == 1


def test_an_older_session_of_an_edge_speaks_for_it_no_more(service: Service, tmp_path: Path) -> None:
    older, newer = (Member(service, tmp_path / name, "a", names=("a",), rounds=1) for name in ("older", "newer"))
    newer.run = older.run

    def overtaken(step: int) -> Sequence[Batch]:
        if step == 1 and not newer.meetings:
            newer.train()
        return texts(0, step)

    older.batches_of = overtaken
    refused(older, "another session speaks for edge 'a'")
    assert [one.round for one in newer.meetings] == [0, 1]


def test_weights_beyond_what_is_granted_are_refused(tmp_path: Path) -> None:
    with closing(Service(fresh(), tmp_path / "cloud", TuneLimits(part_bytes=100))) as service:
        refused(Member(service, tmp_path, names=("a",)), "more than 100 bytes")


def test_an_edge_without_a_group_meets_nobody(service: Service) -> None:
    edge: Any = fresh()
    edge.cloud = service.at(None)
    with closing(edge.cloud):
        edge.cloud.send(with_bytes(Kind.ROUND, Meet()))
        with pytest.raises(LinkError, match="for edges that train in a group"):
            edge.cloud.receive()


def test_codes_that_do_not_learn_are_kept_as_well() -> None:
    """They were fitted to texts: a cloud that starts again, and another edge, could not make them anew."""
    edge = fresh()
    edge.encoder.requires_grad_(False)
    kept = edge.learnt()
    assert torch.equal(kept["encoder.weight"], edge.encoder.weight) and "encoder.apart" in kept  # type: ignore[arg-type]
