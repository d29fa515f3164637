"""Make the demo's report: what was counted, by whom, and whether the loop closed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .people import Wearer
from .scenario import Story

GAIN_POINTS_MIN = 5.0  # the better model must beat the first one by this much on unseen people


def build(
    story: Story,
    wearers: Sequence[Wearer],
    *,
    seed: int,
    summary: Mapping[str, Any],
    devices: Mapping[str, Mapping[str, Any]],
    processes: Mapping[str, Mapping[str, Any]],
    took_s: float,
) -> dict[str, Any]:
    """Return the report as nested JSON-serialisable values.

    Args:
        story: What the scenario saw.
        wearers: Who wore what.
        seed: Of the run.
        summary: The server's own counts (stored, lost, …).
        devices: Each device's own counts, read from its spool after it stopped.
        processes: Name, role, restarts and largest resident set of every process.
        took_s: Seconds.
    """
    drift = story.drift.get("devices", [])
    flagged = [each for each in drift if each["drifting"]]
    totals = summary.get("totals", {})
    produced = sum(each["produced"] for each in devices.values())
    spooled = sum(each["spooled"] for each in devices.values())
    bytes_up = {name: each["bytes_up"] for name, each in devices.items()}
    rss_mb = [each["rss_mb_max"] for each in processes.values() if each["role"] == "agent"]
    records = {
        "produced": produced,
        "stored": totals.get("stored", 0),
        "spooled": spooled,
        "lost": totals.get("lost", 0),
        "quarantined": totals.get("quarantined", 0),
    }
    report: dict[str, Any] = {
        "seed": seed,
        "took_s": round(took_s, 1),
        "steps_s": story.marks_s,
        "people": [
            {"device": each.device, "subject": each.subject, "unseen": each.unseen}
            for each in wearers
        ],
        "models": {"champion": story.champion, "candidate": story.candidate},
        "accuracy": {
            "known": _pair(story, [each.device for each in wearers if not each.unseen]),
            "unseen": _pair(story, [each.device for each in wearers if each.unseen]),
            "by_device": {each.device: _pair(story, [each.device]) for each in wearers},
            "split": "test",
        },
        "drift": {
            "devices": [each["device"] for each in flagged],
            "features": {each["device"]: each["features"] for each in flagged},
            "text": {each["device"]: each["text"] for each in flagged},
            "detected_after_windows": max(
                (each["detected_after_windows"] for each in flagged), default=0
            ),
            "by_device": {each["device"]: each for each in drift},
        },
        "rollout": {
            "state": story.rollout.get("state", "none"),
            "confirmed": story.rollout.get("counts", {}).get("confirmed", 0),
            "waves": story.rollout.get("waves", []),
            "evidence": story.rollout.get("evidence", []),
        },
        "rounds": {
            "done": story.rounds.get("round", 0),
            "history": story.rounds.get("history", []),
        },
        "records": records,
        "windows": {
            "offered": sum(each["windows_offered"] for each in devices.values()),
            "answered": sum(each["windows_answered"] for each in devices.values()),
        },
        "agent": {
            "rss_mb_max": max(rss_mb, default=0.0),
            "rss_mb_median": round(statistics.median(rss_mb), 1) if rss_mb else 0.0,
        },
        "processes": dict(processes),
        "bytes_up_per_device": round(sum(bytes_up.values()) / max(1, len(bytes_up))),
        "bytes_up": bytes_up,
    }
    report["failures"] = failures(report, devices=len(wearers))
    report["closed"] = not report["failures"]
    return report


def failures(report: Mapping[str, Any], *, devices: int) -> list[str]:
    """Return why the loop did not close; empty when it did."""
    found = []
    unseen, records, windows = report["accuracy"]["unseen"], report["records"], report["windows"]
    gain = 100 * (unseen["after"] - unseen["before"])
    if gain < GAIN_POINTS_MIN:
        found.append(f"unseen people gained {gain:+.1f} points, less than {GAIN_POINTS_MIN:.0f}")
    if not report["drift"]["devices"]:
        found.append("no drift was found")
    if report["rollout"]["state"] != "completed" or report["rollout"]["confirmed"] < devices:
        found.append(
            f"rollout is {report['rollout']['state']}, {report['rollout']['confirmed']} of "
            f"{devices} devices confirmed"
        )
    told = records["stored"] + records["spooled"] + records["lost"]
    if records["produced"] != told:
        found.append(f"devices produced {records['produced']} records, {told} are accounted for")
    if records["lost"] or records["quarantined"]:
        found.append(f"{records['lost']} records lost, {records['quarantined']} quarantined")
    if windows["answered"] < windows["offered"]:
        found.append(f"{windows['offered'] - windows['answered']} windows got no answer")
    return found


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the report for people."""
    table = Table(
        title="What the loop did", title_justify="left", show_header=False, pad_edge=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for group, label in (("known", "known people"), ("unseen", "unseen people")):
        pair = report["accuracy"][group]
        gain = 100 * (pair["after"] - pair["before"])
        table.add_row(
            f"accuracy, {label}",
            f"{pair['before']:.1%} → {pair['after']:.1%}  ({gain:+.1f} points, "
            f"{pair['windows']} test windows)",
        )
    drift = report["drift"]
    table.add_row(
        "drift found",
        f"{', '.join(drift['devices']) or 'none'}; after at most "
        f"{drift['detected_after_windows']} windows",
    )
    unseen = [each["device"] for each in report["people"] if each["unseen"]]
    table.add_row("people never seen", ", ".join(unseen))
    rollout = report["rollout"]
    table.add_row("rollout", f"{rollout['state']}, {rollout['confirmed']} devices confirmed")
    records = report["records"]
    table.add_row(
        "records",
        f"{records['produced']} produced = {records['stored']} stored + {records['spooled']} "
        f"spooled + {records['lost']} lost",
    )
    table.add_row(
        "windows inferred", f"{report['windows']['answered']} of {report['windows']['offered']}"
    )
    table.add_row("sent per device", f"{report['bytes_up_per_device'] / 1024:.0f} KiB")
    server = [
        each["rss_mb_max"] for each in report["processes"].values() if each["role"] == "server"
    ]
    table.add_row(
        "memory (RSS)",
        f"agent {report['agent']['rss_mb_median']:.0f} MB (largest "
        f"{report['agent']['rss_mb_max']:.0f}), server {max(server, default=0):.0f} MB",
    )
    restarts = sum(each["restarts"] for each in report["processes"].values())
    if restarts:
        table.add_row("restarted", f"{restarts} processes")
    table.add_row("took", f"{report['took_s']:.0f} s")
    console.print(table)
    for failure in report["failures"]:
        console.print(f"not closed: {failure}", style="red", markup=False, highlight=False)


def _pair(story: Story, devices: Sequence[str]) -> dict[str, Any]:
    """Return accuracy of both models on the test windows of some devices."""
    found: dict[str, Any] = {}
    for label, sha256 in (("before", story.champion), ("after", story.candidate)):
        scores = [
            each
            for each in story.test.get("scores", [])
            if each["bundle_sha256"] == sha256 and each["device"] in devices
        ]
        windows = sum(each["windows"] for each in scores)
        correct = sum(each["correct"] for each in scores)
        found[label] = round(correct / windows, 4) if windows else 0.0
        found["windows"] = windows
    return found
