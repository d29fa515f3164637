"""Errors of drift detection."""

from __future__ import annotations

from ..errors import ServerError


class ProfileError(ServerError):
    """A reference profile is malformed; nothing is compared with it."""

    code = "server.drift.profile"
