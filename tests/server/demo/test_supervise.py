"""The supervisor: what dies is started again, what is ours ends with us. Real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.server.demo.supervise import Supervisor, rss_bytes, tail

SLEEPER = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")


async def until(true: Callable[[], bool]) -> None:
    """Wait for a condition, ten seconds at most."""
    for _ in range(200):
        if true():
            return
        await asyncio.sleep(0.05)
    pytest.fail("the condition never came true")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_dies_is_started_again(tmp_path: Path) -> None:
    """Kill -9 is noticed, told, and mended; the log shows both lives."""

    async def story() -> None:
        told: list[tuple[str, int]] = []
        supervisor = Supervisor(on_restart=lambda name, status: told.append((name, status)))
        child = supervisor.start("sleeper", SLEEPER, log=tmp_path / "log")
        watching = asyncio.create_task(supervisor.run())
        await until(lambda: tail(tmp_path / "log") == "up")
        assert child.process is not None
        first = child.process.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: tail(tmp_path / "log") == "up\nup")
        assert told == [("sleeper", -signal.SIGKILL)]
        assert child.restarts == 1
        assert child.process is not None and child.process.pid != first
        second = child.process.pid
        await until(lambda: child.rss_bytes_max > 1_000_000)
        await supervisor.stop_all(wait_s=5)
        watching.cancel()
        assert not alive(second)
        assert rss_bytes(second) == 0

    asyncio.run(story())


def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """A stop ends in bounded time."""
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\n"

    async def story() -> None:
        supervisor = Supervisor(on_restart=lambda name, status: None)
        child = supervisor.start(
            "stubborn",
            (sys.executable, "-c", f"{stubborn}while True: time.sleep(60)"),
            log=tmp_path / "log",
        )
        await until(lambda: tail(tmp_path / "log") == "up")
        assert child.process is not None
        pid = child.process.pid
        await supervisor.stop(["stubborn"], wait_s=0.2)
        assert not alive(pid)
        assert supervisor.children == ()

    asyncio.run(story())


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    """Even kill -9 of the demo leaves no process behind."""
    program = f"""
import asyncio
from pathlib import Path
from shoal.server.demo.supervise import Supervisor
async def main():
    supervisor = Supervisor(on_restart=lambda name, status: None)
    child = supervisor.start("sleeper", {SLEEPER!r}, log=Path({str(tmp_path / "log")!r}))
    print(child.process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline_s = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_lock_held_at_the_fork_stops_nobody(tmp_path: Path) -> None:
    """No Python of ours runs between fork and exec, where other threads' locks stay locked.

    The hook stands for a library that waits for such a lock; it is inherited by every fork that
    runs Python in the child.
    """
    program = f"""
import os, threading
from pathlib import Path
from shoal.server.demo.supervise import Supervisor
lock = threading.Lock()
lock.acquire()
os.register_at_fork(after_in_child=lock.acquire)
supervisor = Supervisor(on_restart=lambda name, status: None)
child = supervisor.start("sleeper", {SLEEPER!r}, log=Path({str(tmp_path / "log")!r}))
print("started", flush=True)
child.process.kill()
child.process.wait()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        try:
            out, _ = parent.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(parent.pid, signal.SIGKILL)
            raise
    assert out == b"started\n" and parent.returncode == 0
