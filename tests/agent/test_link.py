"""The link: what is sent when, under any loss; and the shell around it, without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shoal.agent.link as module
from shoal.agent.health import Health
from shoal.agent.link import Link, LinkConfig, Outbox
from shoal.agent.spool import Spool, SpoolConfig, SpoolError
from shoal.proto import records, topics
from shoal.proto.records import Kind
from shoal.proto.session import Message, SessionError, reconnect_delay_s

EVENT: dict[str, Any] = {"name": "n", "severity": "info", "text": "t" * 50, "data": {}}
UPDATE: dict[str, Any] = {
    "rollout": "r", "counter": 1, "model": "a" * 64, "state": "trial", "reason": "",
}  # fmt: skip
OLD, NEW = bytes(16), bytes([1] * 16)


# --- the rules -------------------------------------------------------------------------------


class Peer:
    """A spool of numbers and a server that stores them; the network between is the test's."""

    def __init__(self, old: int, new: int) -> None:
        self.last = {OLD: old, NEW: new}
        self.stored: dict[bytes, set[int]] = {OLD: set(), NEW: set()}
        self.upto = {OLD: 0, NEW: 0}

    def streams(self) -> list[bytes]:
        """Return the streams with something left, oldest first."""
        return [each for each in (OLD, NEW) if self.upto[each] < self.last[each]]

    def batch(self, stream: bytes, vital: bool, after: int) -> list[int]:
        """Return up to three numbers; every fifth one is vital."""
        start = max(after, self.upto[stream])
        numbers = range(start + 1, self.last[stream] + 1)
        return [n for n in numbers if (n % 5 == 0) is vital][:3]

    def ack(self, stream: bytes) -> int:
        """Return the server's cumulative acknowledgement."""
        upto = 0
        while upto + 1 in self.stored[stream]:
            upto += 1
        return upto


LOSS = st.lists(st.sampled_from(["lost", "unanswered", "ok"]), max_size=200)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 4), LOSS)
def test_everything_arrives_within_the_window(
    old: int, new: int, window: int, fates: list[str]
) -> None:
    """Whatever is lost on the way, either way; and never more is in flight than allowed."""
    config = LinkConfig(batches_in_flight_max=window, ack_timeout_s=10)
    outbox, peer = Outbox(config), Peer(old, new)
    now_s, fate = 0.0, iter(fates)
    for _ in range(5000):
        if not peer.streams():
            break
        flying: list[tuple[bytes, bool, list[int]]] = []
        sent = True
        while sent:
            sent = False
            for want in outbox.wants(peer.streams()):
                numbers = peer.batch(want.stream, want.vital, want.after)
                if numbers:
                    outbox.sent(want, numbers[-1], now_s=now_s)
                    flying.append((want.stream, want.vital, numbers))
                    sent = True
                    break
        for vital in (True, False):
            assert sum(1 for each in flying if each[1] is vital) <= window
        for stream, _, numbers in flying:
            what = next(fate, "ok")
            if what == "lost":
                continue
            peer.stored[stream] |= set(numbers)
            if what == "ok":
                peer.upto[stream] = peer.ack(stream)
                outbox.acknowledged(stream, peer.upto[stream])
        now_s += 11
        outbox.expire(now_s=now_s)
    assert not peer.streams()
    assert (peer.ack(OLD), peer.ack(NEW)) == (old, new)


def test_vital_records_overtake() -> None:
    """An update's outcome does not wait behind a day of windows; old streams go before new."""
    outbox = Outbox(LinkConfig())
    order = [(want.stream, want.vital) for want in outbox.wants([OLD, NEW])]
    assert order == [(OLD, True), (NEW, True), (OLD, False), (NEW, False)]


def test_a_full_window_of_windows_leaves_room_for_vital_records() -> None:
    """A gap record must get out, or the acknowledgement could never pass what is lost."""
    outbox = Outbox(LinkConfig(batches_in_flight_max=1))
    want = outbox.wants([NEW])[1]
    outbox.sent(want, 3, now_s=0)
    assert [each.vital for each in outbox.wants([NEW])] == [True]


def test_only_what_got_no_answer_is_sent_again() -> None:
    """And only after the time for it; another stream's batches stay in flight."""
    outbox = Outbox(LinkConfig(ack_timeout_s=10))
    outbox.sent(outbox.wants([OLD])[1], 3, now_s=0)
    outbox.sent(outbox.wants([NEW])[1], 7, now_s=5)
    assert not outbox.expire(now_s=9.9)
    assert outbox.expire(now_s=10)
    cursors = {want.stream: want.after for want in outbox.wants([OLD, NEW]) if not want.vital}
    assert cursors == {OLD: 0, NEW: 7}
    outbox.reset()
    assert all(want.after == 0 for want in outbox.wants([OLD, NEW]))


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0.1, 1000))
def test_the_wait_is_jittered_and_bounded(attempt: int, draw: float, most_s: float) -> None:
    """0 <= wait <= min(most, 2^n)."""
    assert 0 <= reconnect_delay_s(attempt, most_s=most_s, draw=draw) <= min(most_s, 2.0**attempt)


# --- the shell -------------------------------------------------------------------------------


class FakeSession:
    """A session with a broker that does as the test says."""

    made: list[FakeSession]
    refuse = False
    packet_bytes_max = 256 << 10

    def __init__(self, url: str, **arguments: Any) -> None:
        self.url, self.arguments = url, arguments
        self.published: list[tuple[str, bytes, bool]] = []
        self.closed: asyncio.Future[str] | None = None
        self.made.append(self)

    async def __aenter__(self) -> Self:
        if self.refuse:
            raise SessionError("broker cannot be reached")
        self.closed = asyncio.get_running_loop().create_future()
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def flush(self, wait_s: float) -> None:
        """Leave at once."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Note it."""
        self.published.append((topic, payload, retain))
        return True

    def down(self, leaf: topics.Leaf, payload: bytes) -> None:
        """Say something to the device."""
        self.arguments["on_message"](Message(topics.topic("d-1", leaf), payload, (1, 1)))

    def batches(self) -> list[records.Batch]:
        """Return the batches that were published."""
        topic = topics.topic("d-1", topics.Leaf.TELEMETRY)
        return [records.decode_batch(payload) for to, payload, _ in self.published if to == topic]

    def presences(self) -> list[tuple[bool, bool]]:
        """Return (online, retained) as they were published."""
        topic = topics.topic("d-1", topics.Leaf.PRESENCE)
        return [
            (records.Presence.decode(payload).online, retain)
            for to, payload, retain in self.published
            if to == topic
        ]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """Put the fake in the place of the real one."""

    class Fake(FakeSession):
        made: list[FakeSession] = []  # noqa: RUF012  # one list per test

    monkeypatch.setattr(module, "Session", Fake)
    return Fake


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """An open spool."""
    found = Spool(tmp_path, config=SpoolConfig(), clock=lambda: 1)
    found.open()
    yield found
    found.close()


class Device:
    """A link, what it heard, and its health."""

    def __init__(self, spool: Spool, **config: Any) -> None:
        self.heard: list[str | int] = []
        self.health = Health(clock=lambda: 1)
        self.link = Link(
            spool,
            url="mqtt://broker",
            device="d-1",
            boot=spool.stream,
            config=LinkConfig(**({"poll_s": 0.01} | config)),
            health=self.health,
            on_nudge=self.heard.append,
            on_desired=self.heard.append,
            draw=lambda: 0.0,
        )

    def codes(self) -> set[str]:
        """Return what is wrong."""
        return {each.code for each in self.health.warnings()}


async def until(true: Callable[[], Any]) -> None:
    """Wait for a condition, ten seconds at most."""
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    pytest.fail("gave up waiting")


def story(device: Device, run: Callable[[], Any]) -> None:
    """Run the link beside a story, then stop it; a stop that hangs is an error."""

    async def both() -> None:
        running = asyncio.create_task(device.link.run())
        try:
            await run()
        finally:
            running.cancel()
            await asyncio.wait([running], timeout=10)
            assert running.done(), "the link stops when it is told to"

    asyncio.run(both())


def test_says_who_it_is_sends_and_forgets(session: type[FakeSession], spool: Spool) -> None:
    """Online first; the spool keeps a record until the acknowledgement; offline at the end."""
    for _ in range(3):
        spool.append(Kind.EVENT, EVENT)
    spool.flush()
    device = Device(spool)

    async def run() -> None:
        await until(lambda: session.made and session.made[0].batches())
        fake = session.made[0]
        assert fake.presences() == [(True, True)]
        will, payload = fake.arguments["will"]
        assert will == topics.topic("d-1", topics.Leaf.PRESENCE)
        assert not records.Presence.decode(payload).online
        (batch,) = fake.batches()
        assert batch.stream == spool.stream and [each.seq for each in batch.records] == [1, 2, 3]
        assert spool.totals().spooled == 3
        fake.down(topics.Leaf.ACK, records.Ack(spool.stream, 2).encode())
        assert spool.totals().spooled == 1
        assert not await device.link.drain(0.05)
        fake.down(topics.Leaf.ACK, records.Ack(spool.stream, 3).encode())
        assert await device.link.drain(5)

    story(device, run)
    assert session.made[0].presences() == [(True, True), (False, True)]
    assert spool.counters()["bytes_up"] > 150


def test_sends_again_what_got_no_answer(session: type[FakeSession], spool: Spool) -> None:
    """After a while on the same connection, and at once on a new one."""
    spool.append(Kind.UPDATE, UPDATE)
    device = Device(spool, ack_timeout_s=0.05)

    async def run() -> None:
        await until(lambda: session.made and len(session.made[0].batches()) > 1)
        closed = session.made[0].closed
        assert closed is not None
        closed.set_result("disconnected")
        await until(lambda: len(session.made) > 1 and session.made[1].batches())
        first, second = session.made[0].batches()[0], session.made[1].batches()[0]
        assert first == second

    story(device, run)


def test_a_broker_that_is_away_is_a_warning_until_it_is_back(
    session: type[FakeSession], spool: Spool
) -> None:
    """Nothing is lost meanwhile, and nobody has to act."""
    session.refuse = True
    spool.append(Kind.UPDATE, UPDATE)
    device = Device(spool)

    async def run() -> None:
        await until(lambda: len(session.made) > 3)
        assert device.codes() == {"link.down"} and not device.link.connected
        session.refuse = False
        await until(lambda: session.made[-1].batches())
        assert device.codes() == set() and device.link.connected

    story(device, run)
    assert spool.totals().spooled == 1


def test_hears_nudges_and_versions_and_no_nonsense(
    session: type[FakeSession], spool: Spool
) -> None:
    """What is malformed is ignored: the broker is not trusted with more than a hint."""
    device = Device(spool)

    async def run() -> None:
        await until(lambda: session.made and session.made[0].presences())
        fake = session.made[0]
        fake.down(topics.Leaf.COMMAND, records.Nudge("tasks").encode())
        fake.down(topics.Leaf.DESIRED, records.DesiredVersion(7).encode())
        for leaf in topics.Leaf:
            fake.down(leaf, b"\xc1")
        fake.down(topics.Leaf.ACK, records.Ack(bytes(16), 9).encode())
        fake.arguments["on_message"](Message("not/ours", b"", (1, 1)))

    story(device, run)
    assert device.heard == ["tasks", 7]


def test_a_record_above_the_brokers_limit_is_never_published(
    session: type[FakeSession], spool: Spool
) -> None:
    """The client library would try it for ever and send nothing else (fault 39)."""
    session.packet_bytes_max = 300
    spool.append(Kind.EVENT, EVENT | {"text": "t" * 900})
    spool.flush()
    device = Device(spool)

    async def run() -> None:
        await until(lambda: device.codes() == {"link.packet"})
        session.packet_bytes_max = 256 << 10
        closed = session.made[0].closed
        assert closed is not None
        closed.set_result("restarted with another limit")
        await until(lambda: len(session.made) > 1 and session.made[1].batches())
        assert not session.made[0].batches()
        assert device.codes() == set()

    story(device, run)


def test_batches_keep_to_the_brokers_limit(session: type[FakeSession], spool: Spool) -> None:
    """Many small records go in as many batches as it takes."""
    session.packet_bytes_max = 1000
    for _ in range(50):
        spool.append(Kind.EVENT, EVENT)
    spool.flush()
    device = Device(spool, batches_in_flight_max=50)

    async def run() -> None:
        def sent() -> int:
            return sum(len(each.records) for each in session.made[0].batches())

        await until(lambda: session.made and sent() == 50)
        assert max(len(payload) for _, payload, _ in session.made[0].published) < 900

    story(device, run)


def test_a_refused_publish_is_told(session: type[FakeSession], spool: Spool) -> None:
    """Reason 0x87 of the broker's access list must not look like success (fault 36)."""
    spool.append(Kind.UPDATE, UPDATE)
    device = Device(spool)

    async def run() -> None:
        await until(lambda: session.made and session.made[0].batches())
        session.made[0].arguments["on_denied"]("Not authorized")
        assert device.codes() == {"link.denied"} and spool.totals().spooled == 1
        session.made[0].down(topics.Leaf.ACK, records.Ack(spool.stream, 1).encode())
        assert device.codes() == set()

    story(device, run)


def test_a_disk_that_fails_is_a_warning(
    session: type[FakeSession], spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link lives on: the next look may work."""
    spool.append(Kind.UPDATE, UPDATE)
    device = Device(spool)

    def broken(*_: Any, **__: Any) -> Any:
        raise SpoolError("the disk failed")

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(spool, "batch", broken)
            await until(lambda: device.codes() == {"link.spool"})
        await until(lambda: session.made[0].batches())
        assert device.codes() == set()

    story(device, run)


def test_a_stop_together_with_news_is_a_stop(session: type[FakeSession], spool: Spool) -> None:
    """On Python 3.11 ``wait_for`` would swallow the cancellation here, and the agent hang."""
    device = Device(spool, poll_s=5)

    async def run() -> None:
        await until(lambda: session.made and session.made[0].presences())
        await asyncio.sleep(0)
        device.link.wake()
        await asyncio.sleep(0)  # the waiter is done, the link has not run yet

    story(device, run)


@pytest.mark.parametrize(
    "bad",
    [
        {"batches_in_flight_max": 0},
        {"batches_in_flight_max": 201},
        {"batch_records_max": 0},
        {"batch_bytes_max": 100},
        {"batch_bytes_max": 64 << 10},
        {"ack_timeout_s": 0.0},
        {"poll_s": -1.0},
    ],
)
def test_limits_are_checked(bad: dict[str, Any]) -> None:
    """A configuration that cannot work is refused before anything starts."""
    with pytest.raises(ValueError, match="must be"):
        LinkConfig(**bad)
