"""The approval repository (TUF): the list of bundles that may run anywhere in the fleet.

    keys/offline/root-1.pem … root-3.pem   root, 2 of 3 sign
    keys/offline/targets.pem               approves bundles
    keys/snapshot.pem, keys/timestamp.pem  online: say what is newest, and that it still is
    metadata/                              what devices fetch

**In production, move ``keys/offline/`` to another machine or a medium in a drawer** once the
repository exists. The server runs without it for as long as root and targets live (a year by
default); approving then needs it: ``Approval(..., offline=<folder>)``, ``--keys`` on the command
line. Whoever steals the online keys can withhold updates and cannot add a bundle (fault 14).

Files of a version are written before the ``timestamp.json`` that leads to them: a crash in
between leaves the old state, and the next approval writes over what it left.
"""

from __future__ import annotations

import datetime
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from ...proto.names import check_digest, check_name
from ..errors import ConfigError, ConflictError, InvalidError, NotFoundError, StoreError
from . import files

T = TypeVar("T", Root, Timestamp, Snapshot, Targets)
ROOTS: Final = ("root-1", "root-2", "root-3")
THRESHOLD: Final = 2
HOUR_MS: Final = 3_600_000
_NAME: Final = re.compile(r"[0-9a-z][0-9a-z.-]{0,79}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalConfig:
    """How long signatures say that something is still so."""

    offline_days: int = 365
    """Life of root and targets."""
    snapshot_days: int = 7
    """Life of a snapshot; signed again when half of it is over."""
    timestamp_hours: int = 24
    """Life of a timestamp: for so long can a device be kept from news without noticing."""
    versions_kept: int = 8
    """Old versions of targets and snapshot that stay, for devices in the middle of a refresh."""

    def __post_init__(self) -> None:
        """Check the limits."""
        lives = (self.offline_days, self.snapshot_days, self.timestamp_hours, self.versions_kept)
        if min(lives) < 1:
            raise ValueError("lives of metadata and versions_kept must be at least 1")


def target_path(model: str, sha256: str) -> str:
    """Return the path under which a bundle is approved and assigned."""
    check_name(model, what="model name")
    return f"models/{model}/{check_digest(sha256)}.shoal"


class Approval:
    """The repository of one fleet. Thread-safe."""

    def __init__(
        self,
        root: Path,
        *,
        config: ApprovalConfig,
        clock: Callable[[], int],
        offline: Path | None = None,
    ) -> None:
        """Prepare.

        Args:
            root: The server's state folder.
            config: Lives of metadata.
            clock: Unix ms.
            offline: Folder of the offline keys, if it is not ``keys/offline`` there.
        """
        self._keys, self._metadata = root / "keys", root / "metadata"
        self._offline = offline or self._keys / "offline"
        self._config, self._clock = config, clock
        self._lock = threading.Lock()

    def initialise(self) -> None:
        """Make keys and first metadata, unless they are there; safe to repeat after a crash."""
        with self._lock:
            if (self._metadata / "timestamp.json").exists():
                return
            for folder in (self._keys, self._offline, self._metadata):
                files.make_private_dir(folder)
            for name in (*ROOTS, "targets"):
                _make_key(self._offline / f"{name}.pem")
            for name in ("snapshot", "timestamp"):
                _make_key(self._keys / f"{name}.pem")
            self._write_root()
            self._write_from_targets(Targets(version=1))

    @property
    def root_bytes(self) -> bytes:
        """The first root metadata: what a device trusts from its enrolment on."""
        return self.metadata("1.root.json")

    def metadata(self, name: str) -> bytes:
        """Return a file of metadata by its name in the repository.

        Raises:
            InvalidError: No such name is possible.
            NotFoundError: There is none of that name.
        """
        if not _NAME.fullmatch(name) or not name.endswith(".json"):
            raise InvalidError(f"{name!r:.90} is not a name of metadata")
        try:
            return (self._metadata / name).read_bytes()
        except FileNotFoundError as exc:
            raise NotFoundError(f"there is no metadata {name}") from exc

    def approve(self, path: str, sha256: str, length: int, custom: dict[str, Any]) -> int:
        """Let a bundle run in the fleet; approving it again changes nothing.

        Args:
            path: ``target_path(...)``.
            sha256: Of the bundle.
            length: Of the bundle, bytes.
            custom: JSON facts for people that are signed with it.

        Returns:
            Version of the targets metadata that lists it.

        Raises:
            ConfigError: The offline keys are not here.
            ConflictError: The path is approved with another hash or length.
        """
        check_digest(sha256)
        if length < 1:
            raise InvalidError(f"a bundle of {length} bytes cannot be approved")
        with self._lock:
            targets = self._current()[2]
            known = targets.targets.get(path)
            if known is not None:
                if known.hashes != {"sha256": sha256} or known.length != length:
                    raise ConflictError(f"{path} is approved with another hash or length")
                return targets.version
            fields = {"custom": custom} if custom else {}
            targets.targets[path] = TargetFile(length, {"sha256": sha256}, path, fields)
            targets.version += 1
            self._write_from_targets(targets)
            return targets.version

    def refresh(self, now_ms: int) -> bool:
        """Sign snapshot and timestamp again if half of their life is over.

        Returns:
            Whether anything was signed.
        """
        with self._lock:
            timestamp, snapshot, targets = self._current()
            if _is_fresh(snapshot, now_ms, self._config.snapshot_days * 24 * HOUR_MS):
                if _is_fresh(timestamp, now_ms, self._config.timestamp_hours * HOUR_MS):
                    return False
                self._write_timestamp(timestamp.version + 1, timestamp.snapshot_meta)
                return True
            meta = snapshot.meta["targets.json"]
            assert meta.version == targets.version
            self._write_snapshot(snapshot.version + 1, timestamp.version + 1, meta)
            return True

    # --- writing, in the order in which a device reads it backwards ------------------------------

    def _write_root(self) -> None:
        root = Root(version=1, consistent_snapshot=True)
        root.expires = self._until(self._config.offline_days * 24)
        roots = [self._signer(self._offline, name) for name in ROOTS]
        for signer in roots:
            root.add_key(signer.public_key, "root")
        root.roles["root"].threshold = THRESHOLD
        root.add_key(self._signer(self._offline, "targets").public_key, "targets")
        for role in ("snapshot", "timestamp"):
            root.add_key(self._signer(self._keys, role).public_key, role)
        self._write("1.root.json", root, roots[:THRESHOLD])

    def _write_from_targets(self, targets: Targets) -> None:
        targets.expires = self._until(self._config.offline_days * 24)
        name = f"{targets.version}.targets.json"
        data = self._write(name, targets, [self._signer(self._offline, "targets")])
        timestamp, snapshot = 1, 1
        if (self._metadata / "timestamp.json").exists():
            current = self._current()
            timestamp, snapshot = current[0].version + 1, current[1].version + 1
        self._write_snapshot(snapshot, timestamp, _meta(targets.version, data))

    def _write_snapshot(self, version: int, timestamp: int, targets: MetaFile) -> None:
        snapshot = Snapshot(version=version, meta={"targets.json": targets})
        snapshot.expires = self._until(self._config.snapshot_days * 24)
        name = f"{version}.snapshot.json"
        data = self._write(name, snapshot, [self._signer(self._keys, "snapshot")])
        self._write_timestamp(timestamp, _meta(version, data))
        self._prune(version, targets.version)

    def _write_timestamp(self, version: int, snapshot: MetaFile) -> None:
        timestamp = Timestamp(version=version, snapshot_meta=snapshot)
        timestamp.expires = self._until(self._config.timestamp_hours)
        self._write("timestamp.json", timestamp, [self._signer(self._keys, "timestamp")])

    def _write(self, name: str, signed: T, signers: list[CryptoSigner]) -> bytes:
        metadata = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        data = metadata.to_bytes()
        files.write(self._metadata / name, data)
        return data

    def _prune(self, snapshot: int, targets: int) -> None:
        for path in self._metadata.glob("*.*.json"):
            version, role = path.name.split(".")[:2]
            newest = {"snapshot": snapshot, "targets": targets}.get(role)
            if newest is not None and int(version) <= newest - self._config.versions_kept:
                path.unlink()

    # --- reading ---------------------------------------------------------------------------------

    def _current(self) -> tuple[Timestamp, Snapshot, Targets]:
        """Return what timestamp.json leads to."""
        timestamp = self._read("timestamp.json", Timestamp)
        snapshot = self._read(f"{timestamp.snapshot_meta.version}.snapshot.json", Snapshot)
        targets = self._read(f"{snapshot.meta['targets.json'].version}.targets.json", Targets)
        return timestamp, snapshot, targets

    def _read(self, name: str, kind: type[T]) -> T:
        try:
            return Metadata[T].from_bytes((self._metadata / name).read_bytes()).signed
        except (OSError, RepositoryError, ValueError) as exc:
            raise StoreError(
                f"the approval metadata {name} cannot be read: {exc!s:.200}",
                hint="restore the folder `metadata` from its backup",
            ) from exc

    def _signer(self, folder: Path, name: str) -> CryptoSigner:
        path = folder / f"{name}.pem"
        if folder == self._offline and not path.exists():
            raise ConfigError(
                f"the offline key {name} is not in {folder}",
                hint="give the folder of the offline keys with --keys",
            )
        return CryptoSigner(files.read_key(path))

    def _until(self, hours: int) -> datetime.datetime:
        seconds = self._clock() // 1000 + hours * 3600
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _make_key(path: Path) -> None:
    if not path.exists():
        files.write_key(path, Ed25519PrivateKey.generate())


def _meta(version: int, data: bytes) -> MetaFile:
    return MetaFile.from_data(version, data, ["sha256"])


def _is_fresh(signed: Snapshot | Timestamp, now_ms: int, life_ms: int) -> bool:
    return now_ms < signed.expires.timestamp() * 1000 - life_ms / 2
