"""Keep a child process for untrusted or heavy work, and end it when it breaks a bound.

    new -> running -> (died | killed) -> running -> ... -> closed

The child starts with the first job and is kept warm; it is ended after ``idle_s`` without a job,
killed when a job takes longer than it may, and started again for the job after that. Whatever
happens in it, the caller gets an answer or a typed error, and this process lives on.

Not here: what the child does (``jobs``) and how it confines itself (``worker``).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import msgpack

from .errors import AgentError
from .worker import LENGTH

STDERR_BYTES_MAX: Final = 2000  # enough for the last words of a crash


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildConfig:
    """What the child process may use."""

    memory_bytes_max: int = 2 << 30
    """Address space; onnxruntime's own libraries take about a quarter of a GiB of it."""
    wall_s_max: float = 60.0
    """Seconds per job by the clock; the child is killed beyond it."""
    cpu_s_max: int = 60
    """CPU seconds per job."""
    answer_bytes_max: int = 256 << 20
    """Size of an answer; a delta is as long as the parameters."""
    idle_s: float = 30.0
    """The child is ended after this many seconds without a job, and its memory is free."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.memory_bytes_max < 512 << 20:
            raise ValueError("memory_bytes_max must be at least 512 MiB")
        if not 0 < self.wall_s_max <= 86_400 or not 1 <= self.cpu_s_max <= 86_400:
            raise ValueError("wall_s_max and cpu_s_max must be up to 86400 s")
        if not 1 << 16 <= self.answer_bytes_max <= 2 << 30 or self.idle_s < 0:
            raise ValueError("answer_bytes_max must be 64 KiB to 2 GiB, idle_s at least 0")


class ChildError(AgentError):
    """The job did not finish; there is no result. The child is started again for the next job."""

    code = "agent.child"


class ChildDiedError(ChildError):
    """The child process died in the middle of the job."""

    code = "agent.child.died"


class ChildTimeoutError(ChildError):
    """The job took longer than it may; the child was killed."""

    code = "agent.child.timeout"


class ResourceLimitError(ChildError):
    """The job asked for more memory than it may have."""

    code = "agent.child.resource_limit"


class JobRefusedError(ChildError):
    """The job said no; ``reason`` is its own code."""

    code = "agent.child.refused"

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Child:
    """One child process, started when needed. Jobs wait for each other. A context manager."""

    def __init__(self, *, config: ChildConfig | None = None) -> None:
        self._config = config or ChildConfig()
        self._one = asyncio.Lock()
        self._pipes: _Pipes | None = None
        self._idle: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while there is none."""
        return self._pipes.pid if self._pipes and not self._pipes.exited.done() else None

    async def call(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Run a job and return its answer.

        Args:
            job: A name of ``jobs.JOBS``.
            arguments: Its arguments: text, numbers, bytes, lists and maps of them.

        Raises:
            JobRefusedError: The job's own error.
            ResourceLimitError: It asked for too much memory.
            ChildTimeoutError: It took too long.
            ChildDiedError: The process died, e.g. of a native crash or of the CPU limit.
        """
        async with self._one:
            if self._idle:
                self._idle.cancel()
            pipes = await self._running()
            request = {"job": job, "cpu_s": self._config.cpu_s_max, **arguments}
            try:
                async with asyncio.timeout(self._config.wall_s_max):
                    answer = await pipes.exchange(msgpack.packb(request))
            except TimeoutError as exc:
                await self._end()
                raise ChildTimeoutError(
                    f"job {job} took longer than {self._config.wall_s_max:g} s and was killed"
                ) from exc
            except BaseException:
                await self._end()
                raise
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self._config.idle_s, pipes.transport.kill)
            return _result(answer)

    async def close(self) -> None:
        """End the child; a job that runs is given up."""
        if self._idle:
            self._idle.cancel()
        await self._end()

    async def __aenter__(self) -> Child:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _running(self) -> _Pipes:
        if self._pipes and self._pipes.exited.done():
            await self._end()
        if self._pipes is None:
            loop = asyncio.get_running_loop()
            _, protocol = await loop.subprocess_exec(
                lambda: _Pipes(self._config.answer_bytes_max),
                sys.executable, "-P", "-m", f"{__package__}.worker",
                str(self._config.memory_bytes_max), str(os.getpid()),
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # and no secrets
            )  # fmt: skip
            self._pipes = protocol
        return self._pipes

    async def _end(self) -> None:
        pipes, self._pipes = self._pipes, None
        if pipes is not None:
            pipes.transport.close()  # kills a process that still runs
            await asyncio.shield(pipes.exited)


async def self_test(
    path: Path, sha256: str = "", *, config: ChildConfig | None = None
) -> dict[str, Any]:
    """Test a bundle in a child of its own and return its facts; see ``jobs.self_test``.

    Raises:
        ChildError: It must not be activated; says why.
    """
    async with Child(config=config) as child:
        return await child.call("self_test", bundle=str(path), sha256=sha256)


def self_test_blocking(path: Path, *, config: ChildConfig | None = None) -> None:
    """Test a bundle whose digest the caller has verified, from a thread without an event loop.

    Raises:
        ChildError: It must not be activated; says why.
    """
    asyncio.run(self_test(path, config=config))


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    if "ok" in answer:
        found: dict[str, Any] = answer["ok"]
        return found
    code, text = str(answer["error"]["code"]), str(answer["error"]["text"])
    if code == ResourceLimitError.code:
        raise ResourceLimitError(text)
    raise JobRefusedError(code, text)


class _Pipes(asyncio.SubprocessProtocol):
    """The frames of one child process."""

    def __init__(self, answer_bytes_max: int) -> None:
        self._answer_bytes_max = answer_bytes_max
        self._received = bytearray()
        self._said = bytearray()
        self._waiting: asyncio.Future[dict[str, Any]] | None = None
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.SubprocessTransport
        self.pid = 0

    async def exchange(self, request: bytes) -> dict[str, Any]:
        """Send a frame and return the answer to it."""
        self._waiting = asyncio.get_running_loop().create_future()
        if self.exited.done():
            self._fail(self._death())
        else:
            stdin = cast(asyncio.WriteTransport, self.transport.get_pipe_transport(0))
            stdin.write(LENGTH.pack(len(request)) + request)
        return await self._waiting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.SubprocessTransport, transport)
        self.pid = self.transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self._said += data
            del self._said[:-STDERR_BYTES_MAX]
            return
        self._received += data
        if len(self._received) < LENGTH.size:
            return
        (length,) = LENGTH.unpack_from(self._received)
        if length > self._answer_bytes_max:
            self._received.clear()
            self._fail(ChildDiedError(f"the child answered with {length} bytes, which is too much"))
        elif len(self._received) >= LENGTH.size + length:
            with memoryview(self._received) as view:
                answer = bytes(view[LENGTH.size : LENGTH.size + length])
            self._received.clear()
            self._finish(answer)

    def process_exited(self) -> None:
        self._fail(self._death())

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(self._death())
        if not self.exited.done():
            self.exited.set_result(None)

    def _finish(self, data: bytes) -> None:
        try:
            answer = msgpack.unpackb(data)
        except ValueError as exc:
            self._fail(ChildDiedError(f"the child answered with garbage: {exc}"))
            return
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(answer)

    def _fail(self, error: ChildError) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_exception(error)

    def _death(self) -> ChildError:
        code = self.transport.get_returncode()
        how = f"status {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        if code == -signal.SIGXCPU:
            return ChildTimeoutError("the job used more CPU time than it may and was killed")
        last = bytes(self._said).decode(errors="replace").strip()[-300:]
        return ChildDiedError(f"the child process died of {how}. {last}".strip())
