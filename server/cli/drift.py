"""``shoal drift``: which devices drift, and in which features."""

from __future__ import annotations

from typing import Any

import click

from .output import output_option
from .target import Target, targeted


@click.group()
def drift() -> None:
    """Which devices drift, and in which features."""


@drift.command()
@click.option("--model", help="Name, name:version or digest; by default every model.")
@output_option("table", "json", "name")
@targeted
def show(target: Target, model: str | None, output: str) -> None:
    """Show the verdict on each device; ``-o name`` lists the devices that drift."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        sha256 = operator.model(model)["sha256"] if model else ""
        found = operator.json("ShowDrift", pb.ShowDriftRequest(model_sha256=sha256))
    if output == "json":
        out.document(found)
    elif output == "name":
        out.names([row["device"] for row in found["devices"] if row["drifting"]])
    else:
        out.rows(
            found["devices"],
            [
                ("device", lambda row: row["device"]),
                ("drifting", lambda row: "yes" if row["drifting"] else "no"),
                ("features", _features),
                ("windows", lambda row: str(row["windows"])),
                ("verdict", lambda row: row.get("text", "")),
            ],
            empty="no device has sent a telemetry window yet",
        )


def _features(row: dict[str, Any]) -> str:
    return ", ".join(row.get("features", [])) or "–"
