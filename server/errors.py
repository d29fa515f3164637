"""Errors of the fleet server, sorted by who must act."""

from __future__ import annotations

from .. import ShoalError


class ServerError(ShoalError):
    """Root of the server's errors."""

    code = "server"


class ConfigError(ServerError):
    """The configuration is not acceptable; nothing was started. The operator must act."""

    code = "server.config"


class NotFoundError(ServerError):
    """What was asked for does not exist; nothing changed."""

    code = "server.not_found"


class ConflictError(ServerError):
    """The state of the thing forbids the request; nothing changed."""

    code = "server.conflict"


class InvalidError(ServerError):
    """The request breaks its contract; nothing changed."""

    code = "server.invalid"


class DeniedError(ServerError):
    """The caller may not do this; nothing changed."""

    code = "server.denied"


class BusyError(ServerError):
    """A bound is reached; the same call works later."""

    code = "server.busy"
    retry = True


class StoreError(ServerError):
    """The database or artefact store failed; what was not acknowledged is not stored."""

    code = "server.store"
    retry = True


class PortInUseError(ServerError):
    """An address is taken by another program; nothing was started."""

    code = "server.port_in_use"
