"""The feed: one look serves all, nobody watching means no look, the newest is all one gets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from shoal.server.errors import ServerError, StoreError
from shoal.server.web.feed import Feed, Snapshot


class Fleet:
    """Something to look at."""

    def __init__(self) -> None:
        self.looks = 0
        self.value = 0
        self.broken: Exception | None = None

    def look(self) -> Mapping[str, Any]:
        """Count the look."""
        self.looks += 1
        if self.broken:
            raise self.broken
        return {"value": self.value}


def story(tell: Callable[[Fleet, Feed], Awaitable[None]], *, refresh_s: float = 0.001) -> Fleet:
    """Run a story against a running feed."""
    fleet = Fleet()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        feed = Feed(fleet.look, refresh_s=refresh_s, monotonic=loop.time)
        running = asyncio.create_task(feed.run())
        try:
            await asyncio.wait_for(tell(fleet, feed), 20)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
    return fleet


async def wait(feed: Feed, number: int) -> Snapshot:
    """Return the next snapshot."""
    found = await feed.after(number, wait_s=10)
    assert found is not None
    return found


def test_a_change_reaches_all_who_wait() -> None:
    """Every watcher gets the new content, by the same look's number."""

    async def tell(fleet: Fleet, feed: Feed) -> None:
        first = await wait(feed, -1)
        assert first.content == {"value": 0}
        waiting = [asyncio.create_task(wait(feed, first.number)) for _ in range(5)]
        await asyncio.sleep(0)
        fleet.value = 1
        found = await asyncio.gather(*waiting)
        assert {each.number for each in found} == {first.number + 1}
        assert found[0].content == {"value": 1}

    story(tell)


def test_no_change_is_no_news() -> None:
    """Looks that see the same do not wake anybody."""

    async def tell(fleet: Fleet, feed: Feed) -> None:
        first = await wait(feed, -1)
        waiting = asyncio.create_task(wait(feed, first.number))
        while fleet.looks < 4:
            await asyncio.sleep(0.001)
        assert not waiting.done()
        waiting.cancel()

    story(tell)


def test_nobody_watching_means_no_look() -> None:
    """The database rests while no page is open."""

    async def tell(_fleet: Fleet, _feed: Feed) -> None:
        await asyncio.sleep(0.05)

    assert story(tell).looks == 0


def test_requests_of_the_same_moment_share_a_look() -> None:
    """A burst of requests costs one look."""

    async def tell(_fleet: Fleet, feed: Feed) -> None:
        await asyncio.gather(*(feed.current() for _ in range(50)))

    assert story(tell, refresh_s=60).looks == 1


@pytest.mark.parametrize(("computed_s", "looks"), [(0.0, 2), (10.0, 1)])
def test_only_what_a_look_computes_is_rested_for(computed_s: float, looks: int) -> None:
    """One that waited ten seconds for a busy machine is repeated soon, a costly one is not."""
    now_s = busy_s = 0.0
    seen = 0

    def look() -> Mapping[str, Any]:
        nonlocal now_s, busy_s, seen
        now_s, busy_s, seen = now_s + 10, busy_s + computed_s, seen + 1
        return {}

    async def main() -> None:
        feed = Feed(look, refresh_s=1.0, monotonic=lambda: now_s, busy=lambda: busy_s)
        nonlocal now_s
        await feed.current()
        now_s += 1
        await feed.current()

    asyncio.run(main())
    assert seen == looks


def test_a_page_that_opens_after_a_request_waits_for_the_rest_of_the_rest() -> None:
    """A look 0.6 s ago serves the page; the next is due in 0.4 s, not in another whole second."""
    now_s = 0.0
    rests: list[float] = []

    async def sleep(rest_s: float) -> None:
        nonlocal now_s
        rests.append(rest_s)
        now_s += rest_s
        await asyncio.sleep(0)

    async def main() -> Fleet:
        nonlocal now_s
        fleet = Fleet()
        feed = Feed(fleet.look, refresh_s=1, monotonic=lambda: now_s, busy=lambda: 0, sleep=sleep)
        await feed.current()
        now_s = 0.6
        running = asyncio.create_task(feed.run())
        first = await wait(feed, -1)
        fleet.value = 1
        assert (await wait(feed, first.number)).content == {"value": 1}
        running.cancel()
        return fleet

    assert asyncio.run(main()).looks == 2
    assert rests[0] == pytest.approx(0.4)


def test_who_is_slow_gets_the_newest_only() -> None:
    """Missed snapshots are missed: nothing queues for a page that does not read."""

    async def tell(fleet: Fleet, feed: Feed) -> None:
        first = await wait(feed, -1)
        number = first.number
        for value in range(1, 6):
            fleet.value = value
            number = (await wait(feed, number)).number
        late = await wait(feed, first.number)
        assert late.content == {"value": 5}

    story(tell)


@pytest.mark.parametrize(
    ("broken", "says"),
    [(StoreError("disk gone", hint="buy one"), "disk gone"), (KeyError("secret"), "KeyError")],
)
def test_a_failed_look_is_told_and_heals(broken: Exception, says: str) -> None:
    """Whatever fails, watchers get an error and the last good content; the server lives on."""

    async def tell(fleet: Fleet, feed: Feed) -> None:
        good = await wait(feed, -1)
        fleet.broken = broken
        bad = await wait(feed, good.number)
        assert bad.error is not None and bad.content == {"value": 0}
        assert "secret" not in str(bad.error)
        with pytest.raises(ServerError, match=says):
            await feed.current()
        fleet.broken = None
        healed = await wait(feed, bad.number)
        assert healed.error is None and healed.content == {"value": 0}

    story(tell)
