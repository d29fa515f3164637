"""``shoal audit``: the tamper-evident log."""

from __future__ import annotations

import click

from .output import output_option
from .target import Target, targeted


@click.group()
def audit() -> None:
    """The tamper-evident log."""


@audit.command()
@output_option("table", "json")
@targeted
def verify(target: Target, output: str) -> None:
    """Check every entry of the log; exits 1 if one was changed, removed or inserted."""
    from ...proto import operator_pb2 as pb
    from . import output as out

    with target.connect() as operator:
        found = operator.call("VerifyAudit", pb.VerifyAuditRequest())
    if output == "json":
        out.document({"entries": found.entries, "head_sha256": found.head_sha256})
    else:
        click.echo(f"{found.entries} entries, unbroken; head {found.head_sha256}")
