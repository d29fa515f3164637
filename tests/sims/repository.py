"""An approval repository and artefact server in memory, honest unless a test makes it evil.

It is a ``Remote`` of shoal.agent.updates: no file, no socket, no sleep. Whatever a test does to
``files`` or with the switches below, an honest client is served bytes in the same way. It signs
with python-tuf's own classes and shares no code with shoal.server.trust.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from shoal.agent.updates.errors import RemoteError, RemoteNotFoundError
from shoal.agent.updates.remote import Chunk
from shoal.proto.assignment import Assignment, sign

START_MS = 1_790_000_000_000
DAY_MS = 86_400_000
ROLES = ("root", "targets", "snapshot", "timestamp")


@dataclass
class FakeTime:
    """Unix ms and monotonic seconds that a test moves."""

    now_ms: int = START_MS

    def clock(self) -> int:
        """Return Unix ms."""
        return self.now_ms

    def monotonic(self) -> float:
        """Return seconds."""
        return self.now_ms / 1000

    def sleep(self, wait_s: float) -> None:
        """Let time pass."""
        self.now_ms += int(wait_s * 1000)


@dataclass
class SignedAssignment:
    """What the twin service hands to a device."""

    payload: bytes
    signature: bytes


@dataclass
class RepositorySimulator:
    """One fleet's server as its devices see it."""

    time: FakeTime = field(default_factory=FakeTime)
    chunk: int = 1000
    """Size of a chunk in bytes."""
    files: dict[str, bytes] = field(default_factory=dict)
    """What is served as metadata."""
    artefacts: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Names of metadata and (digest, offset) of artefacts, in the order of the requests."""
    # Evil and broken ways to deliver artefacts:
    tamper: Callable[[bytes], bytes] | None = None
    """Changes what is sent; the length stays as announced."""
    endless: bool = False
    """After the artefact comes more, for ever, from the middle of its last chunk on."""
    drip_s: float = 0.0
    """Seconds before every chunk."""
    cut_after: int | None = None
    """Every stream breaks off after so many chunks."""
    down: bool = False
    """Nothing is reachable."""
    director: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def __post_init__(self) -> None:
        """Make keys and the first metadata."""
        self.signers = {role: [CryptoSigner.generate_ed25519()] for role in ROLES}
        self.signers["root"] += [CryptoSigner.generate_ed25519() for _ in range(2)]
        self.root = Root(version=1, consistent_snapshot=True, expires=self.until(365))
        for role in ROLES:
            for signer in self.signers[role]:
                self.root.add_key(signer.public_key, role)
        self.root.roles["root"].threshold = 2
        self.targets = Targets(version=1, expires=self.until(365))
        self.snapshot = Snapshot(version=1, expires=self.until(7))
        self.timestamp = Timestamp(version=1, expires=self.until(1))
        self.files["1.root.json"] = self.sign(self.root, self.signers["root"][:2])
        self._publish()

    # --- what an honest operator does ------------------------------------------------------------

    def until(self, days: float) -> datetime.datetime:
        """Return a date."""
        seconds = int(self.time.now_ms / 1000 + days * 86400)
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)

    def approve(self, path: str, data: bytes) -> str:
        """Store a bundle, list it, and publish; return its digest."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.artefacts[sha256] = data
        self.targets.targets[path] = TargetFile(len(data), {"sha256": sha256}, path)
        self.targets.version += 1
        self.publish()
        return sha256

    def publish(self) -> None:
        """Sign a newer snapshot and timestamp."""
        self.snapshot.version += 1
        self.timestamp.version += 1
        self._publish()

    def rotate_root(self) -> None:
        """Replace one root key and the timestamp key by new ones, signed by two old ones."""
        old = self.signers["root"]
        self.root.version += 1
        new = CryptoSigner.generate_ed25519()
        self.root.revoke_key(old[0].public_key.keyid, "root")
        self.root.add_key(new.public_key, "root")
        self.signers["root"] = [*old[1:], new]
        fresh = CryptoSigner.generate_ed25519()
        self.root.revoke_key(self.signers["timestamp"][0].public_key.keyid, "timestamp")
        self.root.add_key(fresh.public_key, "timestamp")
        self.signers["timestamp"] = [fresh]
        name = f"{self.root.version}.root.json"
        self.files[name] = self.sign(self.root, [*old[1:], new])
        self.publish()

    def assign(self, path: str, *, counter: int, **changed: Any) -> SignedAssignment:
        """Return a signed assignment of a listed bundle, with fields changed."""
        target = self.targets.targets.get(path)
        facts: dict[str, Any] = {
            "device": "wrist-01",
            "counter": counter,
            "issued_unix_ms": self.time.now_ms,
            "expires_unix_ms": self.time.now_ms + 7 * DAY_MS,
            "model": "demo",
            "path": path,
            "sha256": target.hashes["sha256"] if target else "0" * 64,
            "length": target.length if target else 1,
            "rollout": f"rollout-{counter}",
        }
        return SignedAssignment(*sign(Assignment(**{**facts, **changed}), self.director))

    def sign(self, signed: Root | Targets | Snapshot | Timestamp, signers: list[Any]) -> bytes:
        """Return signed metadata."""
        metadata: Metadata[Any] = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def _publish(self) -> None:
        targets = self.sign(self.targets, self.signers["targets"])
        self.files[f"{self.targets.version}.targets.json"] = targets
        meta = MetaFile.from_data(self.targets.version, targets, ["sha256"])
        self.snapshot.meta = {"targets.json": meta}
        self.snapshot.expires = self.until(7)
        snapshot = self.sign(self.snapshot, self.signers["snapshot"])
        self.files[f"{self.snapshot.version}.snapshot.json"] = snapshot
        self.timestamp.snapshot_meta = MetaFile.from_data(
            self.snapshot.version, snapshot, ["sha256"]
        )
        self.timestamp.expires = self.until(1)
        self.files["timestamp.json"] = self.sign(self.timestamp, self.signers["timestamp"])

    # --- Remote ----------------------------------------------------------------------------------

    def metadata(self, name: str, *, timeout_s: float) -> bytes:
        """Return a file of metadata."""
        self.asked.append(name)
        if self.down:
            raise RemoteError("unreachable")
        if name not in self.files:
            raise RemoteNotFoundError(name)
        self._pass(self.drip_s, timeout_s)
        return self.files[name]

    def artefact(self, sha256: str, offset: int, *, timeout_s: float) -> Iterator[Chunk]:
        """Yield an artefact in chunks."""
        self.asked.append(f"{sha256[:8]}@{offset}")
        if self.down:
            raise RemoteError("unreachable")
        data = self.artefacts[sha256]
        sent = self.tamper(data) if self.tamper else data
        sent_chunks, left_s = 0, timeout_s
        while offset < len(sent) or self.endless:
            if self.cut_after is not None and sent_chunks >= self.cut_after:
                raise RemoteError("the connection broke")
            self._pass(self.drip_s, left_s)
            left_s -= self.drip_s
            piece = sent[offset : offset + self.chunk]
            if self.endless:
                piece = piece.ljust(self.chunk, b"\0")
            yield Chunk(offset, piece, len(data))
            offset += len(piece)
            sent_chunks += 1

    def _pass(self, wait_s: float, left_s: float) -> None:
        if wait_s > left_s:
            self.time.sleep(left_s)
            raise RemoteError("deadline exceeded")
        self.time.sleep(wait_s)
