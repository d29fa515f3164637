"""Errors of drift detection."""

from __future__ import annotations

from ..errors import ConflictError, ServerError


class ProfileError(ServerError):
    """A reference profile is malformed; nothing is compared with it."""

    code = "server.drift.profile"


class AlertEventError(ConflictError):
    """An alert does not take an event in its state; nothing has changed."""

    code = "server.drift.alert"
