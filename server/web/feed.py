"""Look at the fleet no oftener than needed and hand the newest snapshot to all who watch.

    database --look, in a thread--> snapshot --if it differs--> every waiting page

One look serves every page and every request of the same second. Nobody watching means no look. A
page that reads slowly misses snapshots, never queues them: each wait returns the newest one only.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ... import ShoalError
from ..errors import ServerError

LOOK_SHARE_MAX: Final = 0.2  # of one core: a look that computes for 1 s is followed by 4 s of rest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one look saw; ``number`` grows whenever the content differs from the one before."""

    number: int
    content: Mapping[str, Any]
    """JSON-serialisable; without the time of the look, which changes even if nothing else does."""
    text: str
    """``content`` as JSON."""
    digest: bytes
    error: ShoalError | None = None
    """Why this look failed; the content is then that of the last one that did not."""


class Feed:
    """The newest snapshot. One event loop; ``look`` runs in a thread, one at a time."""

    def __init__(
        self,
        look: Callable[[], Mapping[str, Any]],
        *,
        refresh_s: float,
        monotonic: Callable[[], float],
        busy: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Begin; nothing is looked at yet.

        Args:
            look: Returns the content of a snapshot; called in a thread.
            refresh_s: Shortest rest between two looks, s.
            monotonic: Clock, s.
            busy: CPU time of the calling thread, s. A look that had to wait for the database or
                for a busy machine is no reason to show old news longer.
            sleep: Waits for so many seconds of ``monotonic``.
        """
        self._look, self._refresh_s, self._monotonic, self._busy = look, refresh_s, monotonic, busy
        self._sleep = sleep
        self._newest = Snapshot(0, {}, "{}", b"")
        self._due_s = float("-inf")  # when the next look may begin, by ``monotonic``
        self._looking = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._watched = asyncio.Event()
        self._watchers = 0

    async def current(self) -> Snapshot:
        """Return a snapshot no older than the rest between looks.

        Raises:
            ShoalError: The look failed.
        """
        newest = await self._refreshed()
        if newest.error is not None:
            raise newest.error
        return newest

    async def after(self, number: int, *, wait_s: float) -> Snapshot | None:
        """Return the newest snapshot once its number differs from ``number``; None after a while.

        Args:
            number: Of the snapshot that the caller has; -1 = none.
            wait_s: How long to wait, s.
        """
        self._watchers += 1
        self._watched.set()
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: self._newest.number not in (0, number))
                return self._newest
        except TimeoutError:
            return None
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._watched.clear()

    async def run(self) -> None:
        """Look again and again while somebody watches, until cancelled."""
        while True:
            await self._watched.wait()
            await self._refreshed()
            # Not the whole rest: the look may have been a request's, some time ago.
            await self._sleep(max(0.0, self._due_s - self._monotonic()))

    async def _refreshed(self) -> Snapshot:
        async with self._looking:
            if self._monotonic() < self._due_s:
                return self._newest
            took_s = 0.0
            try:
                content, took_s = await asyncio.to_thread(self._timed)
                error: ShoalError | None = None
            except Exception as exc:  # whatever it is, the fleet's server goes on without a page
                if self._newest.error is None:
                    _log.warning("the console cannot look at the fleet", exc_info=exc)
                content = self._newest.content
                error = exc if isinstance(exc, ShoalError) else _unexpected(exc)
            rest_s = max(self._refresh_s, took_s * (1 / LOOK_SHARE_MAX - 1))
            self._due_s = self._monotonic() + rest_s
            await self._publish(content, error)
            return self._newest

    def _timed(self) -> tuple[Mapping[str, Any], float]:
        began_s = self._busy()
        return self._look(), self._busy() - began_s

    async def _publish(self, content: Mapping[str, Any], error: ShoalError | None) -> None:
        before = self._newest
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        digest = hashlib.sha256(f"{error!r}{text}".encode()).digest()
        number = before.number + (digest != before.digest)
        self._newest = Snapshot(number, content, text, digest, error)
        if number != before.number:
            async with self._changed:
                self._changed.notify_all()


def _unexpected(exc: Exception) -> ServerError:
    return ServerError(
        f"the console failed to look at the fleet: {type(exc).__name__}",
        hint="the server's log has the details; please report it",
    )
