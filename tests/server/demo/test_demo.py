"""The loop, end to end, with real processes: it closes, and kill -9 in the middle does not hurt.

Fewer devices and rounds than `make demo`, so that the suite stays short; the same code, the same
broker, the same checks. What is killed is found by its command line below the demo's own folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.story, pytest.mark.timeout(900)]


def run_demo(state: Path, report: Path, *extra: str) -> subprocess.Popen[str]:
    """Start a headless demo."""
    return subprocess.Popen(
        [
            sys.executable, "-X", "faulthandler", "-m", "shoal.server.cli", "demo",
            "--no-console", "--seconds", "20",
            "--state", str(state), "--report", str(report), *extra,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def evidence(state: Path, said: list[str]) -> str:
    """Return what the demo said, which of its processes live, and how their logs end."""
    alive = [
        command
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and str(state) in (command := _command(int(entry.name)))
    ]
    logs = [
        f"== {log.relative_to(state)}\n{log.read_bytes()[-1500:].decode(errors='replace')}"
        for log in sorted([*state.glob("*.log"), *state.glob("*/*.log")])
    ]
    return "\n".join(["".join(said), "== alive", *alive, *logs])


def process_of(state: Path, *words: str) -> int | None:
    """Return the id of a process of this demo whose command line has all the words."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                ours = str(state) in command or str(state) in _command(int(parent))
            except OSError:
                continue
            if ours and all(word in command for word in words):
                return int(entry.name)
    return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has just ended
        return ""


def check(found: dict[str, Any], *, devices: int) -> None:
    """Whatever happened on the way, these hold when the loop has closed."""
    records = found["records"]
    assert records["lost"] == records["quarantined"] == 0
    assert records["produced"] == records["stored"] + records["spooled"] > 100
    assert found["rollout"]["state"] == "completed"
    assert found["rollout"]["confirmed"] == devices
    assert found["drift"]["devices"] and found["drift"]["detected_after_windows"] > 0
    assert set(found["drift"]["devices"]) <= {each["device"] for each in found["people"]}
    for group in ("known", "unseen"):
        assert 0 < found["accuracy"][group]["before"] <= 1
        assert 0 < found["accuracy"][group]["after"] <= 1
    assert found["accuracy"]["unseen"]["after"] > found["accuracy"]["unseen"]["before"]
    assert found["windows"]["answered"] == found["windows"]["offered"] > 0
    assert 20 < found["agent"]["rss_mb_max"] < 1000
    assert found["bytes_up_per_device"] > 1000


def test_the_loop_closes_although_everything_dies_once(tmp_path: Path) -> None:
    """Kill -9 of an agent, of the broker and of the server, each in the middle of something."""
    state, report = tmp_path / "s", tmp_path / "report.json"
    demo = run_demo(state, report, "--devices", "6", "--rounds", "15", "--seed", "2")
    said: list[str] = []
    assert demo.stdout is not None

    def listen(stream: Any) -> None:
        said.extend(stream)

    listening = threading.Thread(target=listen, args=(demo.stdout,))
    listening.start()
    killed: set[str] = set()
    victims = {
        "[4/8]": ("agent", ("shoal.agent.main", "wrist-02")),
        "windows per device": ("broker", ("shoal.server.broker",)),
        "[5/8]": ("server", ("shoal.server.cli server run",)),
        "[7/8]": ("canary", ("shoal.agent.main", "wrist-01")),
    }
    try:
        deadline = time.monotonic() + 600
        while demo.poll() is None and time.monotonic() < deadline:
            text = "".join(said)
            for mark, (name, words) in victims.items():
                if name not in killed and mark in text:
                    pid = process_of(state, *words)
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                        killed.add(name)
            time.sleep(0.1)
    finally:
        hung = demo.poll() is None
        where = evidence(state, said) if hung else ""
        if hung:  # faulthandler tells where each thread stands; the children end with it
            demo.send_signal(signal.SIGABRT)
        demo.wait()
        listening.join()
        demo.stdout.close()
    assert not hung, f"{where}\n{''.join(said)}"
    found = json.loads(report.read_text())
    assert found["closed"], f"{found['failures']}\n{evidence(state, said)}"
    check(found, devices=6)
    assert killed == {"agent", "broker", "server", "canary"}, evidence(state, said)
    assert sum(each["restarts"] for each in found["processes"].values()) >= len(killed)
    assert "operators: shoal --state" in (state / "server.log").read_text()
    assert "wrist-02 of fleet" in (state / "wrist-02" / "agent.log").read_text()


def test_a_state_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    """The demo never mixes with what is there, and says what to do."""
    (tmp_path / "precious").write_text("data")
    demo = run_demo(tmp_path, tmp_path.parent / "report.json", "--devices", "2")
    out, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "is not empty" in out and "--state" in out
    assert (tmp_path / "precious").read_text() == "data"
