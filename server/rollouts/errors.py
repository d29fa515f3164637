"""Errors of rollouts."""

from __future__ import annotations

from ..errors import ConflictError


class IllegalEventError(ConflictError):
    """The table of states has no such step; nothing changed."""

    code = "server.rollouts.event"


class NotApprovedError(ConflictError):
    """The model is not approved; no rollout was made."""

    code = "server.rollouts.not_approved"
