"""``shoal models``: list, register, approve."""

from __future__ import annotations

from pathlib import Path

import click

from .output import output_option
from .target import Target, targeted


@click.group()
def models() -> None:
    """Models: list, register, approve."""


@models.command("list")
@output_option("table", "json", "name")
@targeted
def list_(target: Target, output: str) -> None:
    """List the registered models."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        found = operator.json("ListModels", pb.ListModelsRequest())
    if output == "json":
        out.document(found)
    elif output == "name":
        out.names([f"{row['name']}:{row['version']}" for row in found["models"]])
    else:
        out.rows(
            found["models"],
            [
                ("model", lambda row: f"{row['name']}:{row['version']}"),
                ("digest", lambda row: row["sha256"][:12]),
                ("size", lambda row: f"{row['size'] / 1024:.0f} KiB"),
                ("approved (UTC)", lambda row: out.moment(row["approved_ms"])),
                ("parent", lambda row: row["parent_sha256"][:12] or "–"),
                ("note", lambda row: row["note"][:60] or "–"),
            ],
            empty="no model: register one with shoal models add, or train one",
        )


@models.command()
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Name of the model; by default the one in the bundle.")
@click.option("--note", default="", help="Free text, at most 500 characters.")
@click.option("--parent", help="Model that this one was made from.")
@targeted
def add(target: Target, bundle: Path, name: str | None, note: str, parent: str | None) -> None:
    """Register the bundle in the file BUNDLE. It may run nowhere before it is approved."""
    from ...proto import bundle as bundles
    from ...proto import operator_pb2 as pb
    from . import output as out

    found = bundles.unpack(bundle.read_bytes())
    with target.connect() as operator:
        parent_sha256 = operator.model(parent)["sha256"] if parent else ""
        sha256 = operator.upload(bundle)
        made = operator.call(
            "RegisterModel",
            pb.RegisterModelRequest(
                name=name or found.manifest.name,
                sha256=sha256,
                note=note,
                parent_sha256=parent_sha256,
            ),
        )
    click.echo(sha256)
    out.say(f"registered as {name or found.manifest.name}:{made.version}; next:")
    out.say(f"  shoal models approve {sha256[:12]}")


@models.command()
@click.argument("model")
@click.option(
    "--evidence",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file with gate results; kept with the approval.",
)
@targeted
def approve(target: Target, model: str, evidence: Path | None) -> None:
    """Sign MODEL (name, name:version or digest) into the approval metadata."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        found = operator.model(model)
        made = operator.call(
            "ApproveModel",
            pb.ApproveModelRequest(
                sha256=found["sha256"],
                evidence_json=evidence.read_bytes() if evidence else b"",
            ),
        )
    click.echo(found["sha256"])
    out.say(
        f"{found['name']}:{found['version']} is approved by targets version {made.targets_version}"
    )
