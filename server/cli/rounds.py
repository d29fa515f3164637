"""``shoal rounds``: federated rounds."""

from __future__ import annotations

import click

from . import runs
from .output import output_option
from .target import Target, targeted


@click.group()
def rounds() -> None:
    """Federated rounds."""


@rounds.command()
@click.argument("model")
@click.option("--rounds", "count", type=click.IntRange(1, 10_000), default=30, show_default=True)
@click.option("--epochs", type=click.IntRange(1, 100), default=2, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 4096), default=32, show_default=True)
@click.option("--learning-rate", type=float, default=0.05, show_default=True)
@click.option("--proximal-mu", type=float, default=0.01, show_default=True, help="FedProx weight.")
@click.option("--clip-norm", type=float, default=0.0, help="L2 bound of a delta; 0 = none.")
@click.option(
    "--devices-min",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="A round with fewer results is void.",
)
@click.option("--deadline", "deadline_s", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--server-momentum", type=float, default=0.0, help="0 = FedAvg.")
@click.option("--watch", is_flag=True, help="Stay until it ends.")
@click.option("--timeout", "timeout_s", default=0.0, help="Give up watching after this long, s.")
@targeted
def start(
    target: Target,
    model: str,
    count: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    proximal_mu: float,
    clip_norm: float,
    devices_min: int,
    deadline_s: int,
    seed: int,
    server_momentum: float,
    watch: bool,
    timeout_s: float,
) -> None:
    """Let the devices that run MODEL make it better together."""
    from ...proto import operator_pb2 as pb

    with target.connect() as operator:
        request = pb.StartRoundsRequest(
            bundle_sha256=operator.model(model)["sha256"],
            rounds=count,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            proximal_mu=proximal_mu,
            clip_norm=clip_norm,
            devices_min=devices_min,
            deadline_s=deadline_s,
            seed=seed,
            server_momentum=server_momentum,
        )
        run_id = operator.call("StartRounds", request).run_id
        click.echo(run_id)
        if watch:
            runs.watch_to_end(operator, runs.ROUNDS, run_id, timeout_s=timeout_s)


@rounds.command()
@click.argument("run_id")
@click.option("--watch", is_flag=True, help="Stay until it ends.")
@click.option("--timeout", "timeout_s", default=0.0, help="Give up watching after this long, s.")
@output_option("table", "json", "name")
@targeted
def status(target: Target, run_id: str, watch: bool, timeout_s: float, output: str) -> None:
    """Show a run of rounds; ``-o name`` prints the digest of the candidate that it made."""
    runs.status(target, runs.ROUNDS, run_id, watch=watch, timeout_s=timeout_s, output=output)
