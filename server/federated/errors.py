"""Errors of federated rounds."""

from __future__ import annotations

from ..errors import ConflictError, InvalidError


class DeltaError(InvalidError):
    """A delta is not acceptable; nothing of it entered the sum."""

    code = "server.federated.delta"


class RoundClosedError(ConflictError):
    """The round closed before the result came; the result was not used."""

    code = "server.federated.closed"


class IllegalEventError(ConflictError):
    """The table of states has no such step; nothing changed."""

    code = "server.federated.event"
