"""Download an artefact into a part file: resumable, bounded in length and in time.

The hash is not looked at here: what is in the part file proves itself later. What is bounded:
the length (at most one chunk more than the bundle has ever comes, and none of it is written),
the total time, and the average rate, so that a drip feed ends (fault 10). A stream's own deadline
is when the average would be too low even if the rest came at once: silence ends there too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from .config import UpdateConfig
from .errors import EndlessDataError, RemoteError, SlowDownloadError, SpaceError
from .fs import FileSystem
from .remote import Remote


def allowed_s(config: UpdateConfig, size: int) -> float:
    """Return how long ``size`` bytes may take, in seconds, from the start of a download."""
    return min(config.deadline_s, config.grace_s + size / config.rate_bytes_s_min)


def download(
    remote: Remote,
    sha256: str,
    length: int,
    part: Path,
    *,
    fs: FileSystem,
    config: UpdateConfig,
    monotonic: Callable[[], float],
    sleep: Callable[[float], None],
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Complete a part file.

    Args:
        remote: The server.
        sha256: The artefact.
        length: Its length in bytes, from signed metadata.
        part: The file; what it has already is kept.
        fs: The disk.
        config: The bounds.
        monotonic: Seconds, for the bounds.
        sleep: Waits some seconds between two attempts.
        stopped: Whether to break off; asked at every chunk.

    Returns:
        Whether the file had bytes from an earlier download, which a power cut may have torn.

    Raises:
        EndlessDataError: More bytes came than ``length``, or other ones than asked for.
        SlowDownloadError: Too slow; the part is kept.
        RemoteError: The server broke off too often; the part is kept.
        SpaceError: The disk has no room; nothing was downloaded.
    """
    held = fs.size(part) or 0
    if held > length:
        fs.remove(part)
        held = 0
    resumed = held > 0
    if held == length:
        return resumed
    _reserve(fs, part, length)
    start_s, received, attempt = monotonic(), 0, 0
    while True:
        left_s = start_s + allowed_s(config, received + length - held) - monotonic()
        try:
            if left_s <= 0:
                raise SlowDownloadError(f"{received} bytes in {monotonic() - start_s:.0f} s")
            for chunk in remote.artefact(sha256, held, timeout_s=left_s):
                if chunk.offset != held or chunk.length != length or not chunk.data:
                    raise EndlessDataError(
                        f"the server sends {chunk.length} bytes from {chunk.offset}, the bundle "
                        f"has {length} and {held} are here"
                    )
                if held + len(chunk.data) > length:
                    raise EndlessDataError(f"more than the bundle's {length} bytes came")
                fs.append(part, chunk.data)
                held += len(chunk.data)
                received += len(chunk.data)
                attempt = 0
                if held == length:
                    return resumed
                if stopped():
                    raise RemoteError("the download was stopped")
                if monotonic() - start_s > allowed_s(config, received):
                    raise SlowDownloadError(f"{received} bytes in {monotonic() - start_s:.0f} s")
            raise RemoteError(f"the server ended after {held} of {length} bytes")
        except RemoteError as exc:
            attempt += 1
            if attempt >= config.attempts_max or stopped():
                raise
            sleep(max(exc.retry_after_s, config.retry_s * 2 ** (attempt - 1)))
        except OSError as exc:
            raise _space(exc, length) from exc


def _reserve(fs: FileSystem, part: Path, length: int) -> None:
    try:
        fs.reserve(part, length)
    except OSError as exc:
        fs.remove(part)
        raise _space(exc, length) from exc


def _space(exc: OSError, length: int) -> Exception:
    if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return exc
    return SpaceError(
        f"there is no room on the disk for a bundle of {length} bytes",
        hint="free space on the file system of state_dir; the update resumes by itself",
    )
