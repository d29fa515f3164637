"""Which server a command talks to, and the options that say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from .client import Operator

STATE_DEFAULT: Final = Path("shoal-server")
SOCKET_NAME: Final = "operator.sock"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Target:
    """A server on this machine."""

    state: Path
    """Its state folder."""
    server: Path | None = None
    """Its operator socket; None = the one in the state folder."""

    @property
    def socket(self) -> Path:
        """Path of the operator socket."""
        return self.server or self.state / SOCKET_NAME

    def connect(self) -> Operator:
        """Return a connection, to be used as a context manager."""
        from .client import Operator

        return Operator(self.socket)


def targeted(command: F) -> F:
    """Let a command take ``--state`` and ``--server`` after its name too; it gets a Target."""

    @click.option("--state", type=click.Path(file_okay=False, path_type=Path), hidden=True)
    @click.option("--server", type=click.Path(dir_okay=False, path_type=Path), hidden=True)
    @click.pass_context
    @wraps(command)
    def wrapped(
        context: click.Context,
        /,
        *args: Any,
        state: Path | None,
        server: Path | None,
        **kwargs: Any,
    ) -> Any:
        found: Target = context.find_object(Target) or Target(STATE_DEFAULT)
        if state is not None or server is not None:
            found = Target(state or found.state, server)
        return command(found, *args, **kwargs)

    return wrapped  # type: ignore[return-value]  # click's decorators keep it a function
