"""The command `shoal-agent`."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .. import ShoalError, __version__

if TYPE_CHECKING:
    from .updates.slots import Held, SlotState

EXIT_ERROR = 1

_UNDER_WAY: Final = {
    "downloading": "is being downloaded",
    "verified": "is verified; its trial comes next",
    "trial": "is on trial",
}
_ELSEWHERE: Final = {
    "doctor": "Say what this machine is, what it can run, and what holds it back.",
    "trial": "Time every way to run a model on this device, and choose one.",
    "serve": "Serve models on this device over HTTP, gRPC, a Unix socket or shared memory.",
}
"""Commands in modules of their own, imported only for the command that runs: the server is to
stay small, and a trial's imports are 10 MB."""


def _run(arguments: argparse.Namespace) -> int:
    import asyncio
    import faulthandler

    from .app import App, alone, enrolled
    from .config import load

    config = load(arguments.config)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # kill -USR1 writes every thread's stack to the log.
    faulthandler.register(signal.SIGUSR1, file=2)
    logging.getLogger("tuf").setLevel(logging.WARNING)
    with alone(config.state_dir):
        identity = enrolled(config)

        async def run() -> None:
            await App(config, identity).run()

        asyncio.run(run())
    return 0


def _enroll(arguments: argparse.Namespace) -> int:
    from .config import EnrolmentConfig, load
    from .identity import enroll

    config = load(arguments.config)
    config = replace(config, enrolment=EnrolmentConfig())
    identity = enroll(arguments.token, config.state_dir)
    print(f"enrolled as {identity.device} of fleet {identity.fleet}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from .config import load
    from .errors import AgentError
    from .identity import Identity, IdentityError
    from .spool import read_totals
    from .updates import peek

    config = load(arguments.config)
    totals, counters = read_totals(config.state_dir / "spool")
    try:
        updates = _updates(peek(config.state_dir / "updates"))
    except AgentError as exc:
        updates = {"model": "", "update": str(exc)}
    names = (
        "bytes_up", "windows_offered", "windows_answered", "windows_bins_alone",
        "predictions_withheld",
    )  # fmt: skip
    counts = asdict(totals) | {name: counters.get(name, 0) for name in names}
    try:
        identity = Identity.load(config.state_dir)
        who = {"device": identity.device, "fleet": identity.fleet}
    except IdentityError:
        who = {"device": "", "fleet": ""}
    if arguments.output == "json":
        print(json.dumps({**who, **updates, "totals": counts}, indent=1))
        return 0
    print(f"device    {who['device'] or 'not enrolled'}  fleet {who['fleet'] or '-'}")
    print(f"model     {updates['model'] or 'none yet: a rollout brings one'}")
    if updates["update"]:
        print(f"update    {updates['update']}")
    print(
        f"records   {counts['produced']} produced = {counts['acknowledged']} stored + "
        f"{counts['spooled']} spooled + {counts['lost']} lost"
    )
    print(f"windows   {counts['windows_answered']} of {counts['windows_offered']} answered")
    if counts["windows_bins_alone"] or counts["predictions_withheld"]:
        print(
            f"telemetry {counts['windows_bins_alone']} windows as bins alone, "
            f"{counts['predictions_withheld']} predictions withheld"
        )
    print(f"sent      {counts['bytes_up'] / 1024:.0f} KiB")
    return 0


def _updates(state: SlotState) -> dict[str, str]:
    """Return the model that answers, and what became of the newest update if that is another."""
    update = ""
    outcome = state.outcome()
    if state.phase in _UNDER_WAY and state.staging is not None:
        update = f"{_named(state.staging)} {_UNDER_WAY[state.phase]}"
    elif outcome is not None and outcome[0] == "failed":
        update = f"{_named(outcome[1])} failed: {state.reason}"
    return {"model": _named(state.serving) if state.serving else "", "update": update}


def _named(held: Held) -> str:
    return f"{held.model} {held.sha256[:12]}"


def parser(wanted: str = "") -> argparse.ArgumentParser:
    """Return the command's parser; of the commands elsewhere only the wanted one is complete."""
    found = argparse.ArgumentParser(
        prog="shoal-agent", description="Run models on this device and keep it in its fleet."
    )
    found.add_argument("--version", action="version", version=f"shoal-agent {__version__}")
    commands = found.add_subparsers(metavar="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--config", type=Path, required=True, help="TOML file of the agent")
        return made

    command("run", "Run until SIGTERM.").set_defaults(call=_run)
    enroll = command("enroll", "Join a fleet with a token.")
    enroll.add_argument("--token", required=True, help="what `shoal devices token` printed")
    enroll.set_defaults(call=_enroll)
    status = command("status", "Say what model answers, what the spool holds and what was counted.")
    status.add_argument("-o", "--output", choices=("text", "json"), default="text")
    status.set_defaults(call=_status)
    for name, text in _ELSEWHERE.items():
        if name == wanted:
            folder = ".local.serve" if name == "serve" else f".{name}"
            importlib.import_module(folder, __package__).add_parser(commands)
        else:
            commands.add_parser(name, help=text)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 ok, 1 error, 2 usage."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser(given[0] if given else "").parse_args(given)
    try:
        status: int = arguments.call(arguments)
    except ShoalError as exc:
        print(f"error: {exc}", file=sys.stderr)
        if exc.hint:
            print(f"hint: {exc.hint}", file=sys.stderr)
        return EXIT_ERROR
    return status


if __name__ == "__main__":
    sys.exit(main())
