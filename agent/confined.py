"""Run one job in a process of its own and end it at a limit, whatever it does.

    parent --stdin: JSON--> child --pipe: u32 LE length + JSON--> parent
           --SIGKILL to its group--> at the wall-clock limit, at the resident-size limit, at the end

The child bounds its private memory and CPU time itself (``hw.trial_child``); what it cannot bound,
the clock and shared memory, is watched from here. A job that is stopped is a value, not an error:
its row in the table says what stopped it.

Not here: children that are kept warm for many jobs (``children``).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..hw.choice import Outcome
from .worker import LENGTH

ANSWER_BYTES_MAX: Final = 1 << 20
STDERR_BYTES_MAX: Final = 2000  # enough for the last words of a crash
LOOK_S: Final = 0.01  # between two looks at the resident size: 40 MB at the speed of zeroing pages
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
MEMORY_CODE: Final = "hw.trial.memory"


@dataclass(frozen=True, slots=True)
class Stop:
    """A job that gave no result."""

    outcome: Outcome
    reason: str
    hint: str = ""


def run(
    command: Sequence[str],
    request: Mapping[str, Any],
    *,
    pass_fds: Sequence[int] = (),
    wall_s: float,
    memory_bytes: int,
    threads: int = 1,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any] | Stop:
    """Run a job and return its answer, or what stopped it.

    Args:
        command: What to start; the arguments of ``hw.trial_child`` are added to it.
        request: What it reads from standard input.
        pass_fds: Descriptors it inherits under the same numbers.
        wall_s: It is killed after this many seconds.
        memory_bytes: Of its private memory, and of its resident size.
        threads: It may use as many CPU seconds per second.
        env: All of its environment; none by default, so no secret is in reach.
    """
    deadline = time.monotonic() + wall_s
    answers, answer_fd = os.pipe()
    try:
        process = subprocess.Popen(
            [
                *(*command, str(memory_bytes), str(int(wall_s * threads) + 2)),
                *(str(os.getpid()), str(answer_fd)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(*pass_fds, answer_fd),
            start_new_session=True,
            env=dict(env or {}),
        )
    except OSError as exc:
        os.close(answers)
        return Stop(Outcome.DIED, f"no process could be started: {exc.strerror}")
    finally:
        os.close(answer_fd)
    watch = _Watch(process, answers, deadline, wall_s, memory_bytes)
    try:
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        return watch.result()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it may have started
        process.wait()
        for stream in (process.stdin, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        os.close(answers)


class _Watch:
    """One running child."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        answers: int,
        deadline: float,
        wall_s: float,
        memory_bytes: int,
    ) -> None:
        assert process.stderr is not None
        self._process = process
        self._answers = answers
        self._errors = process.stderr.fileno()
        self._open = [answers, self._errors]
        self._deadline = deadline
        self._wall_s = wall_s
        self._memory_bytes = memory_bytes
        self._answer = bytearray()
        self._said = bytearray()

    def result(self) -> dict[str, Any] | Stop:
        """Wait for the answer, for the end of the process, or for a limit."""
        while True:
            ready, _, _ = select.select(self._open, [], [], LOOK_S)
            for fd in ready:
                self._take(fd)
            if len(self._answer) > LENGTH.size + ANSWER_BYTES_MAX:
                return Stop(Outcome.DIED, "it answered more than it may")
            if self._answers not in self._open and self._complete():
                return self._decode()
            if not ready and self._exited():
                return self._death()
            if time.monotonic() > self._deadline:
                return Stop(Outcome.TIME, f"it was stopped after {self._wall_s:.1f} s")
            if _resident(self._process.pid) > self._memory_bytes:
                return Stop(Outcome.MEMORY, self._beyond())

    def _take(self, fd: int) -> None:
        data = os.read(fd, 1 << 16)
        if not data:
            self._open.remove(fd)
        elif fd == self._answers:
            self._answer += data
        else:
            self._said += data
            del self._said[:-STDERR_BYTES_MAX]

    def _complete(self) -> bool:
        if len(self._answer) < LENGTH.size:
            return False
        (length,) = LENGTH.unpack_from(self._answer)
        return bool(len(self._answer) == LENGTH.size + length)

    def _decode(self) -> dict[str, Any] | Stop:
        try:
            answer = json.loads(self._answer[LENGTH.size :])
            if "ok" in answer:
                found: dict[str, Any] = answer["ok"]
                return found
            code, text = answer["error"]["code"], answer["error"]["text"]
            hint = answer["error"]["hint"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            return Stop(Outcome.DIED, f"it answered with garbage: {type(exc).__name__}")
        if code == MEMORY_CODE:
            return Stop(Outcome.MEMORY, f"{self._beyond()}: {text}")
        return Stop(Outcome.REFUSED, text, hint)

    def _exited(self) -> bool:
        # WNOWAIT: until it is reaped, its number and its group's are nobody else's.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def _death(self) -> Stop:
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        code = status.si_status if status else 0
        last = bytes(self._said).decode(errors="replace").strip()[-300:]
        if status is None or status.si_code == os.CLD_EXITED:
            return Stop(Outcome.DIED, f"it ended with status {code}. {last}".strip())
        if code == signal.SIGXCPU:
            return Stop(Outcome.TIME, "it used more CPU time than it may")
        if code == signal.SIGKILL:  # not ours: we stopped looking
            return Stop(Outcome.MEMORY, "the kernel killed it, most likely for want of memory")
        if "alloc" in last or "MemoryError" in last:
            return Stop(Outcome.MEMORY, f"{self._beyond()}: {last}")
        return Stop(Outcome.DIED, f"it died of {signal.Signals(code).name}. {last}".strip())

    def _beyond(self) -> str:
        return f"it wanted more than its {self._memory_bytes >> 20} MiB"


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
