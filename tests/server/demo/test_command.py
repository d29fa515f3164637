"""The demo's own questions to its devices end, whatever the devices do."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from shoal.server.demo import command
from shoal.server.demo.command import Demo
from shoal.server.demo.people import Wearer
from shoal.server.demo.scenario import LoopError, Plan


def demo(root: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Demo:
    """Return a demo of two devices whose `shoal-agent status` is a shell script."""
    program = root / "status"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    return Demo(
        root=root, devices=2, seed=1, plan=Plan(), broker=None, console_port=None,
        display=cast(Any, None),
        wearers=(Wearer("wrist-01", 1, False), Wearer("wrist-02", 2, True)),
    )  # fmt: skip


def test_each_device_is_asked_for_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its command prints is what the report is made of."""
    made = demo(tmp_path, monkeypatch, """echo '{"totals": {"produced": 3}}'""")
    asyncio.run(made._count())
    assert made._counts == {name: {"produced": 3} for name in ("wrist-01", "wrist-02")}


def test_a_status_that_never_comes_ends_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which device, and leaves no process."""
    made = demo(tmp_path, monkeypatch, f"echo $$ >> {tmp_path / 'pids'}\nexec sleep 600")

    async def story() -> None:
        asking = asyncio.create_task(made._count())
        while not asking.done() and len(_pids(tmp_path)) < 2:
            await asyncio.sleep(0.01)
        await asking

    monkeypatch.setattr(command, "STATUS_S", 3.0)
    with pytest.raises(LoopError, match=r"the status of wrist-0[12] took more than 3 s"):
        asyncio.run(story())
    assert _pids(tmp_path)
    assert [pid for pid in _pids(tmp_path) if Path(f"/proc/{pid}").exists()] == []


def test_a_status_that_fails_names_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own words are in its log."""
    made = demo(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(LoopError, match=r"the status of wrist-0[12] could not be read"):
        asyncio.run(made._count())


def _pids(root: Path) -> list[str]:
    path = root / "pids"
    return path.read_text().split() if path.exists() else []
