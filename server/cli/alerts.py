"""``shoal alerts``: list, show, acknowledge, silence, resolve."""

from __future__ import annotations

from typing import Any, Final

import click

from .output import output_option
from .target import Target, targeted
from .times import Span

CHANGES_SHOWN: Final = 8
ACCURACY: Final = "accuracy"  # names of server/drift, which a command need not load
CONFIDENCE: Final = "confidence"
UNKNOWN: Final = "unknown"


@click.group()
def alerts() -> None:
    """Alerts: list, show, acknowledge, silence, resolve."""


@alerts.command("list")
@click.option(
    "--model", help="Name (all versions), name:version or digest; by default every model."
)
@click.option("--all", "every", is_flag=True, help="Also those that are resolved.")
@output_option("table", "json", "name")
@targeted
def list_(target: Target, model: str | None, every: bool, output: str) -> None:
    """List alerts, the newest first; ``-o name`` prints their ids."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        meant = {each["sha256"] for each in operator.versions(model)} if model else set()
        found = operator.json("ListAlerts", pb.ListAlertsRequest(all=every))
        if meant:
            found["alerts"] = [row for row in found["alerts"] if row["model_sha256"] in meant]
    if output == "json":
        out.document(found)
    elif output == "name":
        out.names([str(row["id"]) for row in found["alerts"]])
    else:
        out.rows(
            found["alerts"],
            [
                ("id", lambda row: str(row["id"])),
                ("state", _state),
                ("kind", _kind),
                ("where", _where),
                ("opened (UTC)", lambda row: out.moment(row["opened_ms"])),
                ("what", _what),
            ],
            empty="no alert" + ("" if every else " is live; --all shows those that are over"),
        )


@alerts.command()
@click.argument("alert_id", type=click.IntRange(min=1))
@output_option("table", "json")
@targeted
def show(target: Target, alert_id: int, output: str) -> None:
    """Show the alert ALERT_ID with its evidence."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        found = operator.json("ListAlerts", pb.ListAlertsRequest(alert_id=alert_id))["alerts"][0]
    if output == "json":
        out.document(found)
        return
    click.echo(found["text"])
    lines = [
        ("kind", _kind(found)),
        ("where", _where(found)),
        ("state", _state(found)),
        ("opened", out.moment(found["opened_ms"])),
        ("last seen", f"{out.moment(found['seen_ms'])} ({found['seen']} judgements)"),
        ("model", found["model_sha256"][:12] or "–"),
        ("by", found["actor"] or "the server"),
        ("note", found["note"] or "–"),
    ]
    for name, text in [*lines, *_evidence(found["evidence"], alone=found["scope"] == "device")]:
        click.echo(f"  {name:<11}{text}")


def _control(target: Target, alert_id: int, command: str, note: str, silence_s: int = 0) -> None:
    from ...proto import operator_pb2 as pb
    from . import output as out

    request = pb.ControlAlertRequest(
        alert_id=alert_id, command=f"ALERT_COMMAND_{command}", note=note, silence_s=silence_s
    )
    with target.connect() as operator:
        made = operator.call("ControlAlert", request)
    click.echo(made.state)
    if made.silenced_until_unix_ms:
        out.say(f"until {out.moment(made.silenced_until_unix_ms)} UTC")


@alerts.command()
@click.argument("alert_id", type=click.IntRange(min=1))
@click.option("--note", default="", help="For people and the audit log.")
@targeted
def ack(target: Target, alert_id: int, note: str) -> None:
    """Say that somebody has seen ALERT_ID and is on it."""
    _control(target, alert_id, "ACKNOWLEDGE", note)


@alerts.command()
@click.argument("alert_id", type=click.IntRange(min=1))
@click.option("--for", "for_s", type=Span(), required=True, help="How long: 30m, 12h, 7d.")
@click.option("--note", default="", help="For people and the audit log.")
@targeted
def silence(target: Target, alert_id: int, for_s: int, note: str) -> None:
    """Hear nothing of ALERT_ID for a while, also if it goes away and comes back."""
    _control(target, alert_id, "SILENCE", note, for_s)


@alerts.command()
@click.argument("alert_id", type=click.IntRange(min=1))
@click.option("--note", default="", help="For people and the audit log.")
@targeted
def resolve(target: Target, alert_id: int, note: str) -> None:
    """Say that ALERT_ID is over; it opens again if it is still found a while later."""
    _control(target, alert_id, "RESOLVE", note)


def _state(row: dict[str, Any]) -> str:
    from . import output as out

    if row["state"] == "silenced":
        return f"silenced until {out.moment(row['silenced_until_ms'])}"
    return str(row["state"])


def _kind(row: dict[str, Any]) -> str:
    return f"{row['kind']} (suspected)" if row["suspected"] else str(row["kind"])


def _where(row: dict[str, Any]) -> str:
    if row["scope"] == "device":
        return row["subject"] or "the fleet"
    return "the fleet" if row["scope"] == "fleet" else f"{row['scope']} {row['subject']}"


def _what(row: dict[str, Any]) -> str:
    """Return the text without the place, which has a column of its own."""
    place, colon, rest = row["text"].partition(": ")
    named = row["subject"] and place.endswith(row["subject"])
    return rest if colon and (named or place == "the fleet") else str(row["text"])


def _evidence(evidence: dict[str, Any], *, alone: bool) -> list[tuple[str, str]]:
    from . import output as out

    lines = []
    if "judged" in evidence:
        rest = evidence["rest"]
        lines.append(("devices", f"{evidence['affected']} of {evidence['judged']} judged"))
        lines.append(("elsewhere", f"{rest['affected']} of {rest['judged']}"))
        if not alone:
            lines.append(("by chance", out.chance(evidence["p_value"])))
        names = [
            each["feature"] if alone else f"{each['feature']} ({each['devices']})"
            for each in evidence["features"]
        ]
        lines.append(("features", ", ".join(names) or "–"))
        if not alone:
            shown = evidence["devices"]
            more = evidence["affected"] - len(shown)
            lines.append(("named", ", ".join(shown) + (f" and {more} more" if more > 0 else "")))
    for each in evidence.get("confounded", []):
        lines.append(("same as", f"{each['scope']} {each['subject']}"))
    for each in evidence.get("findings", []):
        lines.append(("finding", f"{_finding(each)} (p {out.chance(each['p_value'])})"))
    for each in evidence.get("changes", [])[:CHANGES_SHOWN]:
        who = "" if alone else f"{each['device']} "
        lines.append(
            (
                "change",
                f"{who}{each['feature']} since window {each['since_window']} "
                f"({out.moment(each['since_ms'])}), direction {each['direction']:+.2f}, "
                f"PSI {each['psi']:.2f}",
            )
        )
    for each in evidence.get("faults", []):
        codes = f" {', '.join(map(str, each['codes']))}" if "codes" in each else ""
        text = f"{each['feature'] or 'data'} {each['check']}{codes}: {each['share']:.1%} of values"
        name = "new codes" if each["check"] == UNKNOWN else "fault"
        lines.append((name, f"{text}, {each['windows_bad']} of {each['windows']} windows"))
    return lines


def _finding(found: dict[str, Any]) -> str:
    effect, usual = found["effect"], found["normal"]
    if found["feature"] == ACCURACY:
        return f"accuracy {usual - effect:.1%}, expected {usual:.1%}"
    what = "lower by" if found["feature"] == CONFIDENCE else "distance"
    return f"{found['feature']} {what} {effect:.3f}, usual {usual:z.3f}"
