# ruff: noqa: D102, D103 - the name of a test is its promise; a docstring says why where it must
"""The scheduler: properties of the pure queue, and stories with threads that never sleep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import ShoalError
from shoal.agent.errors import ModelClosedError, ModelError
from shoal.agent.local.config import ModelLimits
from shoal.agent.local.errors import DeadlineError, OverloadError
from shoal.agent.local.scheduler import Queue, Scheduler, Watch, Work

WAIT_S = 30.0  # a test that waits so long has failed
FAR_NS = 1 << 62


def work(
    payload: Any = None, *, key: str | None = None, rows: int = 1, priority: int = 1,
    since_ns: int = 0, until_ns: int = FAR_NS, size: int = 1,
    done: Callable[[Any], None] = lambda outcome: None,
) -> Work:  # fmt: skip
    return Work(payload, key, rows, size, priority, since_ns, until_ns, done)


WORKS = st.builds(
    work,
    key=st.sampled_from([None, "a", "b"]),
    rows=st.integers(1, 5),
    priority=st.integers(1, 3),
    since_ns=st.integers(0, 20_000),
    until_ns=st.integers(1, 60_000),
    size=st.integers(0, 40),
)
LIMITS = st.builds(
    ModelLimits,
    queue_max=st.integers(1, 8),
    queue_bytes_max=st.integers(1, 100),
    batch_max=st.integers(1, 8),
    batch_wait_us=st.integers(0, 20),
    priorities=st.just(3),
)


@settings(max_examples=300, deadline=None)
@given(LIMITS, st.lists(st.one_of(WORKS, st.integers(0, 8_000)), max_size=40))
def test_each_request_has_exactly_one_end_within_all_bounds(
    limits: ModelLimits, events: list[Work | int]
) -> None:
    """Whatever comes when: nothing is lost, run twice, run late, or run past its elder."""
    queue, now_ns, put_order = Queue(limits), 0, 0
    waiting: dict[Work, int] = {}
    for event in events:
        if isinstance(event, Work):
            event.since_ns, event.payload = now_ns, put_order
            put_order += 1
            size = sum(each.size for each in waiting)
            full = len(waiting) >= limits.queue_max or (
                bool(waiting) and size + event.size > limits.queue_bytes_max
            )
            if full:
                with pytest.raises(OverloadError):
                    queue.put(event)
            else:
                queue.put(event)
                waiting[event] = put_order
            assert len(queue) == len(waiting)
            continue
        now_ns += event
        over = queue.expire(now_ns)
        assert {id(each) for each in over} == {
            id(each) for each in waiting if each.until_ns <= now_ns
        }
        for each in over:
            del waiting[each]
        head = min(waiting, key=lambda w: (w.priority, waiting[w]), default=None)
        turn = queue.next(now_ns)
        if not turn.run:
            # It waits only for others to join, never beyond the budget or a deadline.
            assert (head is None) == (turn.wait_ns is None)
            if turn.wait_ns is not None:
                wake_ns = now_ns + turn.wait_ns
                assert head is not None
                assert head.key is not None
                assert now_ns < wake_ns <= head.since_ns + limits.batch_wait_us * 1000
                assert wake_ns < head.until_ns
            continue
        assert head in turn.run
        assert all(each.until_ns > now_ns for each in turn.run)
        assert len({each.key for each in turn.run}) == 1
        if len(turn.run) > 1:
            assert head is not None
            assert head.key is not None
            assert sum(each.rows for each in turn.run) <= limits.batch_max
        for each in turn.run:
            del waiting[each]
        ran = max((each.priority, each.payload) for each in turn.run)
        partners = [w for w in waiting if w.key is not None and w.key == turn.run[0].key]
        assert all((w.priority, w.payload) > ran for w in partners)
    assert {id(each) for each in queue.clear()} == {id(each) for each in waiting}
    assert len(queue) == 0


def test_a_batch_waits_for_its_budget_and_no_longer() -> None:
    queue = Queue(ModelLimits(batch_max=4, batch_wait_us=100))
    queue.put(work("a", key="k", since_ns=1_000))
    assert queue.next(1_000).wait_ns == 100_000
    queue.put(work("b", key="k", since_ns=50_000))
    assert queue.next(50_000).wait_ns == 51_000
    assert [each.payload for each in queue.next(101_000).run] == ["a", "b"]


def test_a_full_batch_goes_at_once() -> None:
    queue = Queue(ModelLimits(batch_max=4, batch_wait_us=100))
    for name, rows in (("a", 3), ("b", 2), ("c", 1)):
        queue.put(work(name, key="k", rows=rows))
    # b does not fit any more, and c may not overtake it
    assert [each.payload for each in queue.next(0).run] == ["a"]
    assert queue.next(0).wait_ns == 100_000


def test_a_deadline_within_the_budget_is_not_waited_away() -> None:
    queue = Queue(ModelLimits(batch_max=4, batch_wait_us=100))
    queue.put(work("a", key="k", until_ns=90_000))
    assert [each.payload for each in queue.next(10).run] == ["a"]


def test_time_is_over_at_its_end_and_not_before() -> None:
    queue = Queue(ModelLimits())
    first, second = work(until_ns=100), work(until_ns=200)
    queue.put(second)
    queue.put(first)
    assert queue.expire(99) == []
    assert queue.expire(100) == [first]
    assert queue.expire(200) == [second]
    assert len(queue) == 0


def test_draining_waits_for_nobody() -> None:
    queue = Queue(ModelLimits(batch_max=4, batch_wait_us=100))
    queue.put(work("a", key="k"))
    assert [each.payload for each in queue.next(0, wait=False).run] == ["a"]


def test_priority_goes_before_age() -> None:
    queue = Queue(ModelLimits())
    for name, priority in (("low", 3), ("high", 1), ("middle", 2), ("high2", 1)):
        queue.put(work(name, priority=priority))
    ran = [queue.next(0).run[0].payload for _ in range(4)]
    assert ran == ["high", "high2", "middle", "low"]


class Slow:
    """Runs when it is let to, and notes what it ran."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.running = threading.Semaphore(0)
        self.batches: list[list[Any]] = []
        self.threads: set[str] = set()

    def __call__(self, batch: Sequence[Work]) -> Sequence[Any]:
        self.running.release()
        assert self.go.acquire(timeout=WAIT_S)
        self.batches.append([each.payload for each in batch])
        self.threads.add(threading.current_thread().name)
        return [each.payload for each in batch]


class Answers:
    """Collects what submitted requests are told."""

    def __init__(self) -> None:
        self.told: dict[str, list[Any]] = {}
        self.some = threading.Semaphore(0)

    def work(self, name: str, **facts: Any) -> Work:
        def done(outcome: Any) -> None:
            self.told.setdefault(name, []).append(outcome)
            self.some.release()

        return work(name, done=done, **facts)

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.some.acquire(timeout=WAIT_S)


def test_a_free_model_runs_in_the_callers_thread() -> None:
    """No thread is made where none is needed."""
    slow = Slow()
    slow.go.release()
    scheduler = Scheduler("m", ModelLimits(), slow)
    assert scheduler.call(work("a"), None) == "a"
    assert slow.threads == {threading.current_thread().name}
    assert scheduler.close(WAIT_S)


def test_overload_is_refused_at_once_and_counted() -> None:
    slow, answers = Slow(), Answers()
    refused: list[Any] = []
    scheduler = Scheduler(
        "m", ModelLimits(queue_max=2), slow, refused=lambda w, e: refused.append(w.payload)
    )
    scheduler.submit(answers.work("a"))
    assert slow.running.acquire(timeout=WAIT_S)
    scheduler.submit(answers.work("b"))
    scheduler.submit(answers.work("c"))
    with pytest.raises(OverloadError, match="maximum queue size"):
        scheduler.submit(answers.work("d"))
    with pytest.raises(OverloadError):
        scheduler.call(work("e"), None)
    assert refused == ["d", "e"]
    slow.go.release(3)
    answers.wait(3)
    assert answers.told == {"a": ["a"], "b": ["b"], "c": ["c"]}
    assert scheduler.close(WAIT_S)


def test_a_worker_waits_for_a_slot_that_a_caller_has() -> None:
    slow, answers = Slow(), Answers()
    scheduler = Scheduler("m", ModelLimits(), slow)
    caller = threading.Thread(target=scheduler.call, args=(work("a"), None))
    caller.start()
    assert slow.running.acquire(timeout=WAIT_S)
    scheduler.submit(answers.work("b"))
    assert not slow.running.acquire(timeout=0.1)
    slow.go.release(2)
    answers.wait(1)
    caller.join(WAIT_S)
    assert slow.batches == [["a"], ["b"]]
    assert scheduler.close(WAIT_S)


def test_what_waits_is_run_together() -> None:
    slow, answers = Slow(), Answers()
    scheduler = Scheduler("m", ModelLimits(batch_max=3), slow)
    for name in "abcde":
        scheduler.submit(answers.work(name, key="k"))
        if name == "a":
            assert slow.running.acquire(timeout=WAIT_S)
    slow.go.release(3)
    answers.wait(5)
    assert slow.batches == [["a"], ["b", "c", "d"], ["e"]]
    assert scheduler.close(WAIT_S)


def test_never_more_runs_than_slots_whoever_runs() -> None:
    """Callers' threads and workers share the slots."""
    lock, now, most = threading.Lock(), [0], [0]
    turn = threading.Barrier(2)

    def run(batch: Sequence[Work]) -> Sequence[Any]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        turn.wait(WAIT_S)  # two must be in here at once, or nobody gets on
        with lock:
            now[0] -= 1
        return [each.payload for each in batch]

    answers = Answers()
    limits = ModelLimits(workers=2, queue_max=100)
    scheduler = Scheduler("m", limits, run)
    found: list[Any] = []
    callers = [
        threading.Thread(target=lambda i=i: found.append(scheduler.call(work(i), None)))
        for i in range(10)
    ]
    for i, caller in enumerate(callers):
        scheduler.submit(answers.work(str(i)))
        caller.start()
    for caller in callers:
        caller.join(WAIT_S)
    answers.wait(10)
    assert sorted(found) == list(range(10))
    assert most == [2]
    assert scheduler.close(WAIT_S)


def test_one_whose_time_is_over_is_told_while_the_model_is_busy() -> None:
    """The slot is taken the whole time: only the watch can tell it."""
    slow, answers = Slow(), Answers()
    now_ns = [0]
    scheduler = Scheduler(
        "m", ModelLimits(), slow, queued=lambda: watch.wake(), clock=lambda: now_ns[0]
    )
    watch = Watch(lambda: [scheduler])
    watch.start()
    scheduler.submit(answers.work("a"))
    assert slow.running.acquire(timeout=WAIT_S)
    scheduler.submit(answers.work("b", until_ns=10))
    scheduler.submit(answers.work("c", until_ns=30))
    now_ns[0] = 20
    answers.wait(1)
    assert isinstance(answers.told["b"][0], DeadlineError)
    assert set(answers.told) == {"b"}
    slow.go.release(2)
    answers.wait(2)
    assert slow.batches == [["a"], ["c"]]
    watch.stop()
    assert scheduler.close(WAIT_S)


def test_a_caller_waits_no_longer_than_it_said() -> None:
    slow, refused = Slow(), []
    scheduler = Scheduler("m", ModelLimits(), slow, refused=lambda w, e: refused.append(w.payload))
    answers = Answers()
    scheduler.submit(answers.work("a"))
    assert slow.running.acquire(timeout=WAIT_S)
    with pytest.raises(DeadlineError):
        scheduler.call(work("b"), 0.01)
    assert not scheduler.expire()  # nothing waits any more
    assert refused == ["b"]
    slow.go.release()
    answers.wait(1)
    assert slow.batches == [["a"]]
    assert scheduler.close(WAIT_S)


def test_close_runs_what_waits_and_refuses_what_comes() -> None:
    slow, answers = Slow(), Answers()
    scheduler = Scheduler("m", ModelLimits(batch_max=2, batch_wait_us=10_000_000), slow)
    scheduler.submit(answers.work("a"))
    assert slow.running.acquire(timeout=WAIT_S)
    scheduler.submit(answers.work("b", key="k"))
    closer = threading.Thread(target=scheduler.close, args=(WAIT_S,))
    closer.start()
    refused = False
    while not refused:  # until the closer has come to it
        try:
            scheduler.submit(answers.work("c", until_ns=0))
        except (ModelClosedError, OverloadError) as error:
            refused = isinstance(error, ModelClosedError)
    slow.go.release(200)
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert answers.told["a"] == ["a"]
    assert answers.told["b"] == ["b"]


def test_close_gives_up_in_time_and_tells_those_that_wait() -> None:
    slow, answers = Slow(), Answers()
    scheduler = Scheduler("m", ModelLimits(), slow)
    scheduler.submit(answers.work("a"))
    assert slow.running.acquire(timeout=WAIT_S)
    scheduler.submit(answers.work("b"))
    assert not scheduler.close(0.0)
    assert isinstance(answers.told["b"][0], ModelClosedError)
    slow.go.release()
    answers.wait(2)
    assert answers.told["a"] == ["a"]
    assert scheduler.close(WAIT_S)


def test_a_worker_survives_a_run_that_raises_and_a_done_that_raises() -> None:
    def run(batch: Sequence[Work]) -> Sequence[Any]:
        if batch[0].payload == "bad":
            raise ZeroDivisionError
        return [each.payload for each in batch]

    def done(outcome: Any) -> None:
        raise ZeroDivisionError

    answers = Answers()
    scheduler = Scheduler("m", ModelLimits(), run)
    scheduler.submit(answers.work("bad"))
    scheduler.submit(work("x", done=done))
    scheduler.submit(answers.work("good"))
    answers.wait(2)
    assert isinstance(answers.told["bad"][0], ModelError)
    assert answers.told["good"] == ["good"]
    outcome = scheduler.call(work("bad"), WAIT_S)
    assert isinstance(outcome, ShoalError)
    assert scheduler.close(WAIT_S)
