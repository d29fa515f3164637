"""Compare bundles on the windows that devices hold out; the windows stay where they are.

    start -> a lease per device -> scores -> done when all have answered, or at the deadline

Not here: leases and the checks of scores (``leases``), what follows from the numbers (gates).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select

from ..errors import InvalidError, NotFoundError
from ..store.engine import Store
from ..store.tables import Device, Evaluation, Model, Task
from . import rules
from .leases import Leases
from .rules import RunEvent, RunState, TaskEvent, TaskState, Verdict

BUNDLES_MAX: Final = 4  # of one evaluation, as the contract says
SPLITS: Final = ("validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """How evaluations are watched."""

    tick_s: float = 1.0
    """Deadlines are looked at this often."""
    nudge_s: float = 5.0
    """Devices that did not answer are nudged again after this time."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if min(self.tick_s, self.nudge_s) <= 0:
            raise ValueError("tick_s and nudge_s must be above 0 s")


class Evaluations:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        store: Store,
        leases: Leases,
        *,
        clock: Callable[[], int],
        nudge: Callable[[str, str], None],
        config: EvaluationConfig | None = None,
    ) -> None:
        self._store, self._leases, self._clock = store, leases, clock
        self._nudge, self._config = nudge, config or EvaluationConfig()
        self._changed = leases.subscribe()
        self._nudged_ms: dict[str, int] = {}

    async def start(
        self,
        *,
        bundle_sha256: Sequence[str] = (),
        split: str = "",
        device_ids: Sequence[str] = (),
        deadline_s: int = 60,
    ) -> str:
        """Ask devices for the scores of bundles, and return the evaluation's id.

        Args:
            bundle_sha256: 1 to 4 registered bundles.
            split: "validation" or "test".
            device_ids: Names; empty = every device that is not revoked.
            deadline_s: 1 to 86400.

        Raises:
            InvalidError: An argument is out of range, or there is no device to ask.
            NotFoundError: A bundle or device is unknown.
        """
        bundles = list(dict.fromkeys(bundle_sha256))
        if not 1 <= len(bundles) <= BUNDLES_MAX or split not in SPLITS:
            raise InvalidError(
                f"an evaluation takes 1 to {BUNDLES_MAX} bundles and one of {SPLITS}"
            )
        if not 1 <= deadline_s <= 86_400:
            raise InvalidError(f"deadline_s must be 1 to 86400, not {deadline_s}")

        def write() -> tuple[str, list[int]]:
            now_ms, evaluation_id = self._clock(), uuid.uuid4().hex
            deadline_ms = now_ms + deadline_s * 1000
            with self._store.begin() as session:
                found = session.scalars(select(Model.sha256).where(Model.sha256.in_(bundles))).all()
                if missing := sorted(set(bundles) - set(found)):
                    raise NotFoundError(f"bundle {missing[0]:.12} is not registered")
                query = select(Device).where(Device.revoked_ms.is_(None)).order_by(Device.name)
                if device_ids:
                    query = query.where(Device.name.in_(device_ids))
                devices = session.scalars(query).all()
                if gone := sorted(set(device_ids) - {each.name for each in devices}):
                    raise NotFoundError(f"there is no device {gone[0]:.40} that could be asked")
                if not devices:
                    raise InvalidError("there is no device to ask", hint="enrol one first")
                session.add(
                    Evaluation(
                        id=evaluation_id, state=RunState.RUNNING, bundles=bundles, split=split,
                        devices=[each.name for each in devices],
                        created_ms=now_ms, deadline_ms=deadline_ms,
                    )
                )  # fmt: skip
                session.add_all(
                    Task(
                        id=rules.task_id(evaluation_id, 0, each.name), owner_id=evaluation_id,
                        kind="evaluate", round=0, device_id=each.id, state=TaskState.OFFERED,
                        result={}, created_ms=now_ms, deadline_ms=deadline_ms, changed_ms=now_ms,
                    )
                    for each in devices
                )  # fmt: skip
            return evaluation_id, [each.id for each in devices]

        evaluation_id, devices = await asyncio.to_thread(write)
        self._leases.wake(devices)
        self._changed.set()
        return evaluation_id

    async def get(self, evaluation_id: str) -> dict[str, Any]:
        """Return an evaluation as JSON, with the scores that came so far.

        Raises:
            NotFoundError: There is none.
        """
        return await asyncio.to_thread(self._get, evaluation_id)

    async def run(self) -> None:
        """Watch evaluations until cancelled."""
        while True:
            for evaluation_id in await asyncio.to_thread(self._unfinished):
                await asyncio.to_thread(self.advance, evaluation_id)
            try:
                async with asyncio.timeout(self._config.tick_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()

    def advance(self, evaluation_id: str) -> None:
        """End one evaluation if it is over; nudge those who have not answered if it is not."""
        now_ms = self._clock()
        with self._store.begin() as session:
            evaluation = session.get_one(Evaluation, evaluation_id)
            tasks = session.scalars(select(Task).where(Task.owner_id == evaluation_id)).all()
            verdict = rules.judge(
                (task.state for task in tasks),
                now_ms=now_ms,
                deadline_ms=evaluation.deadline_ms,
                reports_min=1,
            )
            mute = [task.device_id for task in tasks if task.state == TaskState.OFFERED]
            names = session.scalars(select(Device.name).where(Device.id.in_(mute))).all()
            if verdict is not Verdict.WAIT:
                event = RunEvent.ANSWERED if verdict is Verdict.CLOSE else RunEvent.GAVE_UP
                evaluation.state = rules.evaluation_after(evaluation.state, event)
                for task in tasks:
                    if task.state == TaskState.OFFERED:
                        task.state = rules.task_after(task.state, TaskEvent.ROUND_CLOSED)
                        task.changed_ms = now_ms
        if verdict is not Verdict.WAIT:
            self._nudged_ms.pop(evaluation_id, None)
        elif now_ms - self._nudged_ms.get(evaluation_id, 0) >= self._config.nudge_s * 1000:
            self._nudged_ms[evaluation_id] = now_ms
            for name in names:
                self._nudge(name, "tasks")

    def _unfinished(self) -> Sequence[str]:
        with self._store.read() as session:
            query = select(Evaluation.id).where(Evaluation.state == RunState.RUNNING)
            return session.scalars(query).all()

    def _get(self, evaluation_id: str) -> dict[str, Any]:
        with self._store.read() as session:
            evaluation = session.get(Evaluation, evaluation_id)
            if evaluation is None:
                raise NotFoundError(f"there is no evaluation {evaluation_id:.40}")
            query = (
                select(Task, Device.name)
                .join(Device, Device.id == Task.device_id)
                .where(Task.owner_id == evaluation_id)
                .order_by(Device.name)
            )
            rows = [(task, name) for task, name in session.execute(query)]
        answered = [(task, name) for task, name in rows if task.state == TaskState.REPORTED]
        scores = [
            {"device": name, **score} for task, name in answered for score in task.result["scores"]
        ]
        return {
            "evaluation_id": evaluation.id,
            "state": evaluation.state,
            "split": evaluation.split,
            "asked": evaluation.devices,
            "devices": [name for _, name in answered],
            "failures": [
                {"device": name, **task.result}
                for task, name in rows
                if task.state == TaskState.FAILED
            ],
            "scores": scores,
            "bundles": [_total(sha256, scores) for sha256 in evaluation.bundles],
        }


def _total(sha256: str, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the score of a bundle over all devices; shares are None without a window."""
    own = [each for each in scores if each["bundle_sha256"] == sha256]
    windows, correct = (sum(each[name] for each in own) for name in ("windows", "correct"))
    return {
        "bundle_sha256": sha256,
        "devices": len(own),
        "windows": windows,
        "correct": correct,
        "accuracy": correct / windows if windows else None,
        "loss_mean": sum(each["loss_sum"] for each in own) / windows if windows else None,
    }
