"""Reach the server through a shared-memory ring.

A plan is the header of a request, made at the first call of a model and used as long as arrays
of the same dtypes and shapes come; then a call is ``post``, ``wait``, ``read``, all in C.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from ...ext import ring
from ...ext.ring import Kind, Plan, Port, Status
from .errors import (
    ClientError,
    ClientInputError,
    DeadlineError,
    OverloadedError,
    RingFullError,
    ServerFailedError,
    ServerGoneError,
    UnknownModelError,
)
from .tensors import Typed, array, dtype_of, typed

SPIN_US: Final = 50  # a small model has answered by then; waking up takes about as long
LOOK_NS: Final = 50_000_000  # between two looks whether the server lives: 20 us each
PLANS_MAX: Final = 64  # of each kind; beyond it they are made anew

_ERRORS: Final[Mapping[int, type[ClientError]]] = {
    Status.BAD_REQUEST: ClientInputError,
    Status.TOO_LARGE: ClientInputError,
    Status.UNKNOWN_MODEL: UnknownModelError,
    Status.OVERLOADED: OverloadedError,
    Status.DEADLINE: DeadlineError,
    Status.INTERNAL: ServerFailedError,
}

Key = tuple[str, str, tuple[str, ...]]


class RingWay:
    """A slot of a ring, taken at the first call; see ``Client`` for what is said of it."""

    def __init__(self, name: str, spin_us: int | None, folder: Path) -> None:
        self._name = name
        self._folder = folder
        if spin_us is None:
            spin_us = SPIN_US if len(os.sched_getaffinity(0)) > 1 else 0
        self._spin_ns = spin_us * 1000
        self._lock = threading.Lock()
        self._file: ring.RingFile | None = None
        self._port: Port | None = None
        self._plans: dict[Key, Plan] = {}
        self._exact: dict[Any, Plan] = {}
        self._ndarray: Any = None

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        outputs: tuple[str, ...],
        version: str,
        timeout_s: float,
        priority: int,
    ) -> dict[str, Any]:
        """Run a model on arrays."""
        if self._ndarray is None:
            import numpy as np

            self._ndarray = np.ndarray
        until_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        with self._lock:
            plan = self._plans.get((model, version, outputs))
            port = self._ready(until_ns)
            if plan is None or not self._fits(port, plan, inputs, until_ns, priority):
                given = {name: typed(name, value) for name, value in inputs.items()}
                port, plan = self._post(model, version, given, outputs, until_ns, priority)
                if all(each.format for each in given.values()):
                    if len(self._plans) >= PLANS_MAX:
                        self._plans.clear()
                    self._plans[model, version, outputs] = plan
            found = self._read(port, plan, until_ns, self._ndarray)
        for name, value in found.items():
            if type(value) is tuple:  # of a type that has no dtype
                found[name] = array(name, *value)
        return cast("dict[str, Any]", found)

    def infer_typed(
        self,
        model: str,
        inputs: Mapping[str, Typed],
        outputs: tuple[str, ...],
        version: str,
        timeout_s: float,
        priority: int,
    ) -> dict[str, tuple[int, tuple[int, ...], bytearray]]:
        """Run a model on bytes."""
        until_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        with self._lock:
            port, plan = self._post(model, version, inputs, outputs, until_ns, priority)
            found = self._read(port, plan, until_ns, None)
        return cast("dict[str, tuple[int, tuple[int, ...], bytearray]]", found)

    def models(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return what the server has."""
        return cast("list[dict[str, Any]]", self._ask(Kind.MODELS, "", "", timeout_s))

    def metadata(self, model: str, version: str, timeout_s: float) -> dict[str, Any]:
        """Return what a model takes and gives."""
        return cast("dict[str, Any]", self._ask(Kind.METADATA, model, version, timeout_s))

    def close(self) -> None:
        """Give the slot back. One whose request still runs is reclaimed when this process ends."""
        with self._lock:
            self._drop()

    def _ask(self, kind: Kind, model: str, version: str, timeout_s: float) -> Any:
        until_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        with self._lock:
            port = self._ready(until_ns)
            plan = _planned(kind, model, version, [], (), port.request_bytes)
            port.post(plan, {}, until_ns, 0)
            text = self._read(port, plan, until_ns, None)
        try:
            return json.loads(text)
        except ValueError as exc:
            raise ServerFailedError(f"the server answered what is no JSON: {exc}") from exc

    def _ready(self, until_ns: int) -> Port:
        """Return a slot in which nothing is in flight, of a server that did not say goodbye."""
        port = self._port
        if port is not None and (not port.mine or port.closed):
            self._drop()
            port = None
        if port is None:
            port = self._connect()
        while port.in_flight and not port.withdraw():
            self._sleep(port, until_ns, "an earlier call of this client still runs")
        return port

    def _connect(self) -> Port:
        try:
            file = ring.attach(self._name, folder=self._folder)
        except ring.RingMissingError as exc:
            raise ServerGoneError(str(exc), hint=exc.hint) from exc
        except (ring.RingNameError, ring.RingFormatError) as exc:
            raise ClientInputError(str(exc), hint=exc.hint) from exc
        port = Port(*file.arguments)
        if not port.claim(ring.me()):
            port.detach()
            file.close()
            raise RingFullError(
                f"the ring {self._name!r} has its {file.sizes.clients_max} clients",
                hint="serve with more --shm-clients, or close clients",
            )
        self._file, self._port = file, port
        self._plans.clear()  # they were made for the sizes of another ring
        self._exact.clear()
        return port

    def _drop(self) -> None:
        port, file = self._port, self._file
        self._port = self._file = None
        if port is not None:
            port.release()
            port.detach()
        if file is not None:
            file.close()

    def _fits(
        self, port: Port, plan: Plan, inputs: Mapping[str, Any], until_ns: int, priority: int
    ) -> bool:
        """Post by a plan; False, with nothing posted, if the inputs are not the plan's."""
        if len(inputs) != len(plan.names):
            return False
        try:
            return port.post(plan, inputs, until_ns, priority) < 0
        except (KeyError, BufferError, TypeError, ValueError):
            return False  # the long way says what is wrong with it

    def _post(
        self,
        model: str,
        version: str,
        given: Mapping[str, Typed],
        outputs: tuple[str, ...],
        until_ns: int,
        priority: int,
    ) -> tuple[Port, Plan]:
        port = self._ready(until_ns)
        rows = [(name, t.type, t.shape, t.size, t.format) for name, t in given.items()]
        key = (model, version, outputs, tuple(rows))
        plan = self._exact.get(key)
        if plan is None:
            plan = _planned(Kind.INFER, model, version, rows, outputs, port.request_bytes)
            if len(self._exact) >= PLANS_MAX:
                self._exact.clear()
            self._exact[key] = plan
        wrong = port.post(plan, {n: t.data for n, t in given.items()}, until_ns, priority)
        if wrong >= 0:
            raise ClientInputError(f"the input {plan.names[wrong]!r} changed while it was sent")
        return port, plan

    def _read(self, port: Port, plan: Plan, until_ns: int, ndarray: Any) -> Any:
        dtypes: Callable[[int], Any] = dtype_of if ndarray is not None else _no_dtype
        if not port.wait(self._spin_ns, 0):
            while not port.wait(0, max(0, min(LOOK_NS, until_ns - time.monotonic_ns()))):
                self._look(port, until_ns, "no answer came in time")
        try:
            status, found = port.read(plan, ndarray, dtypes)
        except ring.AnswerError as exc:
            raise ServerFailedError(f"the answer in the ring is malformed: {exc}") from exc
        if status:
            raise _ERRORS.get(status, ServerFailedError)(found)
        return found

    def _sleep(self, port: Port, until_ns: int, late: str) -> None:
        port.wait(0, max(0, min(LOOK_NS, until_ns - time.monotonic_ns())))
        if not port.withdraw():
            self._look(port, until_ns, late)

    def _look(self, port: Port, until_ns: int, late: str) -> None:
        """Raise if the server is gone or the time is over."""
        assert self._file is not None
        if port.closed or not ring.alive(self._file.server):
            self._drop()
            raise ServerGoneError(
                f"the server of the ring {self._name!r} ended before it answered",
                hint="the next call connects again",
            )
        if time.monotonic_ns() >= until_ns:
            port.withdraw()
            raise DeadlineError(late, hint="raise timeout_s, or see what the server does")


def _no_dtype(_: int) -> None:
    return None


def _planned(
    kind: Kind,
    model: str,
    version: str,
    rows: list[tuple[str, int, tuple[int, ...], int, str]],
    outputs: tuple[str, ...],
    request_bytes: int,
) -> Plan:
    try:
        return Plan(kind, model, version, rows, outputs, request_bytes)
    except ValueError as exc:
        raise ClientInputError(str(exc), hint="serve with more --shm-request-bytes") from exc
