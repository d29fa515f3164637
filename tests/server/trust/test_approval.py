"""The approval repository: read by python-tuf's own client rules, written durably.

The device's side of it, and a repository that lies, are in tests/agent/updates.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.agent.updates import UpdateConfig
from shoal.agent.updates.errors import RemoteNotFoundError, StaleMetadataError
from shoal.agent.updates.floor import Floor
from shoal.agent.updates.fs import Disk
from shoal.agent.updates.metadata import Approvals, Approved
from shoal.agent.updates.remote import Chunk
from shoal.server.errors import (
    ConfigError,
    ConflictError,
    InvalidError,
    NotFoundError,
    StoreError,
)
from shoal.server.trust import files
from shoal.server.trust.approval import Approval, ApprovalConfig, target_path

START_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
DIGEST = "ab" * 32
PATH = target_path("demo", DIGEST)


@dataclass
class Repository:
    """The repository and one device that reads it."""

    root: Path
    now_ms: int = START_MS

    def __post_init__(self) -> None:
        """Make it."""
        self.approval = self.open()
        self.approval.initialise()
        self.first = self.approval.root_bytes

    def open(self, offline: Path | None = None) -> Approval:
        """Return it as a new process would see it."""
        config = ApprovalConfig(versions_kept=3)
        return Approval(self.root / "state", config=config, clock=self.clock, offline=offline)

    def clock(self) -> int:
        """Return Unix ms."""
        return self.now_ms

    def metadata(self, name: str, *, timeout_s: float) -> bytes:
        """Serve a device."""
        try:
            return self.approval.metadata(name)
        except NotFoundError as exc:
            raise RemoteNotFoundError(str(exc)) from exc

    def artefact(self, sha256: str, offset: int, *, timeout_s: float) -> Iterator[Chunk]:
        """Not asked for here."""
        raise AssertionError

    def lookup(self, path: str = PATH) -> Approved:
        """Ask as a device that keeps its trusted set."""
        self.root.joinpath("device").mkdir(exist_ok=True)
        approvals = Approvals(
            self.root / "device" / "metadata", tuf_root=self.first, remote=self,
            fs=Disk(), config=UpdateConfig(), clock=self.clock, monotonic=lambda: 0.0,
        )  # fmt: skip
        return approvals.lookup(path, Floor())


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A new repository."""
    return Repository(tmp_path)


def test_a_device_reads_what_was_approved(repository: Repository) -> None:
    """And nothing that was not."""
    assert repository.lookup().sha256 == ""
    version = repository.approval.approve(PATH, DIGEST, 100, {"version": "1"})
    found = repository.lookup()
    assert (found.sha256, found.length, found.versions["targets"]) == (DIGEST, 100, version)
    assert repository.lookup(target_path("demo", "cd" * 32)).sha256 == ""


def test_approving_twice_changes_nothing(repository: Repository) -> None:
    """The same facts are the same approval; other facts under the path are refused."""
    version = repository.approval.approve(PATH, DIGEST, 100, {})
    before = repository.approval.metadata("timestamp.json")
    assert repository.approval.approve(PATH, DIGEST, 100, {}) == version
    assert repository.approval.metadata("timestamp.json") == before
    with pytest.raises(ConflictError):
        repository.approval.approve(PATH, DIGEST, 101, {})
    with pytest.raises(InvalidError):
        repository.approval.approve(PATH, DIGEST, 0, {})


def test_it_stays_fresh_without_the_offline_keys(repository: Repository, tmp_path: Path) -> None:
    """Production moves them away: the server signs on, but cannot approve any more."""
    repository.approval.approve(PATH, DIGEST, 100, {})
    drawer = tmp_path / "drawer"
    shutil.move(repository.root / "state/keys/offline", drawer)
    for _ in range(30):
        repository.now_ms += 12 * HOUR_MS
        repository.approval.refresh(repository.now_ms)
        assert repository.lookup().sha256 == DIGEST
    other = target_path("demo", "cd" * 32)
    with pytest.raises(ConfigError) as caught:
        repository.approval.approve(other, "cd" * 32, 100, {})
    assert "--keys" in caught.value.hint
    assert repository.lookup().sha256 == DIGEST
    repository.open(offline=drawer).approve(other, "cd" * 32, 100, {})
    assert repository.lookup(other).sha256 == "cd" * 32


def test_without_refresh_it_goes_stale(repository: Repository) -> None:
    """A day without the server, and devices install nothing."""
    repository.approval.approve(PATH, DIGEST, 100, {})
    assert not repository.approval.refresh(repository.now_ms + 11 * HOUR_MS)
    repository.now_ms += 25 * HOUR_MS
    with pytest.raises(StaleMetadataError):
        repository.lookup()
    assert repository.approval.refresh(repository.now_ms)
    assert repository.lookup().sha256 == DIGEST


def test_a_crash_between_two_files_leaves_the_old_state(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file that is written: devices see the old state, and approving works again."""
    write = files.write
    for number in range(3):
        count = 0

        def dies(path: Path, data: bytes, last: int = number) -> None:
            nonlocal count
            if count == last:
                raise StoreError("power cut")
            count += 1
            write(path, data)

        digest = f"{number:064x}"
        with monkeypatch.context() as patch:
            patch.setattr(files, "write", dies)
            with pytest.raises(StoreError):
                repository.approval.approve(target_path("demo", digest), digest, 1, {})
        assert repository.lookup(target_path("demo", digest)).sha256 == ""
        repository.open().approve(target_path("demo", digest), digest, 1, {})
        assert repository.lookup(target_path("demo", digest)).sha256 == digest


def test_making_it_is_safe_to_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at any file of the first start; the second one completes it."""
    write = files.write
    for number in range(10):
        root, count = tmp_path / str(number), 0

        def dies(path: Path, data: bytes, last: int = number) -> None:
            nonlocal count
            if count == last:
                raise StoreError("power cut")
            count += 1
            write(path, data)

        root.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(files, "write", dies)
            with pytest.raises(StoreError):
                Repository(root)
        repository = Repository(root)
        repository.approval.approve(PATH, DIGEST, 1, {})
        assert repository.lookup().sha256 == DIGEST


def test_old_versions_go(repository: Repository) -> None:
    """The folder is bounded: three versions of snapshot and targets."""
    for number in range(10):
        digest = f"{number:064x}"
        repository.approval.approve(target_path("demo", digest), digest, 1, {})
    names = [path.name for path in (repository.root / "state/metadata").iterdir()]
    assert len([name for name in names if "snapshot" in name]) == 3
    assert len([name for name in names if "targets" in name]) == 3
    assert repository.lookup(target_path("demo", f"{9:064x}")).length == 1


def test_names_are_checked(repository: Repository) -> None:
    """No path gets out of the folder, and keys are not metadata."""
    for name in ("../keys/timestamp.pem", "..", "", "a/b.json", "timestamp.pem", "x" * 90):
        with pytest.raises(InvalidError):
            repository.approval.metadata(name)
    with pytest.raises(NotFoundError):
        repository.approval.metadata("2.root.json")


def test_keys_are_for_the_owner_alone(repository: Repository) -> None:
    """Mode 0600 in folders of mode 0700; another mode stops the signing."""
    keys = sorted((repository.root / "state/keys").rglob("*.pem"))
    assert len(keys) == 6
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    (repository.root / "state/keys/offline/targets.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        repository.approval.approve(PATH, DIGEST, 1, {})
