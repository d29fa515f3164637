"""What trainings and runs of rounds have in common on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .failure import CommandError, Status
from .target import Target

if TYPE_CHECKING:
    from .client import Operator

Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of run."""

    noun: str
    method: str
    """Of the operator's service."""
    result: str
    """Field of the model that it made."""
    line: Callable[[Run], str]
    """One line of progress."""


def _training(run: Run) -> str:
    progress = run.get("progress", {})
    shown = [f"{name} {_text(value)}" for name, value in progress.items() if _is_plain(value)]
    return f"{run['state']}" + (f": {', '.join(shown)}" if shown else "")


def _rounds(run: Run) -> str:
    last = run["history"][-1] if run.get("history") else {}
    loss = f", loss {last['loss_last']:.4f}" if "loss_last" in last else ""
    return f"{run['state']}: round {run['round']} of {run['rounds']}{loss}"


TRAINING = Kind("training", "GetTraining", "model_sha256", _training)
ROUNDS = Kind("run of rounds", "GetRounds", "candidate_sha256", _rounds)


def get(operator: Operator, kind: Kind, run_id: str) -> Run:
    """Return a run."""
    from ...proto import operator_pb2 as pb

    request = getattr(pb, f"{kind.method}Request")(run_id=run_id)
    found: Run = operator.json(kind.method, request)
    return found


def until_end(operator: Operator, kind: Kind, run_id: str, *, timeout_s: float) -> Run:
    """Tell progress until the run ends, and return it."""
    from . import output as out

    return operator.wait(
        lambda: get(operator, kind, run_id),
        until=lambda run: run["state"] in ("done", "failed"),
        show=lambda run: out.say(kind.line(run)),
        timeout_s=timeout_s,
    )


def status(
    target: Target, kind: Kind, run_id: str, *, watch: bool, timeout_s: float, output: str
) -> None:
    """Show a run; exit 1 if it failed."""
    from . import output as out

    with target.connect() as operator:
        if watch:
            run = until_end(operator, kind, run_id, timeout_s=timeout_s)
        else:
            run = get(operator, kind, run_id)
    if output == "json":
        out.document(run)
    elif output == "name":
        if not run[kind.result]:
            raise CommandError(
                f"the {kind.noun} is {run['state']} and has made no model",
                status=Status.NOT_FOUND,
            )
        click.echo(run[kind.result])
    else:
        click.echo(kind.line(run))
        if run[kind.result]:
            click.echo(f"made {run[kind.result]}")
    finish(run)


def finish(run: Run) -> None:
    """Exit 1 if a run failed; one that goes on is no error."""
    if run["state"] == "failed":
        raise CommandError(f"it failed: {run.get('reason') or 'for an unknown reason'}")


def watch_to_end(operator: Operator, kind: Kind, run_id: str, *, timeout_s: float) -> None:
    """Tell progress, then what was made and what to do with it; exit 1 if the run failed."""
    from . import output as out

    run = until_end(operator, kind, run_id, timeout_s=timeout_s)
    finish(run)
    if not run[kind.result]:
        return
    made = operator.model(run[kind.result])
    name = f"{made['name']}:{made['version']}"
    if made["approved_ms"] is None:
        out.say(f"made {name}; no device takes it before:")
        out.say(f"  shoal models approve {name}")
    else:
        out.say(f"made {name}")


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
