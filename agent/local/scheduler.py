"""Decide whose turn it is at a model, and run it: bounded, by priority, in time, in batches.

    put --> Queue (pure, takes now) --Turn--> worker threads --> run --> done
    call, nothing waits, a slot is free -----------------------> run     (in the caller's thread)

Rule 1: at most ``slots`` runs at once, whoever's thread they are in.
Rule 2: every request that was taken is told exactly one outcome.
Rule 3: within a priority requests run in the order they came; a batch may take later ones along,
        never past an earlier one with which they could have run.
Rule 4: one whose time is over never runs.

``Queue`` holds the rules about waiting and knows no thread and no clock; ``Scheduler`` holds the
threads. Times are nanoseconds of one monotonic clock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ... import ShoalError
from ..errors import ModelClosedError, ModelError
from .config import ModelLimits
from .errors import DeadlineError, OverloadError

_log = logging.getLogger(__name__)

Outcome = Any
"""What a run says of a request: an answer, or a ShoalError."""

TICK_S: Final = 0.02  # how late a waiting request may hear that its time is over


@dataclass(slots=True, eq=False)
class Work:
    """A request on its way. ``since_ns`` and ``until_ns`` are when it came and is over."""

    payload: Any
    key: Hashable | None
    """Requests of one key may run as one; None: it runs alone."""
    rows: int
    size: int
    """Bytes it holds while it waits."""
    priority: int
    """1 is first."""
    since_ns: int
    until_ns: int
    done: Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a free slot is to do: run these, or, if there are none, ask again in ``wait_ns``."""

    run: tuple[Work, ...]
    wait_ns: int | None
    """None: nothing waits."""


class Queue:
    """What waits for a model; pure. Not thread-safe: its owner holds a lock."""

    def __init__(self, limits: ModelLimits) -> None:
        self._limits = limits
        self._wait_ns = limits.batch_wait_us * 1000
        self._levels: tuple[deque[Work], ...] = tuple(deque() for _ in range(limits.priorities))
        self._count = 0
        self._size = 0
        self._first_until_ns = 0  # no request is over before; may be early, never late

    def __len__(self) -> int:
        return self._count

    def put(self, work: Work) -> None:
        """Let a request wait.

        Raises:
            OverloadError: The queue is full; nothing changed.
        """
        limits = self._limits
        if self._count >= limits.queue_max or (
            self._count and self._size + work.size > limits.queue_bytes_max
        ):
            raise OverloadError(
                f"Exceeds maximum queue size: {self._count} requests with {self._size} bytes wait",
                hint="ask again later, or raise queue_max",
            )
        self._levels[work.priority - 1].append(work)
        if not self._count or work.until_ns < self._first_until_ns:
            self._first_until_ns = work.until_ns
        self._count += 1
        self._size += work.size

    def expire(self, now_ns: int) -> list[Work]:
        """Take out the requests whose time is over and return them."""
        if not self._count or now_ns < self._first_until_ns:
            return []
        over = [work for work in self._each() if work.until_ns <= now_ns]
        self._take(over)
        self._first_until_ns = min((work.until_ns for work in self._each()), default=0)
        return over

    def next(self, now_ns: int, *, wait: bool = True) -> Turn:
        """Return what to run now; it is taken out. Requests that are over must be out already.

        Args:
            now_ns: The time.
            wait: Whether a batch may be waited for; False while draining.
        """
        head = next(self._each(), None)
        if head is None:
            return Turn((), None)
        if head.key is None:
            self._take([head])
            return Turn((head,), None)
        batch: list[Work] = []
        rows, full = 0, False
        for work in self._each():
            if work.key != head.key:
                continue
            if batch and rows + work.rows > self._limits.batch_max:
                full = True
                break
            batch.append(work)
            rows += work.rows
        due_ns = min(work.since_ns for work in batch) + self._wait_ns
        # Where waiting would cost a request its deadline, the batch goes as it is.
        urgent = any(work.until_ns <= due_ns for work in batch)
        full = full or rows >= self._limits.batch_max
        if wait and not full and not urgent and now_ns < due_ns:
            return Turn((), due_ns - now_ns)
        self._take(batch)
        return Turn(tuple(batch), None)

    def remove(self, work: Work) -> bool:
        """Take a request out; False if it does not wait any more."""
        if work not in self._levels[work.priority - 1]:
            return False
        self._take([work])
        return True

    def clear(self) -> list[Work]:
        """Take all out and return them."""
        waiting = list(self._each())
        self._take(waiting)
        return waiting

    def _each(self) -> Iterator[Work]:
        for level in self._levels:
            yield from level

    def _take(self, out: Sequence[Work]) -> None:
        for work in out:
            level = self._levels[work.priority - 1]
            if level[0] is work:
                level.popleft()
            else:
                level.remove(work)
            self._count -= 1
            self._size -= work.size


class Scheduler:
    """Runs one model's requests. States: open -> closing -> closed.

    Args:
        name: For threads and errors.
        limits: Slots, queue, batches.
        run: Runs requests as one and returns an outcome for each; from several threads at once.
        refused: Told of every request that did not run, with its error.
        queued: Told that a request waits, so that somebody watches its time (``Watch.wake``).
    """

    def __init__(
        self,
        name: str,
        limits: ModelLimits,
        run: Callable[[Sequence[Work]], Sequence[Outcome]],
        *,
        refused: Callable[[Work, ShoalError], None] = lambda work, error: None,
        queued: Callable[[], None] = lambda: None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._name, self._limits, self._run = name, limits, run
        self._refused, self._queued, self._clock = refused, queued, clock
        self._queue = Queue(limits)
        self._inline = limits.batch_max == 1 or limits.batch_wait_us == 0
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # something waits, or closing
        self._idle = threading.Condition(self._lock)  # nothing waits and nothing runs
        self._running = 0
        self._closing = self._closed = False
        self._threads: list[threading.Thread] = []

    def call(self, work: Work, left_s: float | None) -> Outcome:
        """Run a request and return its outcome; in this thread if nothing is before it.

        Raises:
            OverloadError: The queue is full.
            ModelClosedError: The scheduler is closing; nothing ran.
            DeadlineError: ``left_s`` seconds were over first.
        """
        if self.enter():
            try:
                return self._outcomes((work,))[0]
            finally:
                self.leave()
        answered = threading.Event()
        found: list[Outcome] = []

        def done(outcome: Outcome) -> None:
            found.append(outcome)
            answered.set()

        work.done = done
        self.submit(work)
        if not answered.wait(left_s):
            with self._lock:
                waited = self._queue.remove(work)
                self._rest()
            if not found:
                error = DeadlineError("Request timeout expired")
                if waited:
                    self._refused(work, error)
                raise error
        return found[0]

    def submit(self, work: Work) -> None:
        """Run a request in a thread of the scheduler; ``work.done`` is told the outcome.

        Raises:
            OverloadError: The queue is full; ``done`` is not called.
            ModelClosedError: The scheduler is closing; likewise.
        """
        try:
            with self._lock:
                if self._closing:
                    raise ModelClosedError(f"model {self._name} is being taken out")
                if len(self._threads) < self._limits.workers:
                    self._start()
                self._queue.put(work)
                self._work.notify()
        except OverloadError as error:
            self._refused(work, error)
            raise
        self._queued()

    def expire(self) -> bool:
        """Tell waiting requests whose time is over; return whether any still waits."""
        with self._lock:
            over = self._queue.expire(self._clock())
            waiting = len(self._queue) > 0
            self._rest()
        self._expired(over)
        return waiting

    def close(self, seconds: float) -> bool:
        """Take nothing more, run what waits for at most ``seconds``, refuse the rest.

        Returns:
            Whether nothing runs any more; a run cannot be stopped.
        """
        until_s = time.monotonic() + seconds
        with self._lock:
            self._closing = True
            self._work.notify_all()
            while self._running or len(self._queue):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._idle.wait(left_s)
            rest = self._queue.clear()
            self._closed = True
            idle = not self._running
            self._work.notify_all()
        for work in rest:
            text = f"model {self._name} was taken out before its turn came"
            self._refuse(work, ModelClosedError(text))
        if idle:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()
        return idle

    def enter(self) -> bool:
        """Take a slot for a run in this thread, which ``leave`` gives back.

        Returns:
            False where something is before it, or where requests wait for others to run with.

        Raises:
            ModelClosedError: The scheduler is closing.
        """
        with self._lock:
            if self._closing:
                raise ModelClosedError(f"model {self._name} is being taken out")
            if not self._inline or len(self._queue) or self._running >= self._limits.workers:
                return False
            self._running += 1
            return True

    def leave(self) -> None:
        """Give back the slot of a run that has ended."""
        with self._lock:
            self._running -= 1
            if len(self._queue):
                self._work.notify()
            self._rest()

    def _rest(self) -> None:
        if self._closing and not self._running and not len(self._queue):
            self._idle.notify_all()

    def _start(self) -> None:
        thread = threading.Thread(
            target=self._serve, name=f"model-{self._name}-{len(self._threads)}", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def _serve(self) -> None:
        while (batch := self._turn()) is not None:
            try:
                outcomes = self._outcomes(batch)
            finally:
                self.leave()
            for work, outcome in zip(batch, outcomes, strict=True):
                self._tell(work, outcome)
            del batch, outcomes, work, outcome  # or they live until the next request comes

    def _turn(self) -> tuple[Work, ...] | None:
        """Wait for a slot and for something to run in it; None: closed."""
        while True:
            with self._lock:
                over = self._queue.expire(self._clock())
                if not over:
                    if self._closed:
                        return None
                    wait_s = None
                    if self._running < self._limits.workers:
                        turn = self._queue.next(self._clock(), wait=not self._closing)
                        if turn.run:
                            self._running += 1
                            if len(self._queue):
                                self._work.notify()
                            return turn.run
                        wait_s = None if turn.wait_ns is None else turn.wait_ns / 1e9
                    self._rest()
                    self._work.wait(wait_s)
            self._expired(over)

    def _outcomes(self, batch: Sequence[Work]) -> Sequence[Outcome]:
        try:
            return self._run(batch)
        except Exception as exc:  # a worker must survive whatever a model does
            _log.error("running model %s failed", self._name, exc_info=exc)
            text = f"internal error: {type(exc).__name__}; see the log"
            return [ModelError(text) for _ in batch]

    def _expired(self, over: Sequence[Work]) -> None:
        for work in over:
            self._refuse(work, DeadlineError("Request timeout expired while it waited"))

    def _refuse(self, work: Work, error: ShoalError) -> None:
        self._refused(work, error)
        self._tell(work, error)

    def _tell(self, work: Work, outcome: Outcome) -> None:
        try:
            work.done(outcome)
        except Exception as exc:  # as above: the fault is the face's
            _log.error("telling an answer of model %s failed", self._name, exc_info=exc)


class Watch:
    """Has waiting requests told that their time is over while all slots are busy.

    One thread for all models, asleep while nothing waits. States: new -> running -> stopped.
    """

    def __init__(self, schedulers: Callable[[], Sequence[Scheduler]]) -> None:
        self._schedulers = schedulers
        self._some = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="deadlines", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def wake(self) -> None:
        """Say that something waits."""
        if not self._some.is_set():
            self._some.set()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._some.set()
        if self._thread.is_alive():
            self._thread.join()

    def _serve(self) -> None:
        while True:
            self._some.wait()
            self._some.clear()
            waiting = True
            while waiting:
                if self._stop.wait(TICK_S):
                    return
                waiting = any([each.expire() for each in self._schedulers()])
