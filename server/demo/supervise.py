"""Keep the demo's processes alive: what dies is started again, what is ours ends with us.

A child is a real process with a state directory and a log of its own. Children die with this
process even when it is killed (PR_SET_PDEATHSIG), so that a cancelled demo leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

RESTART_S_MIN: Final = 0.2
RESTART_S_MAX: Final = 5.0
STABLE_S: Final = 10.0  # a child that lived this long starts again at the shortest pause
# What a child does before it becomes the command: 1 is PR_SET_PDEATHSIG, and a parent that died
# before the call is seen after it. Not a preexec_fn: that runs Python in a copy of this process,
# where a lock that one of gRPC's threads held at the fork is never released, and we wait for it.
_TIED: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(slots=True)
class Child:
    """One supervised process."""

    name: str
    command: tuple[str, ...]
    log: Path
    restarts: int = 0
    rss_bytes_max: int = 0
    """Largest resident set seen, over all incarnations."""
    process: subprocess.Popen[bytes] | None = None
    _started_s: float = 0.0
    _pause_s: float = RESTART_S_MIN
    _again_s: float = field(default=0.0)


class Supervisor:
    """Starts, watches and ends children. Used from one event loop."""

    def __init__(self, *, on_restart: Callable[[str, int], None]) -> None:
        """Take a callback that hears (name, exit status) of each child that died."""
        self._children: dict[str, Child] = {}
        self._on_restart = on_restart
        self._ending = False

    def start(self, name: str, command: Sequence[str], *, log: Path) -> Child:
        """Start a child and keep it alive from now on."""
        child = Child(name, tuple(command), log)
        self._children[name] = child
        self._spawn(child)
        return child

    @property
    def children(self) -> tuple[Child, ...]:
        """Every child, in the order of start."""
        return tuple(self._children.values())

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            self.poll(time.monotonic())
            await asyncio.sleep(0.1)

    def poll(self, now_s: float) -> None:
        """Look once: note memory, see deaths, start again what is due."""
        for child in self._children.values():
            process = child.process
            if process is None:
                if now_s >= child._again_s and not self._ending:
                    self._spawn(child)
                continue
            status = process.poll()
            if status is None:
                child.rss_bytes_max = max(child.rss_bytes_max, rss_bytes(process.pid))
                continue
            child.process = None
            child.restarts += 1
            stable = now_s - child._started_s >= STABLE_S
            child._pause_s = RESTART_S_MIN if stable else min(RESTART_S_MAX, child._pause_s * 2)
            child._again_s = now_s + child._pause_s
            if not self._ending:
                self._on_restart(child.name, status)

    async def stop(self, names: Sequence[str], *, wait_s: float) -> None:
        """End children in good order: SIGTERM, then SIGKILL after ``wait_s`` seconds.

        A child that does not end with status 0 is told like one that died.
        """
        chosen = [self._children.pop(name) for name in names if name in self._children]
        alive = [child.process for child in chosen if child.process is not None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and any(each.poll() is None for each in alive):
            await asyncio.sleep(0.05)
        for child in chosen:
            if child.process is not None:
                if child.process.poll() is None:
                    child.process.kill()
                status = child.process.wait()
                if status and not self._ending:
                    self._on_restart(child.name, status)

    async def stop_all(self, *, wait_s: float = 10.0) -> None:
        """End every child, the last started first."""
        self._ending = True
        await self.stop([*reversed(self._children)], wait_s=wait_s)

    def _spawn(self, child: Child) -> None:
        with child.log.open("ab") as log:
            child.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *child.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo; it ends children in good order
            )
        child._started_s = time.monotonic()


def rss_bytes(pid: int) -> int:
    """Return the resident set of a process in bytes; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def tail(path: Path, *, lines: int = 5) -> str:
    """Return the last lines of a log, for an error message."""
    try:
        data: Any = path.read_bytes()[-4000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(data[-lines:])
