"""Serve models through a shared-memory ring.

    take --slot--> request --InferRequest--> Core.infer --InferResponse--> answer

    ring threads   take, run and answer, one request at a time each
    reaper         frees the slots of dead clients, rings for requests whose bell was lost

Rule 1: a slot that was taken is answered, whatever happens.
Rule 2: what a client writes may be anything: ``ext/_ring`` checks it, and a malformed request is
        an answer like any other.
Rule 3: memory is unmapped only when no thread of ours can be in it; else it stays until the end.

Models, queues and deadlines are the core's: a call that nothing is before runs in the ring's own
thread. The inputs are views of shared memory; the core keeps them no longer than the request.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ... import ShoalError
from ...ext import ring
from ...ext.ring import Kind, Status
from ..errors import ModelClosedError
from .errors import RequestError
from .oip import InferInput, InferRequest, InferResponse, WantedOutput

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

# By the code of an error; the rest is INTERNAL, or OVERLOADED if a retry may help.
STATUS: Final[Mapping[str, Status]] = {
    "agent.local.model.unknown": Status.UNKNOWN_MODEL,
    "agent.local.request": Status.BAD_REQUEST,
    "agent.model.input": Status.BAD_REQUEST,
    "ext.ring.request": Status.BAD_REQUEST,
    "agent.local.overload": Status.OVERLOADED,
    "agent.model.closed": Status.OVERLOADED,
    "agent.local.deadline": Status.DEADLINE,
}

# The ring's number of a type, which is ONNX's, and the protocol's datatype.
STRING: Final = 8
DATATYPES: Final[Mapping[int, str]] = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES",
    9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip
NUMBERS: Final = {name: number for number, name in DATATYPES.items()}

STOPPED: Final = -2  # of Server.take
IDLE_NS: Final = 200_000_000  # a sleeping thread looks by itself: a hostile client may hide a bell


class Lane(Protocol):
    """A request that was checked once and comes again with other bytes at the same place."""

    datatypes: Mapping[str, str]
    """Of each output."""

    def run(self) -> Mapping[str, tuple[tuple[int, ...], Buffer]] | None:
        """Run it in this thread; None if something is before it, and it must wait its turn."""


class Core(Protocol):
    """What this face needs of the local core; used by several threads at once."""

    def infer(self, request: InferRequest, *, left_s: float | None) -> InferResponse:
        """Run a model; blocks until it has run, is refused, or ``left_s`` seconds are over."""

    def repository_index(self, *, ready: bool) -> list[Mapping[str, Any]]:
        """Return name, version, state and reason of each model."""

    def model_metadata(self, name: str, version: str) -> Mapping[str, Any]:
        """Return name, versions, platform, inputs, outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingConfig:
    """How a ring is served. It takes clients_max * (request + response) bytes of /dev/shm."""

    clients_max: int = 32
    """Clients at a time, 1 to 1024."""

    request_bytes: int = 768 << 10
    """For the inputs of one call; a multiple of 64."""

    response_bytes: int = 256 << 10
    """For the outputs of one call; a multiple of 64."""

    threads: int = 4
    """Requests that run, or wait in the core's queues, at a time, 1 to 256."""

    spin_us: int | None = None
    """How long a thread that answered looks for the next request before it sleeps, microseconds,
    0 to 1000; None is 50, or 0 where there is one core."""

    reap_s: float = 1.0
    """Between two looks for dead clients, seconds, 0.01 to 60."""

    def __post_init__(self) -> None:
        """Refuse what cannot be served."""
        if not 1 <= self.threads <= 256:
            raise ValueError(f"threads must be 1 to 256, not {self.threads}")
        if self.spin_us is not None and not 0 <= self.spin_us <= 1000:
            raise ValueError(f"spin_us must be 0 to 1000, not {self.spin_us}")
        if not 0.01 <= self.reap_s <= 60:
            raise ValueError(f"reap_s must be 0.01 to 60, not {self.reap_s}")
        _ = self.sizes

    @property
    def sizes(self) -> ring.RingSizes:
        """What the file has room for."""
        return ring.RingSizes(
            clients_max=self.clients_max,
            request_bytes=self.request_bytes,
            response_bytes=self.response_bytes,
        )

    @property
    def spin_ns(self) -> int:
        """``spin_us`` on this machine, in nanoseconds."""
        if self.spin_us is not None:
            return self.spin_us * 1000
        return 50_000 if len(os.sched_getaffinity(0)) > 1 else 0


class RingFront:
    """The ring's face of a core. States: new -> serving -> stopped; each once.

    Args:
        core: Answers the calls.
        name: Of the ring; clients give it.
        config: How large, how many threads.
        lane: Checks a request that will come again and returns how to run it; the core's, if it
            has one. Without it each call is checked anew, which takes longer than a small model.
        folder: A tmpfs.

    Raises:
        ring.RingNameError: No such name, or it is of a file that is no ring; nothing was made.
        ring.RingTakenError: A living server has that name; likewise.
        OSError: The tmpfs has no room; likewise.
    """

    def __init__(
        self,
        core: Core,
        name: str,
        config: RingConfig,
        *,
        lane: Callable[[InferRequest], Lane] | None = None,
        folder: Path = ring.SHM,
    ) -> None:
        self._core = core
        self._lane = lane
        self._config = config
        self._file = ring.create(name, config.sizes, folder=folder)
        self._server = ring.Server(*self._file.arguments)
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, name=f"ring-{i}", daemon=True)
            for i in range(config.threads)
        ]
        self._reaper = threading.Thread(target=self._reap, name="ring-reaper", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        for thread in (*self._threads, self._reaper):
            thread.start()

    def stop(self, drain_s: float) -> None:
        """Take no more, let what runs end for ``drain_s`` seconds, tell every client, unmap.

        A second call does nothing.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._server.stop()
        until = time.monotonic() + drain_s
        started = [each for each in (*self._threads, self._reaper) if each.ident is not None]
        for thread in started:
            thread.join(max(0.0, until - time.monotonic()))
        self._server.close()
        if any(thread.is_alive() for thread in started):
            _log.warning("a model did not end in %.1f s; its client is told so", drain_s)
            self._file.unlink()  # rule 3: the memory stays
            return
        self._server.detach()
        self._file.close(remove=True)

    def _serve(self) -> None:
        spin_ns = 0
        while True:
            slot = self._server.take(spin_ns, IDLE_NS)
            if slot == STOPPED:
                return
            if slot < 0:
                spin_ns = 0  # nobody asks: sleep at once the next time
                continue
            spin_ns = self._config.spin_ns
            try:
                self._answer(slot)
            except ShoalError as exc:
                text = f"{exc}; {exc.hint}" if exc.hint else str(exc)
                kept = Status.OVERLOADED if exc.retry else Status.INTERNAL
                self._server.answer_text(slot, STATUS.get(exc.code, kept), text)
            except Exception as exc:
                _log.exception("a request in the ring failed")
                text = f"internal error: {type(exc).__name__}; see the server's log"
                self._server.answer_text(slot, Status.INTERNAL, text)

    def _answer(self, slot: int) -> None:
        server = self._server
        request = server.request(slot)
        if request.kind == Kind.INFER:
            left_s = None
            if request.deadline_ns:
                left_s = (request.deadline_ns - time.monotonic_ns()) / 1e9
                if left_s <= 0:
                    server.answer_text(
                        slot, Status.DEADLINE, "the deadline was over before the model could run"
                    )
                    return
            if self._stopping.is_set():
                server.answer_text(slot, Status.OVERLOADED, "the server is stopping")
                return
            needed = server.answer(slot, self._run(request, left_s))
            if needed:
                server.answer_text(
                    slot,
                    Status.TOO_LARGE,
                    f"the outputs take {needed} bytes, the ring has room for "
                    f"{server.response_bytes}; ask for fewer, or serve with more "
                    "--shm-response-bytes",
                )
            return
        facts: Any
        if request.kind == Kind.MODELS:
            facts = self._core.repository_index(ready=False)
        else:
            facts = self._core.model_metadata(request.model, request.revision)
        text = json.dumps(facts)
        if len(text.encode()) > server.response_bytes:
            server.answer_text(slot, Status.TOO_LARGE, "the answer is larger than response_bytes")
        else:
            server.answer_text(slot, Status.OK, text)

    def _run(
        self, request: ring.Request, left_s: float | None
    ) -> list[tuple[str, int, tuple[int, ...], Buffer]]:
        asked: _Asked | None = request.prepared
        if asked is None or request.priority:
            asked = _Asked(request)
            # While a client asks the same way, only the bytes in its slot change. A copy of
            # strings, and a priority, are of one call.
            if not request.priority and STRING not in request.types.values():
                if self._lane is not None:
                    asked.lane = self._lane(asked.request)
                request.prepared = asked
        if asked.lane is not None:
            try:
                found = asked.lane.run()
            except ModelClosedError:  # it was loaded anew, or is gone: infer knows
                request.prepared = None
                found = None
            if found is not None:
                datatypes = asked.lane.datatypes
                return [(n, NUMBERS[datatypes[n]], *value) for n, value in found.items()]
        outputs = self._core.infer(asked.request, left_s=left_s).outputs
        return [
            (each.name, NUMBERS[each.datatype], each.shape, each.data)
            for each in outputs
            if each.data is not None  # None is only for regions, which a ring does not ask for
        ]

    def _reap(self) -> None:
        while not self._stopping.wait(self._config.reap_s):
            for slot, owner in self._server.owners():
                if not ring.alive(owner) and self._server.reclaim(slot, owner):
                    _log.info("freed slot %d: its client %d ended", slot, owner & 0xFFFFFFFF)
            self._server.sweep()


class _Asked:
    """A request of a slot in the core's terms, and the lane for its repetition."""

    __slots__ = ("lane", "request")

    def __init__(self, request: ring.Request) -> None:
        self.lane: Lane | None = None
        inputs = []
        for name, (shape, data) in request.inputs.items():
            datatype = DATATYPES.get(request.types[name])
            if datatype is None:
                raise RequestError(f"the input {name!r} is of the type {request.types[name]}")
            inputs.append(InferInput(name, datatype, shape, data, None))
        self.request = InferRequest(
            request.model,
            request.revision,
            tuple(inputs),
            tuple(WantedOutput(name, None, 0) for name in request.outputs or ()),
            {"priority": request.priority} if request.priority else {},
        )
