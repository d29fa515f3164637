"""How a command fails: two lines on stderr, and an exit code that a script can act on."""

from __future__ import annotations

from enum import IntEnum
from typing import IO, Any

import click

from ... import ShoalError


class Status(IntEnum):
    """Exit codes."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_FOUND = 3
    GATE_FAILED = 4
    TIMEOUT = 5


class CommandError(ShoalError):
    """A command could not do what it was asked; the message says what state things are in."""

    code = "server.cli"

    def __init__(self, message: str, *, hint: str = "", status: Status = Status.ERROR) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class Failure(click.ClickException):
    """What click shows and exits with."""

    def __init__(self, exc: ShoalError) -> None:
        super().__init__(str(exc))
        self.hint, self._status = exc.hint, status_of(exc)

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # click has a constant here
        """The process's exit code."""
        return int(self._status)

    def show(self, file: IO[Any] | None = None) -> None:
        """Say what happened, and what to do."""
        click.echo(f"error: {self.message}", err=True)
        if self.hint:
            click.echo(f"hint: {self.hint}", err=True)


def status_of(exc: ShoalError) -> Status:
    """Return the exit code of an error."""
    if isinstance(exc, CommandError):
        return exc.status
    return Status.NOT_FOUND if exc.code == "server.not_found" else Status.ERROR
