"""``shoal server``: make a fleet server and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from .failure import CommandError
from .target import Target, targeted

CONFIG_NAME: Final = "server.toml"
TEMPLATE: Final = """\
# Configuration of a shoal fleet server. Every key has a default that suits production except these;
# an unknown key is an error. Relative paths are relative to this file.
state_dir = "."
fleet = "{fleet}"

[listen]
enrolment = "0.0.0.0:{enrolment}"   # TLS; devices join here with a token
devices = "0.0.0.0:{devices}"     # mutual TLS; everything else
advertise = "{advertise}"   # name or address that devices use

[ca]
names = ["{advertise}"]   # in the server's certificate, besides localhost

[broker]
url = "{broker}"   # any MQTT 5 broker

[console]
port = {console}   # on loopback only, for it has no login
"""


@click.group()
def server() -> None:
    """Make a fleet server and run it."""


@server.command()
@click.option("--fleet", default="fleet", show_default=True, help="Its name; cannot be changed.")
@click.option(
    "--advertise",
    default="localhost",
    show_default=True,
    help="DNS name or address under which devices reach this machine.",
)
@click.option("--broker", default="mqtt://127.0.0.1:1883", show_default=True, metavar="URL")
@click.option("--enrolment-port", default=8461, show_default=True, type=click.IntRange(1, 65535))
@click.option("--devices-port", default=8462, show_default=True, type=click.IntRange(1, 65535))
@click.option("--console-port", default=8460, show_default=True, type=click.IntRange(1, 65535))
@targeted
def init(
    target: Target,
    fleet: str,
    advertise: str,
    broker: str,
    enrolment_port: int,
    devices_port: int,
    console_port: int,
) -> None:
    """Make the state folder with a configuration; keys and database are made at the first run."""
    from ...proto.names import check_name
    from . import output as out

    check_name(fleet, what="fleet name")
    for text in (advertise, broker):
        if not text.isprintable() or '"' in text or "\\" in text:
            raise CommandError(f"{text!r:.80} is not an address")
    path = target.state / CONFIG_NAME
    if path.exists():
        raise CommandError(f"{path} exists; nothing was changed", hint="run: shoal server run")
    target.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    target.state.chmod(0o700)
    path.write_text(
        TEMPLATE.format(
            fleet=fleet,
            advertise=advertise,
            broker=broker,
            enrolment=enrolment_port,
            devices=devices_port,
            console=console_port,
        )
    )
    click.echo(str(path))
    out.say("next, with a broker at its url:")
    out.say(f"  shoal --state {target.state} server run")


@server.command()
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Configuration; by default {CONFIG_NAME} in the state folder.",
)
@targeted
def run(target: Target, config: Path | None) -> None:
    """Run the server until SIGTERM or Ctrl-C."""
    from .. import app

    path = config or target.state / CONFIG_NAME
    if not path.exists():
        raise CommandError(f"there is no configuration {path}", hint="make one: shoal server init")
    app.run(path)
