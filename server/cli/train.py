"""``shoal train``: central training."""

from __future__ import annotations

from pathlib import Path

import click

from . import runs
from .output import output_option
from .target import Target, targeted


@click.group()
def train() -> None:
    """Central training."""


@train.command()
@click.argument("name")
@click.argument("dataset", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--epochs", type=click.IntRange(min=0), default=0, help="0 = the server's default.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--note", default="", help="Free text, at most 500 characters.")
@click.option("--watch", is_flag=True, help="Stay until it ends.")
@click.option("--timeout", "timeout_s", default=0.0, help="Give up watching after this long, s.")
@targeted
def start(
    target: Target,
    name: str,
    dataset: Path,
    epochs: int,
    seed: int,
    note: str,
    watch: bool,
    timeout_s: float,
) -> None:
    """Train the model NAME on the windows in the file DATASET (.npz)."""
    from ...proto import operator_pb2 as pb
    from ..learning.dataset import read_dataset

    with target.connect() as operator:
        read_dataset(dataset)  # the server checks it too, but only when the run's turn comes
        request = pb.StartTrainingRequest(
            name=name, dataset_sha256=operator.upload(dataset), epochs=epochs, seed=seed, note=note
        )
        run_id = operator.call("StartTraining", request).run_id
        click.echo(run_id)
        if watch:
            runs.watch_to_end(operator, runs.TRAINING, run_id, timeout_s=timeout_s)


@train.command()
@click.argument("run_id")
@click.option("--watch", is_flag=True, help="Stay until it ends.")
@click.option("--timeout", "timeout_s", default=0.0, help="Give up watching after this long, s.")
@output_option("table", "json", "name")
@targeted
def status(target: Target, run_id: str, watch: bool, timeout_s: float, output: str) -> None:
    """Show a training; ``-o name`` prints the digest of the model that it made."""
    runs.status(target, runs.TRAINING, run_id, watch=watch, timeout_s=timeout_s, output=output)
