"""The command `shoal`: the operator's hands.

Nothing heavy is imported to print help: a command's module is loaded when the command runs, and
what a module needs of the rest of the product, inside its functions.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 error, 2 usage, 3 not found,
4 a gate failed, 5 waited too long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from ... import __version__
from .lazy import LazyGroup
from .target import STATE_DEFAULT, Target

COMMANDS: Final = {
    "server": ("server", "Make a fleet server and run it."),
    "demo": ("demo", "The whole loop on this machine, with real data and real processes."),
    "devices": ("devices", "Devices: list, let in, shut out."),
    "models": ("models", "Models: list, register, approve."),
    "rollouts": ("rollouts", "Rollouts: create, watch, pause, go back."),
    "drift": ("drift", "Which devices drift, and in which features."),
    "alerts": ("alerts", "Alerts: list, show, acknowledge, silence, resolve."),
    "train": ("train", "Central training."),
    "rounds": ("rounds", "Federated rounds."),
    "audit": ("audit", "The tamper-evident log."),
    "doctor": ("doctor", "Look for what is wrong, and say how to mend it."),
}


@click.group(
    cls=LazyGroup,
    commands_lazy=COMMANDS,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "SHOAL",
        "max_content_width": 100,
    },
)
@click.version_option(__version__, message="shoal %(version)s")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=STATE_DEFAULT,
    show_default=True,
    help="State folder of the server.",
)
@click.option(
    "--server",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Operator socket of the server; by default the one in the state folder.",
)
@click.pass_context
def main(context: click.Context, state: Path, server: Path | None) -> None:
    """Run a fleet of devices with models that get better."""
    context.obj = Target(state, server)
