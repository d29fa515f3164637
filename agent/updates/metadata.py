"""Ask the approval metadata (TUF) what a bundle must be: the client, over our own transport.

python-tuf holds the rules. What it leaves open is closed here: its clock is ours, a refresh has a
deadline, its files are fsynced, and versions are held against the device's own floor before a
word of it is believed (``floor.py``). It is imported at the first refresh: a device that is up to
date does not carry it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .config import UpdateConfig
from .errors import (
    MetadataError,
    RemoteNotFoundError,
    RollbackError,
    SlowDownloadError,
    StaleMetadataError,
    UpdateError,
)
from .floor import ROLES, Floor
from .fs import FileSystem
from .remote import Remote

if TYPE_CHECKING:
    from tuf.ngclient.fetcher import FetcherInterface
    from tuf.ngclient.updater import Updater

KEPT: Final = (*(f"{role}.json" for role in ROLES), "root_history")
URL: Final = "grpc://fleet/"  # python-tuf wants one; only the name after it is used


@dataclass(frozen=True, slots=True)
class Approved:
    """What the metadata says of one path."""

    sha256: str
    """"" = the path is not listed."""
    length: int
    versions: dict[str, int]
    """Version by role, of the metadata that says so."""


class Approvals:
    """The device's trusted set in a folder. One caller at a time."""

    def __init__(
        self,
        root: Path,
        *,
        tuf_root: bytes,
        remote: Remote,
        fs: FileSystem,
        config: UpdateConfig,
        clock: Callable[[], int],
        monotonic: Callable[[], float],
    ) -> None:
        """Prepare.

        Args:
            root: Folder of the trusted set; made if it is not there.
            tuf_root: The first root metadata, from enrolment.
            remote: The server.
            fs: The disk.
            config: The bounds.
            clock: Unix ms; decides what is expired.
            monotonic: Seconds; for the deadline.
        """
        self._root, self._tuf_root = root, tuf_root
        self._remote, self._fs, self._config = remote, fs, config
        self._clock, self._monotonic = clock, monotonic

    def lookup(self, path: str, floor: Floor) -> Approved:
        """Refresh, and return what is approved under a target path.

        Raises:
            StaleMetadataError: The newest metadata to be had is expired.
            RollbackError: It is older than this device has seen.
            MetadataError: It does not verify.
            RemoteError: The server could not be reached.
            SlowDownloadError: It took too long.
        """
        from tuf.api import exceptions

        if self._fs.make_dir(self._root):
            self._fs.sync_dir(self._root.parent)
        for name in self._fs.names(self._root):
            if name not in KEPT:
                self._fs.remove(self._root / name)  # a temporary file that a crash left
        try:
            updater = self._updater()
            updater.refresh()
            target = updater.get_targetinfo(path)
        except exceptions.ExpiredMetadataError as exc:
            raise StaleMetadataError(
                f"the approval metadata is expired: {exc}",
                hint="start the server that signs the timestamp, or check this device's clock",
            ) from exc
        except exceptions.BadVersionNumberError as exc:
            raise RollbackError(f"the approval metadata went back: {exc}") from exc
        except exceptions.DownloadError as exc:
            if isinstance(exc.__cause__, UpdateError):
                raise exc.__cause__ from exc
            raise MetadataError(f"the approval metadata is not acceptable: {exc}") from exc
        except (exceptions.RepositoryError, ValueError, OSError) as exc:
            raise MetadataError(f"the approval metadata does not verify: {exc!s:.300}") from exc
        versions = _versions(updater)
        floor.check_versions(versions)
        self._sync()
        if target is None:
            return Approved("", 0, versions)
        return Approved(target.hashes.get("sha256", ""), target.length, versions)

    def _updater(self) -> Updater:
        from tuf.ngclient.config import UpdaterConfig
        from tuf.ngclient.updater import Updater

        deadline_s = self._monotonic() + self._config.metadata_deadline_s
        updater = Updater(
            str(self._root),
            URL,
            fetcher=_fetcher(self._remote, self._config, deadline_s, self._monotonic),
            config=UpdaterConfig(snapshot_max_length=512_000, targets_max_length=512_000),
            bootstrap=self._tuf_root,
        )
        # python-tuf has no argument for the time; tuf 7 keeps it here, and a test watches that.
        updater._trusted_set.reference_time = datetime.datetime.fromtimestamp(
            self._clock() / 1000, datetime.UTC
        )
        return updater

    def _sync(self) -> None:
        for folder in (self._root / "root_history", self._root):
            for name in self._fs.names(folder):
                if (folder / name).is_file() and not (folder / name).is_symlink():
                    self._fs.sync(folder / name)
            self._fs.sync_dir(folder)


def _versions(updater: Updater) -> dict[str, int]:
    trusted = updater._trusted_set
    return {
        "root": trusted.root.version,
        "timestamp": trusted.timestamp.version,
        "snapshot": trusted.snapshot.version,
        "targets": trusted.targets.version,
    }


def _fetcher(
    remote: Remote, config: UpdateConfig, deadline_s: float, monotonic: Callable[[], float]
) -> FetcherInterface:
    from tuf.api import exceptions
    from tuf.ngclient.fetcher import FetcherInterface

    class Fetcher(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                raise SlowDownloadError("the approval metadata took too long")
            name = url.removeprefix(URL)
            try:
                return iter(
                    (remote.metadata(name, timeout_s=min(left_s, config.metadata_timeout_s)),)
                )
            except RemoteNotFoundError as exc:
                # Client workflow 5.3.3: a next root that is not there ends the chain. Whoever
                # hides a newer one is found by the floor or by expiry (fault 12).
                raise exceptions.DownloadHTTPError(str(exc), 404) from exc

    return Fetcher()
