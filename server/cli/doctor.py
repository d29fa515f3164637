"""``shoal doctor``: look for what is wrong, and say how to mend it.

It works without a running server and changes nothing. Each check returns findings; one with the
level ``fail`` makes the command exit 1.
"""

from __future__ import annotations

import sqlite3
import stat
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from .failure import CommandError
from .output import output_option
from .target import Target, targeted

SOON: Final = timedelta(days=14)
CONNECT_S: Final = 2.0
FILE_BYTES_MAX: Final = 1 << 20
DEVICES_SHOWN: Final = 5  # names in one finding


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    level: str
    """ok, warn or fail."""
    text: str
    fix: str = ""


Findings = Iterator[Finding]


@click.command()
@output_option("table", "json")
@targeted
def doctor(target: Target, output: str) -> None:
    """Check folder, keys, certificates, database, server, devices, alerts and broker."""
    from . import output as out

    now = datetime.now(UTC)
    found = [finding for check in CHECKS for finding in check(target, now)]
    if output == "json":
        out.document({"findings": [asdict(each) for each in found]})
    else:
        for each in found:
            click.echo(f"{each.level:<4}  {each.check}: {each.text}")
            if each.fix:
                click.echo(f"      fix: {each.fix}")
    failed = sum(each.level == "fail" for each in found)
    if failed:
        raise CommandError(f"{failed} of {len(found)} checks failed")


def folder(target: Target, now: datetime) -> Findings:
    """Only its owner may enter the state folder, and read private keys."""
    state = target.state
    if not state.is_dir():
        yield Finding(
            "folder", "fail", f"{state} does not exist", "shoal server init, or name it: --state"
        )
        return
    mode = stat.S_IMODE(state.stat().st_mode)
    if mode & 0o077:
        yield Finding("folder", "fail", f"others may enter {state}", f"chmod 700 {state}")
    else:
        yield Finding("folder", "ok", f"{state} is its owner's alone")
    keys = [*state.glob("keys/**/*.pem"), *state.glob("*/key.pem")]
    for path in keys:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Finding("keys", "fail", f"others may read {path}", f"chmod 600 {path}")
    if any(state.glob("keys/offline/*.pem")):
        yield Finding(
            "keys",
            "warn",
            "the offline keys lie beside the online ones: who takes this machine may approve",
            f"move {state / 'keys' / 'offline'} to a machine that is off most of the time",
        )
    elif keys:
        yield Finding("keys", "ok", f"{len(keys)} private keys, offline keys elsewhere")


def certificates(target: Target, now: datetime) -> Findings:
    """The certificates of CA and server are valid for a while."""
    from cryptography import x509

    for name, path in (
        ("CA", target.state / "ca" / "certificate.pem"),
        ("server", target.state / "tls" / "chain.pem"),
    ):
        if not path.exists():
            continue
        try:
            end = x509.load_pem_x509_certificates(path.read_bytes())[0].not_valid_after_utc
        except ValueError as exc:
            yield Finding(
                "certificates", "fail", f"{path} cannot be read: {exc!s:.100}",
                "restore it from a backup",
            )  # fmt: skip
            continue
        fix = "restart the server: it renews its own certificate"
        yield _expiry("certificates", f"the {name}'s certificate", end, now, fix)


def approval(target: Target, now: datetime) -> Findings:
    """The approval metadata have not expired: devices would install nothing."""
    import json

    path = target.state / "metadata" / "timestamp.json"
    if not path.exists():
        return
    try:
        signed = json.loads(path.read_bytes()[:FILE_BYTES_MAX])["signed"]
        end = datetime.fromisoformat(signed["expires"])
    except (ValueError, KeyError, TypeError) as exc:
        yield Finding(
            "approval", "fail", f"{path} cannot be read: {exc!s:.100}", "restore it from a backup"
        )
        return
    if end <= now:
        fix = "start the server: it signs a new timestamp"
        yield Finding("approval", "fail", f"the timestamp expired on {end:%Y-%m-%d %H:%M}", fix)
    else:
        yield Finding("approval", "ok", f"the timestamp is valid until {end:%Y-%m-%d %H:%M} UTC")


def database(target: Target, now: datetime) -> Findings:
    """The pages of the database are whole."""
    path = target.state / "fleet.db"
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(f"file:{path.absolute()}?mode=ro", uri=True)
        try:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as exc:
        answer = str(exc)
    if answer == "ok":
        yield Finding("database", "ok", f"{path} is whole")
    else:
        yield Finding(
            "database", "fail", f"{path} is damaged: {answer!s:.100}",
            "stop the server and restore the last backup; devices send again what it lacks",
        )  # fmt: skip


def answers(target: Target, now: datetime) -> Findings:
    """The server answers its operator."""
    from ...proto import operator_pb2 as pb

    try:
        with target.connect() as operator:
            totals = operator.json("GetSummary", pb.GetSummaryRequest())["totals"]
    except CommandError as exc:
        yield Finding("server", "fail", str(exc), exc.hint)
        return
    yield Finding("server", "ok", f"it answers; {totals['online']} of {totals['devices']} online")


def devices(target: Target, now: datetime) -> Findings:
    """What devices warn of; never a failure, or one device could fail every script."""
    from ...proto import operator_pb2 as pb

    try:
        with target.connect() as operator:
            asked = pb.ListDevicesRequest(selector="warnings:yes")
            found = operator.json("ListDevices", asked)["devices"]
    except CommandError:  # as the check of the server says
        return
    told: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for row in found:
        for each in row["warnings"] if not row["revoked"] else []:
            told.setdefault(each["code"], []).append((row["id"], each))
    for code, warned in sorted(told.items()):
        names = list(dict.fromkeys(name for name, _ in warned))
        more = f" and {len(names) - DEVICES_SHOWN} more" if len(names) > DEVICES_SHOWN else ""
        first = warned[0][1]
        yield Finding(
            "devices",
            "warn",
            f"{code} on {', '.join(names[:DEVICES_SHOWN])}{more}: {first['text']}",
            first["fix"] or f"shoal devices show {names[0]}",
        )
    if not told:
        yield Finding("devices", "ok", "none warns of itself")


def alerts(target: Target, now: datetime) -> Findings:
    """What is found drifting, broken or less right, and nobody has resolved."""
    from ...proto import operator_pb2 as pb

    try:
        with target.connect() as operator:
            found = operator.json("ListAlerts", pb.ListAlertsRequest())["alerts"]
    except CommandError:  # as the check of the server says
        return
    waiting = [each["kind"] for each in found if each["state"] == "open"]
    if waiting:
        kinds = ", ".join(f"{waiting.count(kind)} {kind}" for kind in sorted(set(waiting)))
        yield Finding("alerts", "warn", f"{kinds} open", "shoal alerts list")
    else:
        seen = f"; {len(found)} acknowledged or silenced" if found else ""
        yield Finding("alerts", "ok", f"none is open{seen}")


def broker(target: Target, now: datetime) -> Findings:
    """Something listens where the broker should be."""
    import socket
    from urllib.parse import urlsplit

    path = target.state / "server.toml"
    if not path.exists():
        return
    try:
        settings: Any = tomllib.loads(path.read_text())
        url = urlsplit(settings.get("broker", {}).get("url", "mqtt://127.0.0.1:1883"))
        host, port = url.hostname or "", url.port or (8883 if url.scheme == "mqtts" else 1883)
    except (ValueError, AttributeError) as exc:
        yield Finding("broker", "fail", f"{path}: {exc!s:.100}", "correct the configuration")
        return
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as exc:
        yield Finding(
            "broker", "fail", f"nothing listens at {host}:{port}: {exc.strerror or exc}",
            "start the broker, or correct broker.url",
        )  # fmt: skip
        return
    yield Finding("broker", "ok", f"something listens at {host}:{port}")


def _expiry(check: str, what: str, end: datetime, now: datetime, fix: str) -> Finding:
    if end <= now:
        return Finding(check, "fail", f"{what} expired on {end:%Y-%m-%d}", fix)
    if end - now < SOON:
        return Finding(check, "warn", f"{what} expires on {end:%Y-%m-%d}", fix)
    return Finding(check, "ok", f"{what} is valid until {end:%Y-%m-%d}")


CHECKS: Final[tuple[Callable[[Target, datetime], Findings], ...]] = (
    folder, certificates, approval, database, answers, devices, alerts, broker,
)  # fmt: skip
