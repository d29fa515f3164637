"""``shoal rollouts``: create, watch, pause, go back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .failure import CommandError, Status
from .output import output_option
from .target import Target, targeted

if TYPE_CHECKING:
    from .client import Operator

ENDED = ("completed", "failed", "aborted", "superseded")


@click.group()
def rollouts() -> None:
    """Rollouts: create, watch, pause, go back."""


@rollouts.command()
@click.argument("model")
@click.option("--device", "devices", multiple=True, help="Device id; none = all.")
@click.option(
    "--wave",
    "waves",
    multiple=True,
    type=click.IntRange(min=0),
    help="Devices reached after this wave, e.g. --wave 2 --wave 0; a last 0 = all.",
)
@click.option("--canary", "canaries", multiple=True, help="Device id that comes first.")
@click.option(
    "--bake-windows",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Telemetry windows per device before a wave is judged; 0 = count confirmations only.",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=click.IntRange(min=0),
    default=0,
    help="Per device, s, from its offer; 0 = the server's default.",
)
@click.option("--watch", is_flag=True, help="Stay until it ends.")
@click.option("--timeout", "timeout_s", default=0.0, help="Give up watching after this long, s.")
@targeted
def create(
    target: Target,
    model: str,
    devices: tuple[str, ...],
    waves: tuple[int, ...],
    canaries: tuple[str, ...],
    bake_windows: int,
    deadline_s: int,
    watch: bool,
    timeout_s: float,
) -> None:
    """Bring MODEL (name, name:version or digest) to devices, wave by wave."""
    from ...proto import operator_pb2 as pb

    with target.connect() as operator:
        made = operator.call(
            "CreateRollout",
            pb.CreateRolloutRequest(
                sha256=operator.model(model)["sha256"],
                device_ids=devices,
                waves=waves,
                canary_ids=canaries,
                bake_windows=bake_windows,
                deadline_s=deadline_s,
            ),
        )
        click.echo(made.rollout_id)
        if watch:
            _finish(_watch(operator, made.rollout_id, timeout_s))


@rollouts.command("list")
@output_option("table", "json", "name")
@targeted
def list_(target: Target, output: str) -> None:
    """List rollouts, the newest first."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        found = operator.json("ListRollouts", pb.ListRolloutsRequest())
    if output == "json":
        out.document(found)
    elif output == "name":
        out.names([row["id"] for row in found["rollouts"]])
    else:
        out.rows(
            found["rollouts"],
            [
                ("id", lambda row: row["id"]),
                ("model", lambda row: f"{row['name']}:{row['version']}"),
                ("state", lambda row: row["state"]),
                ("wave", lambda row: f"{row['wave'] + 1}/{len(row['waves'])}"),
                ("devices", lambda row: _counts(row["counts"])),
                ("created (UTC)", lambda row: out.moment(row["created_ms"])),
            ],
            empty="no rollout yet",
        )


@rollouts.command()
@click.argument("rollout_id")
@click.option("--watch", is_flag=True, help="Stay until it ends.")
@click.option("--timeout", "timeout_s", default=0.0, help="Give up watching after this long, s.")
@output_option("table", "json")
@targeted
def status(target: Target, rollout_id: str, watch: bool, timeout_s: float, output: str) -> None:
    """Show a rollout: its devices by state, and the evidence of each judged wave.

    Exits 4 if a gate failed it, 1 if it was aborted or superseded.
    """
    from . import output as out

    with target.connect() as operator:
        found = _watch(operator, rollout_id, timeout_s) if watch else _get(operator, rollout_id)
    if output == "json":
        out.document(found)
    else:
        _show(found)
    _finish(found)


def _control(target: Target, rollout_id: str, name: str) -> None:
    from ...proto import operator_pb2 as pb

    request = pb.ControlRolloutRequest(rollout_id=rollout_id, command=f"ROLLOUT_COMMAND_{name}")
    with target.connect() as operator:
        made = operator.call("ControlRollout", request)
    click.echo(made.state)


@rollouts.command()
@click.argument("rollout_id")
@targeted
def pause(target: Target, rollout_id: str) -> None:
    """Offer nothing more, and judge nothing, until it is resumed."""
    _control(target, rollout_id, "PAUSE")


@rollouts.command()
@click.argument("rollout_id")
@targeted
def resume(target: Target, rollout_id: str) -> None:
    """Go on; evidence for want of which it was paused is thereby accepted."""
    _control(target, rollout_id, "RESUME")


@rollouts.command()
@click.argument("rollout_id")
@targeted
def abort(target: Target, rollout_id: str) -> None:
    """End it, and bring each of its devices back to the model that it had, if it had one."""
    _control(target, rollout_id, "ABORT")


def _get(operator: Operator, rollout_id: str) -> dict[str, Any]:
    from ...proto import operator_pb2 as pb

    found: dict[str, Any] = operator.json("GetRollout", pb.GetRolloutRequest(rollout_id=rollout_id))
    return found


def _watch(operator: Operator, rollout_id: str, timeout_s: float) -> dict[str, Any]:
    from . import output as out

    told: list[str] = []

    def show(found: dict[str, Any]) -> None:
        line = (
            f"wave {found['wave'] + 1} of {len(found['waves'])} {found['state']}: "
            f"{_counts(found['counts'])}"
        )
        if told[-1:] != [line]:
            told.append(line)
            out.say(line)

    return operator.wait(
        lambda: _get(operator, rollout_id),
        until=lambda found: found["state"] in (*ENDED, "paused"),
        show=show,
        timeout_s=timeout_s,
    )


def _show(found: dict[str, Any]) -> None:
    from . import output as out

    reason = f" ({found['reason']})" if found["reason"] else ""
    click.echo(f"{found['id']}  {found['name']}:{found['version']}  {found['state']}{reason}")
    before = 0
    for number, counts in enumerate(found["wave_counts"]):
        size, before = found["waves"][number] - before, found["waves"][number]
        click.echo(f"wave {number + 1}, {size} devices: {_counts(counts)}")
        for entry in found["evidence"]:
            if entry["wave"] == number:
                accepted = ", accepted by the operator" if entry.get("accepted") else ""
                click.echo(f"  gate: {entry['verdict']}{accepted}")
                for line in entry["reasons"]:
                    click.echo(f"    {line}")
    troubled = [row for row in found["devices"] if row["reason"]]
    if troubled:
        out.rows(
            troubled,
            [
                ("device", lambda row: row["device"]),
                ("state", lambda row: row["state"]),
                ("reason", lambda row: row["reason"]),
            ],
            empty="",
        )


def _finish(found: dict[str, Any]) -> None:
    """Exit by how the rollout ended; one that goes on is no error."""
    if found["state"] == "failed":
        raise CommandError(
            f"rollout {found['id']} failed its gate: {found['reason']}",
            hint="a device goes back to the model that it had; one that had none keeps this one if "
            "it confirmed it",
            status=Status.GATE_FAILED,
        )
    if found["state"] in ("aborted", "superseded"):
        raise CommandError(f"rollout {found['id']} was {found['state']}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
