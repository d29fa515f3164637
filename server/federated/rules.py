"""The rules of rounds, leases and evaluations; pure.

    task:        offered -> reported | failed | expired
    run:         running -> quantizing -> done | failed
    evaluation:  running -> done | failed

Rule 1: every transition is in the tables below; nothing else assigns `state`.
Rule 2: this file does not know gRPC, the database or the time; `now_ms` is an argument.
Rule 3: a lease is for one device, one round, one use. A round is closed by marking what is still
offered as expired; only then is it folded, so a late result can never change a sum.

Source of the server step: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data
Distribution for Federated Visual Classification", 2019, algorithm 1 (FedAvgM).

P parameters.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .errors import IllegalEventError


class TaskState(StrEnum):
    """States of a lease."""

    OFFERED = "offered"
    REPORTED = "reported"
    FAILED = "failed"
    EXPIRED = "expired"


class TaskEvent(StrEnum):
    """What happens to a lease."""

    RESULT_CAME = "result_came"
    FAILURE_CAME = "failure_came"
    ROUND_CLOSED = "round_closed"
    DELTA_LOST = "delta_lost"


class RunState(StrEnum):
    """States of a run of rounds; an evaluation lacks `quantizing`."""

    RUNNING = "running"
    QUANTIZING = "quantizing"
    DONE = "done"
    FAILED = "failed"


class RunEvent(StrEnum):
    """What happens to a run or an evaluation."""

    ROUNDS_FINISHED = "rounds_finished"
    CANDIDATE_BUILT = "candidate_built"
    ANSWERED = "answered"
    GAVE_UP = "gave_up"


TASKS: Final[Mapping[tuple[TaskState, TaskEvent], TaskState]] = {
    (TaskState.OFFERED, TaskEvent.RESULT_CAME): TaskState.REPORTED,
    (TaskState.OFFERED, TaskEvent.FAILURE_CAME): TaskState.FAILED,
    (TaskState.OFFERED, TaskEvent.ROUND_CLOSED): TaskState.EXPIRED,
    (TaskState.REPORTED, TaskEvent.DELTA_LOST): TaskState.FAILED,
}

RUNS: Final[Mapping[tuple[RunState, RunEvent], RunState]] = {
    (RunState.RUNNING, RunEvent.ROUNDS_FINISHED): RunState.QUANTIZING,
    (RunState.RUNNING, RunEvent.GAVE_UP): RunState.FAILED,
    (RunState.QUANTIZING, RunEvent.CANDIDATE_BUILT): RunState.DONE,
    (RunState.QUANTIZING, RunEvent.GAVE_UP): RunState.FAILED,
}

EVALUATIONS: Final[Mapping[tuple[RunState, RunEvent], RunState]] = {
    (RunState.RUNNING, RunEvent.ANSWERED): RunState.DONE,
    (RunState.RUNNING, RunEvent.GAVE_UP): RunState.FAILED,
}


def task_after(state: str, event: TaskEvent) -> TaskState:
    """Return the state of a lease after an event.

    Raises:
        IllegalEventError: The table has no such step.
    """
    try:
        return TASKS[TaskState(state), event]
    except (KeyError, ValueError) as exc:
        raise IllegalEventError(f"a task that is {state} knows no {event}") from exc


def run_after(state: str, event: RunEvent) -> RunState:
    """Return the state of a run after an event.

    Raises:
        IllegalEventError: The table has no such step.
    """
    try:
        return RUNS[RunState(state), event]
    except (KeyError, ValueError) as exc:
        raise IllegalEventError(f"a run that is {state} knows no {event}") from exc


def evaluation_after(state: str, event: RunEvent) -> RunState:
    """Return the state of an evaluation after an event.

    Raises:
        IllegalEventError: The table has no such step.
    """
    try:
        return EVALUATIONS[RunState(state), event]
    except (KeyError, ValueError) as exc:
        raise IllegalEventError(f"an evaluation that is {state} knows no {event}") from exc


class Verdict(StrEnum):
    """What to do with an open round or evaluation."""

    WAIT = "wait"
    CLOSE = "close"
    """Enough answers, and nothing more to wait for."""
    VOID = "void"
    """Nothing more to wait for, and too few answers."""


def judge(states: Iterable[str], *, now_ms: int, deadline_ms: int, reports_min: int) -> Verdict:
    """Say whether a round waits, is closed or is void.

    Args:
        states: States of its tasks; a round without tasks has just been opened to nobody.
        now_ms: Unix ms.
        deadline_ms: From here on nothing is waited for.
        reports_min: Results that a round needs, at least 1.
    """
    counts = Counter(states)
    if counts[TaskState.OFFERED] and now_ms < deadline_ms:
        return Verdict.WAIT
    if counts[TaskState.REPORTED] >= max(1, reports_min):
        return Verdict.CLOSE
    return Verdict.VOID


def may_open(*, ready: int, known: int, waited_ms: int, gather_ms: int, devices_min: int) -> bool:
    """Say whether a round may be opened for the devices that are ready.

    Args:
        ready: Devices that asked for work lately and can do it.
        known: Devices of the fleet that could become ready.
        waited_ms: Since the round could have been opened first.
        gather_ms: How long to wait for the rest.
        devices_min: Fewer are no round.
    """
    return ready >= max(1, devices_min) and (ready >= known or waited_ms >= gather_ms)


def step(
    parameters__p: NDArray[np.float32],
    mean_delta__p: NDArray[np.float32],
    momentum__p: NDArray[np.float32] | None,
    *,
    server_momentum: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return (new parameters, new momentum) after a round.

    ``m = server_momentum * m + mean delta``, ``parameters = parameters + m``; without momentum
    that is FedAvg.

    Args:
        parameters__p: Float32 (P,).
        mean_delta__p: Float32 (P,).
        momentum__p: Float32 (P,); None = zero.
        server_momentum: 0 to below 1.
    """
    if server_momentum == 0:
        return parameters__p + mean_delta__p, None
    before = np.zeros_like(mean_delta__p) if momentum__p is None else momentum__p
    after = np.float32(server_momentum) * before + mean_delta__p
    return parameters__p + after, after


def seed_of(run_seed: int, round_: int, device: str) -> int:
    """Return the seed of one device's shuffles in one round, 0 to 2**63 - 1."""
    text = f"{run_seed}/{round_}/{device}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def task_id(owner: str, round_: int, device: str) -> str:
    """Return the id of a lease: the same device in the same round always gets the same one."""
    return hashlib.sha256(f"{owner}/{round_}/{device}".encode()).hexdigest()[:32]


def rate_of(rate: float, *, round_: int, rounds: int) -> float:
    """Return the devices' learning rate in a round: half a cosine from ``rate`` towards 0.

    The last rounds settle what the first ones found: without it, devices that are unlike each
    other pull the shared model to and fro, and known groups lose accuracy.

    Args:
        rate: Of the first round, above 0.
        round_: The round, from 0.
        rounds: Rounds of the run, at least 1.

    Source: Loshchilov, Hutter, "SGDR" (2017), eq. 5, without restarts.
    """
    return rate * (1 + math.cos(math.pi * min(round_, rounds) / rounds)) / 2
