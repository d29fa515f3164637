"""Errors of updates, sorted by who must act.

After every one of them the active model is untouched and keeps serving.
"""

from __future__ import annotations

from ..errors import AgentError


class UpdateError(AgentError):
    """Root of the errors of updates."""

    code = "agent.update"


class UpdateBusyError(UpdateError):
    """A trial is in progress; nothing changed. The assignment is applied when it is over."""

    code = "agent.update.busy"
    retry = True


# --- the server must act: what it says is not acceptable ---------------------------------------


class AssignmentError(UpdateError):
    """An assignment is not for this device, expired, or not the director's; it was dropped."""

    code = "agent.update.assignment"


class ReplayError(AssignmentError):
    """An assignment is older than one this device has seen; it was dropped."""

    code = "agent.update.replay"


class NotApprovedError(UpdateError):
    """The approval metadata does not list the assigned bundle; nothing was downloaded."""

    code = "agent.update.not_approved"


class MetadataError(UpdateError):
    """Approval metadata did not verify; the old trusted set is kept."""

    code = "agent.update.metadata"


class RollbackError(MetadataError):
    """Approval metadata is older than what this device has seen; the old set is kept."""

    code = "agent.update.rollback"


class StaleMetadataError(MetadataError):
    """The newest approval metadata to be had is expired; nothing is installed until it is not."""

    code = "agent.update.stale_metadata"
    retry = True


class BundleRejectedError(UpdateError):
    """A bundle failed a check; it is remembered as failed and not tried again."""

    code = "agent.update.rejected"


class EndlessDataError(BundleRejectedError):
    """The server sent more bytes than the bundle has; the download was thrown away."""

    code = "agent.update.endless"


# --- nobody must act: the same works later -----------------------------------------------------


class RemoteError(UpdateError):
    """The server could not be reached or broke off; what was downloaded is kept."""

    code = "agent.update.remote"
    retry = True

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class RemoteNotFoundError(RemoteError):
    """The server has no file of that name."""

    code = "agent.update.not_found"


class SlowDownloadError(UpdateError):
    """The server sends slower than the bound; what was downloaded is kept."""

    code = "agent.update.slow"
    retry = True


# --- the operator must act ---------------------------------------------------------------------


class ClockError(UpdateError):
    """This device's clock is behind a signed time it has seen; nothing is judged by it."""

    code = "agent.update.clock"
    retry = True


class SpaceError(UpdateError):
    """The disk has no room for the bundle; nothing was downloaded."""

    code = "agent.update.space"
    retry = True


class DamagedStateError(UpdateError):
    """A file of state does not match its checksum; it was moved aside."""

    code = "agent.update.damaged"


class IllegalEventError(UpdateError):
    """The table of states has no such step; nothing changed."""

    code = "agent.update.illegal_event"
