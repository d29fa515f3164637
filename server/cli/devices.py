"""``shoal devices``: list, let in, shut out."""

from __future__ import annotations

import sys
from typing import Any

import click

from .failure import CommandError, Status
from .output import output_option
from .target import Target, targeted


@click.group()
def devices() -> None:
    """Devices: list, let in, shut out."""


@devices.command("list")
@click.option("--selector", "-l", default="", help="Id prefix, or status:online model:NAME …")
@output_option("table", "json", "name")
@targeted
def list_(target: Target, selector: str, output: str) -> None:
    """List devices: what each runs, how well, and what is wrong with it."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        found = operator.json("ListDevices", pb.ListDevicesRequest(selector=selector))
    if output == "json":
        out.document(found)
    elif output == "name":
        out.names([row["id"] for row in found["devices"]])
    else:
        out.rows(
            found["devices"],
            [
                ("id", lambda row: row["id"]),
                ("status", _status),
                ("model", _model),
                ("accuracy", _accuracy),
                ("drift", _drift),
                ("rollout", lambda row: (row["rollout"] or {}).get("state", "–")),
                ("alerts", lambda row: str(row["alerts_open"])),
                ("seen (UTC)", lambda row: out.moment(row["seen_ms"])),
            ],
            empty="no device" + (" matches" if selector else ": make a token for one first"),
        )


@devices.command()
@click.argument("device_id")
@click.option("--ttl", "ttl_s", type=click.IntRange(min=0), default=0, help="Life of the token, s.")
@output_option("table", "json")
@targeted
def token(target: Target, device_id: str, ttl_s: int, output: str) -> None:
    """Make an enrolment token for the device DEVICE_ID.

    The token goes to stdout and is shown this once; it lets one device in.
    """
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        made = operator.call("CreateToken", pb.CreateTokenRequest(device_id=device_id, ttl_s=ttl_s))
    if output == "json":
        out.document({"token": made.token, "expires_unix_ms": made.expires_unix_ms})
    else:
        click.echo(made.token)
        out.say(f"valid until {out.moment(made.expires_unix_ms)} UTC; on the device:")
        out.say("  shoal-agent enroll --token TOKEN")


@devices.command()
@click.argument("device_id")
@click.option("--reason", required=True, help="For the audit log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@targeted
def revoke(target: Target, device_id: str, reason: str, yes: bool) -> None:
    """Shut the device DEVICE_ID out: its certificates and tokens are worth nothing any more."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    if not yes:
        if not sys.stdin.isatty():
            raise CommandError(
                "revoking asks first, and there is no terminal to ask on",
                hint="give --yes",
                status=Status.USAGE,
            )
        click.confirm(f"Shut {device_id} out?", abort=True, err=True)
    with target.connect() as operator:
        operator.call("RevokeDevice", pb.RevokeDeviceRequest(device_id=device_id, reason=reason))
    out.say(f"{device_id} is revoked")


def _status(row: dict[str, Any]) -> str:
    if row["revoked"]:
        return "revoked"
    return "online" if row["online"] else "offline"


def _model(row: dict[str, Any]) -> str:
    model = row["model"]
    if model is None:
        return "–"
    return f"{model['name']}:{model['version']}" if model["name"] else model["digest"]


def _accuracy(row: dict[str, Any]) -> str:
    from . import output as out

    for split in ("test", "validation", "train"):
        if split in row["accuracy"]:
            return out.percent(row["accuracy"][split]["share"])
    return "–"


def _drift(row: dict[str, Any]) -> str:
    drift = row["drift"]
    if not drift:
        return "–"
    return ", ".join(drift.get("features", [])) or "yes" if drift.get("drifting") else "no"
