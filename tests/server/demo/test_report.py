"""The report: every way in which the loop may fail to close is seen."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from rich.console import Console

from shoal.server.demo import report
from shoal.server.demo.people import Wearer
from shoal.server.demo.scenario import Story

WEARERS = (Wearer("wrist-01", 1, False), Wearer("wrist-02", 2, True))


def made(**changed: Any) -> dict[str, Any]:
    """Return the report of a small run that closed, with some inputs replaced."""
    scores = [
        {"device": device, "bundle_sha256": bundle, "windows": 100, "correct": correct}
        for device, bundle, correct in [
            ("wrist-01", "old", 95), ("wrist-01", "new", 96),
            ("wrist-02", "old", 70), ("wrist-02", "new", 85),
        ]
    ]  # fmt: skip
    story = Story(
        champion="old",
        candidate="new",
        drift={
            "devices": [
                {"device": "wrist-01", "drifting": False, "windows": 9},
                {"device": "wrist-02", "drifting": True, "features": ["ax"], "windows": 9,
                 "text": "wrist-02 drifts in ax", "detected_after_windows": 4},
            ]
        },
        rounds={"round": 30, "history": []},
        test={"scores": scores},
        rollout={"state": "completed", "counts": {"confirmed": 2}, "waves": [1, 2]},
    )  # fmt: skip
    device = {
        "produced": 50, "spooled": 1, "acknowledged": 49, "bytes_up": 2048,
        "windows_offered": 300, "windows_answered": 300,
    }  # fmt: skip
    inputs: dict[str, Any] = {
        "summary": {"totals": {"stored": 98, "lost": 0, "quarantined": 0}},
        "devices": {"wrist-01": dict(device), "wrist-02": dict(device)},
        "processes": {
            "wrist-01": {"role": "agent", "restarts": 0, "rss_mb_max": 90.0},
            "wrist-02": {"role": "agent", "restarts": 1, "rss_mb_max": 95.0},
            "server": {"role": "server", "restarts": 0, "rss_mb_max": 200.0},
        },
    }
    inputs |= {key: value for key, value in changed.items() if key in inputs}
    if "story" in changed:
        changed["story"](story)
    return report.build(story, WEARERS, seed=0, took_s=61.26, **inputs)


def test_counts_and_shares() -> None:
    """The figures are those of the devices and the server, nothing else."""
    found = made()
    assert found["closed"] and found["failures"] == []
    assert found["accuracy"]["known"] == {"before": 0.95, "after": 0.96, "windows": 100}
    assert found["accuracy"]["unseen"] == {"before": 0.70, "after": 0.85, "windows": 100}
    assert found["drift"]["devices"] == ["wrist-02"]
    assert found["drift"]["detected_after_windows"] == 4
    assert found["records"] == {
        "produced": 100, "stored": 98, "spooled": 2, "lost": 0, "quarantined": 0,
    }  # fmt: skip
    assert found["rollout"]["confirmed"] == 2
    assert found["agent"]["rss_mb_max"] == 95.0
    assert found["bytes_up_per_device"] == 2048


def worse(story: Story) -> None:
    """The candidate is no better on unseen people."""
    story.test = copy.deepcopy(story.test)
    story.test["scores"][3]["correct"] = 74


def stuck(story: Story) -> None:
    """One device never confirmed."""
    story.rollout = {"state": "running", "counts": {"confirmed": 1}}


def quiet(story: Story) -> None:
    """Nothing drifted."""
    story.drift = {"devices": []}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"story": worse}, r"gained \+4.0 points"),
        ({"story": stuck}, "rollout is running, 1 of 2"),
        ({"story": quiet}, "no drift"),
        ({"summary": {"totals": {"stored": 97, "lost": 0, "quarantined": 0}}}, "99 are accounted"),
        ({"summary": {"totals": {"stored": 99, "lost": 0, "quarantined": 0}}}, "101 are accounted"),
        ({"summary": {"totals": {"stored": 97, "lost": 1, "quarantined": 0}}}, "1 records lost"),
        ({"summary": {"totals": {"stored": 98, "lost": 0, "quarantined": 2}}}, "2 quarantined"),
    ],
)
def test_says_why_the_loop_did_not_close(changed: dict[str, Any], said: str) -> None:
    """Each broken promise is one sentence, and the loop is not called closed."""
    found = made(**changed)
    assert not found["closed"]
    assert any(re.search(said, each) for each in found["failures"])


def test_fits_eighty_columns() -> None:
    """The summary is readable on the narrowest terminal."""
    console = Console(width=80)
    with console.capture() as captured:
        report.show(made(), console)
    text = captured.get()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "100 produced = 98 stored + 2 spooled + 0 lost" in text
    assert "+15.0 points" in text
