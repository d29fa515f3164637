"""What the agent's parts tell reaches the spool, or whoever told it hears that it did not.

Stories, with the real spool on a real disk; no network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from shoal.agent.app import App
from shoal.agent.config import AgentConfig
from shoal.agent.identity import Identity
from shoal.agent.monitor import MonitorConfig, WindowMonitor
from shoal.agent.profile import DeviceProfile
from shoal.agent.spool import SpoolConfig, SpoolFullError
from shoal.proto.errors import RecordError
from shoal.proto.records import Kind

SMALL = SpoolConfig(bytes_max=16 << 10, segment_bytes_max=4096, reserve_bytes=4096)
STEP = {
    "rollout": "r", "counter": 1, "model": "a" * 64, "state": "failed", "reason": "x" * 400,
}  # fmt: skip
EVENT = {"name": "n", "severity": "info", "text": "x" * 1000, "data": {}}  # longer than a STEP


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    """An agent whose spool is open; nothing of it runs."""
    config = AgentConfig(state_dir=tmp_path, spool=SMALL, hardware="bench")
    made = App(config, cast(Identity, None))
    made._spool.open()
    yield made
    made._spool.close()


def fill(app: App) -> None:
    """Fill the spool with what is never given up."""
    with pytest.raises(SpoolFullError):
        for _ in range(1000):
            app.tell(Kind.UPDATE, STEP)


def codes(app: App) -> list[str]:
    """Return the codes of the agent's warnings."""
    return [each.code for each in app._health.warnings()]


def test_a_refused_record_is_a_warning_and_no_crash(app: App) -> None:
    """Who cannot count it is not bothered; who can is told."""
    fill(app)
    app.emit(Kind.EVENT, EVENT)
    (warning,) = app._health.warnings()
    assert (warning.code, warning.severity) == ("spool.refused", "error")
    with pytest.raises(SpoolFullError):
        app.tell(Kind.EVENT, EVENT)


def test_the_warning_ends_with_a_record_that_is_taken(app: App) -> None:
    """A body that breaks its contract is refused like one without room."""
    app.emit(Kind.EVENT, {})
    assert codes(app) == ["spool.refused"]
    with pytest.raises(RecordError):
        app.tell(Kind.EVENT, {})
    app.emit(Kind.EVENT, EVENT)
    assert codes(app) == []


def test_a_window_that_the_spool_refuses_is_counted_as_withheld(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """Rule 1 of the monitor: each prediction is in a window that was taken, or is counted."""
    caplog.set_level(logging.ERROR)
    monitor = watching(app)
    see(monitor, 3)
    app._spool.flush()
    assert (monitor.withheld, app._spool.totals().produced) == (0, 1)
    fill(app)
    see(monitor, 3)
    assert monitor.withheld == 3
    assert codes(app) == ["spool.refused"]


def watching(app: App) -> WindowMonitor:
    """Return a monitor that tells this agent's spool."""
    profile = DeviceProfile.from_json(
        b'{"version": 1, "features": [{"name": "ax", "edges": [0, 1]},'
        b' {"name": "confidence", "edges": [0.5]}]}',
        features=2,
    )
    return WindowMonitor(
        model_sha256="a" * 64, inputs=["x"], outputs=["p"], input_name="x", output_name="p",
        samples=10, classes=2, profile=profile,
        config=MonitorConfig(window_predictions=3, cpu_share_max=1.0),
        emit=app.tell, clock=lambda: 1_000_000, monotonic=lambda: 0.0,
    )  # fmt: skip


def see(monitor: WindowMonitor, predictions: int) -> None:
    """Let a model answer so often."""
    tensors: list[Any] = [np.zeros((1, 1, 10), np.float32), np.full((1, 2), 0.5, np.float32)]
    for _ in range(predictions):
        monitor.observe({"x": tensors[0]}, {"p": tensors[1]}, 5_000)
