"""What this device has seen, so that nothing older is ever accepted again.

    floor   {metadata versions, assignment counter and digest, latest signed time}, checksummed

python-tuf keeps its own trusted set but does not fsync it: with two of its files emptied by a
power cut it takes an old timestamp (fault 5, measured). This floor is saved before anything is
acted on. Time is raised by signed times only: a clock that once ran ahead must not lock the
device out for ever.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from ...proto.assignment import Assignment
from .errors import AssignmentError, ClockError, ReplayError, RollbackError
from .fs import FileSystem, load_document, save_document

ROLES: Final = ("root", "timestamp", "snapshot", "targets")


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The newest of everything; only ever rises."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0
    counter: int = 0
    """Of the newest approved assignment."""
    sha256: str = ""
    """What it assigned."""
    latest_ms: int = 0
    """Latest signed time, Unix ms."""

    def check_clock(self, now_ms: int, *, skew_ms: int) -> None:
        """Check that the clock is not behind what was signed.

        Raises:
            ClockError: It is; expiry means nothing then (fault 65).
        """
        if now_ms + skew_ms < self.latest_ms:
            raise ClockError(
                f"this device's clock is {(self.latest_ms - now_ms) // 1000} s behind a signed "
                "time it has seen",
                hint="set the clock; updates wait until it is right",
            )

    def check_assignment(
        self, assignment: Assignment, *, device: str, now_ms: int, skew_ms: int
    ) -> None:
        """Check that a verified assignment is for this device, now, and not a replay.

        The newest assignment may come again, so that a download resumes and a lost bundle is
        fetched once more; it then names the same bundle.

        Raises:
            ClockError: The assignment was signed in this clock's future.
            ReplayError: This device has seen a newer one, or another with this counter.
            AssignmentError: It is for another device, or expired.
        """
        if assignment.device != device:
            raise AssignmentError(f"the assignment is for {assignment.device}, not for {device}")
        same = assignment.counter == self.counter and assignment.sha256 == self.sha256
        if assignment.counter <= self.counter and not same:
            raise ReplayError(
                f"assignment {assignment.counter} is not newer than {self.counter}, which this "
                "device has seen"
            )
        replace(self, latest_ms=assignment.issued_unix_ms).check_clock(now_ms, skew_ms=skew_ms)
        if now_ms >= assignment.expires_unix_ms:
            raise AssignmentError(
                f"assignment {assignment.counter} expired "
                f"{(now_ms - assignment.expires_unix_ms) // 1000} s ago",
                hint="the server signs a new one when the device asks again",
            )

    def check_versions(self, versions: dict[str, int]) -> None:
        """Check that no role's metadata is older than what was seen.

        Raises:
            RollbackError: One is; the message has both versions.
        """
        for role in ROLES:
            if versions[role] < getattr(self, role):
                raise RollbackError(
                    f"{role} metadata is version {versions[role]}, this device has seen "
                    f"{getattr(self, role)}"
                )

    def raised(self, versions: dict[str, int], assignment: Assignment) -> Floor:
        """Return the floor after an assignment was checked against metadata of these versions."""
        return Floor(
            **{role: max(versions[role], getattr(self, role)) for role in ROLES},
            counter=assignment.counter,
            sha256=assignment.sha256,
            latest_ms=max(self.latest_ms, assignment.issued_unix_ms),
        )


def load(fs: FileSystem, path: Path) -> Floor:
    """Return the saved floor; the lowest one if there is none.

    Raises:
        DamagedStateError: It was rotten and moved aside.
    """
    document = load_document(fs, path)
    return Floor(**document) if document is not None else Floor()


def save(fs: FileSystem, path: Path, floor: Floor) -> None:
    """Save the floor and return when it is durable."""
    save_document(fs, path, asdict(floor))
