"""``shoal devices``: list, look at, let in, shut out."""

from __future__ import annotations

import sys
import textwrap
from typing import Any, Final

import click

from .failure import CommandError, Status
from .output import output_option
from .target import Target, targeted

COLUMNS_MAX: Final = 100  # of a line
FEATURES_CHARS_MAX: Final = 14  # of the cell that names what drifts
DRIFT_CHARS_MAX: Final = 600  # of a verdict's text


@click.group()
def devices() -> None:
    """Devices: list, look at, let in, shut out."""


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
                ("status", lambda row: _status(row) + _mark(row)),
                ("model", _model),
                ("accuracy", _accuracy),
                ("drift", _drift),
                ("rollout", lambda row: (row["rollout"] or {}).get("state", "–")),
                ("alerts", lambda row: str(row["alerts_open"])),
                ("seen (UTC)", lambda row: out.moment(row["seen_ms"])[:16]),  # to the minute
            ],
            empty="no device" + (" matches" if selector else ": make a token for one first"),
        )
        warned = [row["id"] for row in found["devices"] if row["warnings"]]
        if warned:
            out.say(f"!: warnings of the device itself, e.g. shoal devices show {warned[0]}")


@devices.command()
@click.argument("device_id")
@output_option("table", "json")
@targeted
def show(target: Target, device_id: str, output: str) -> None:
    """Show the device DEVICE_ID: what it runs, what it warns of, and what it does not tell."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        found = operator.json("ListDevices", pb.ListDevicesRequest(selector=device_id))["devices"]
    row = next((each for each in found if each["id"] == device_id), None)
    if row is None:
        raise CommandError(
            f"there is no device {device_id!r:.80}",
            hint="shoal devices list",
            status=Status.NOT_FOUND,
        )
    if output == "json":
        out.document(row)
        return
    click.echo(f"{row['id']}: {_status(row)}")
    for name, text in _facts(row):
        click.echo(
            textwrap.fill(
                text, COLUMNS_MAX,
                initial_indent=f"  {name:<11}", subsequent_indent=" " * 13,
            )
        )  # fmt: skip


@devices.command()
@click.argument("device_id")
@click.option(
    "--ttl",
    "ttl_s",
    type=click.IntRange(min=0),
    default=0,
    help="Life, s; 0 = the longest there is.",
)
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
        out.say("  shoal-agent enroll --config agent.toml --token TOKEN")


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


def _facts(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is known of a device, as names and texts."""
    from ..api.reported import plain
    from . import output as out

    lacks = row["untold"] or {}
    missed = [
        f"{lacks[name]:,} {what}"
        for name, what in (
            ("labels_missed", "labels not joined"),
            ("slices_over", "calls beyond slice_max"),
            ("captures_refused", "captures not sent"),
        )
        if lacks.get(name)
    ]
    drift, rollout = row["drift"] or {}, row["rollout"]
    facts = [
        ("seen", out.moment(row["seen_ms"])),
        ("model", _model(row)),
        ("agent", plain(row["agent"]) or "–"),
        ("site", plain(row["site"]) or "–"),
        ("hardware", plain(row["hardware"]) or "–"),
        ("accuracy", _accuracy(row)),
        ("drift", plain(drift.get("text", ""), chars_max=DRIFT_CHARS_MAX) or _drift(row)),
        ("rollout", f"{rollout['state']} {plain(rollout['reason'])}" if rollout else "–"),
        ("alerts", str(row["alerts_open"])),
        ("reported", out.moment(row["reported_ms"])),
        ("not told", _not_told(row)),
        *([("missed", ", ".join(missed))] if missed else []),
    ]
    for each in row["warnings"]:
        facts.append((each["severity"], f"{each['code']}: {each['text']}"))
        facts += [("  fix", each["fix"])] if each["fix"] else []
    return facts


def _not_told(row: dict[str, Any]) -> str:
    """Return what its windows lack; one that has sent none is not called whole."""
    if row["untold"] is None:
        return "–"
    if row["untold"]["text"]:
        return str(row["untold"]["text"])
    if row["model"] is None:
        return "nothing: it runs no model and sends no window"
    if not (row["drift"] or {}).get("windows"):
        return "nothing yet: no window of its model has been counted"
    return "nothing: all windows are whole"


def _status(row: dict[str, Any]) -> str:
    if row["revoked"]:
        return "revoked"
    return "online" if row["online"] else "offline"


def _mark(row: dict[str, Any]) -> str:
    return f" !{len(row['warnings'])}" if row["warnings"] else ""


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
    return _named(drift.get("features", [])) or "yes" if drift.get("drifting") else "no"


def _named(features: list[str]) -> str:
    """Return all features, or the first and how many more there are: what a cell takes."""
    text = ", ".join(features)
    if len(text) <= FEATURES_CHARS_MAX:
        return text
    more = f", +{len(features) - 1}" if len(features) > 1 else ""
    room = FEATURES_CHARS_MAX - len(more)
    first = features[0] if len(features[0]) <= room else f"{features[0][: room - 1]}…"
    return first + more
