"""Faults: the one file that touches the disk, on a real one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shoal.agent.updates.errors import DamagedStateError
from shoal.agent.updates.fs import Disk, load_document, save, save_document


def test_a_document_comes_back(tmp_path: Path) -> None:
    """What is saved is loaded; before that there is nothing."""
    path = tmp_path / "state"
    assert load_document(Disk(), path) is None
    save_document(Disk(), path, {"a": 1})
    save_document(Disk(), path, {"a": [2, None, "x"]})
    assert load_document(Disk(), path) == {"a": [2, None, "x"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("cut", [0, 1, 10, 65, 70])
def test_a_torn_document_is_moved_aside(tmp_path: Path, cut: int) -> None:
    """A shorter file never reads as a document."""
    path = tmp_path / "state"
    save_document(Disk(), path, {"a": 1})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedStateError):
        load_document(Disk(), path)
    assert os.listdir(tmp_path) == ["state.damaged"]
    assert load_document(Disk(), path) is None


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO of the first fsync: the old content is still there (fault 61)."""
    path = tmp_path / "state"
    save(Disk(), path, b"old")

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        save(Disk(), path, b"new")
    assert path.read_bytes() == b"old"


def test_space_is_taken_without_growing(tmp_path: Path) -> None:
    """The size of a part is how far it has come; its blocks are there before."""
    path = tmp_path / "part"
    Disk().append(path, b"x" * 10)
    Disk().reserve(path, 1 << 20)
    assert path.stat().st_size == 10
    with pytest.raises(OSError):
        Disk().reserve(tmp_path / "huge", 1 << 60)


def test_links_are_not_read(tmp_path: Path) -> None:
    """Neither symbolic nor hard; not a pipe either, which would hang."""
    real = tmp_path / "real"
    real.write_bytes(b"x")
    (tmp_path / "soft").symlink_to(real)
    with pytest.raises(OSError):
        Disk().sha256(tmp_path / "soft")
    with pytest.raises(OSError):
        Disk().append(tmp_path / "soft", b"y")
    os.link(real, tmp_path / "hard")
    with pytest.raises(OSError):
        Disk().read(real, bytes_max=10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        Disk().sha256(tmp_path / "pipe")
    with pytest.raises(OSError):
        Disk().read(tmp_path, bytes_max=10)
    assert real.read_bytes() == b"x"


def test_reads_are_bounded(tmp_path: Path) -> None:
    """A file that grew is not read whole."""
    (tmp_path / "big").write_bytes(bytes(100))
    assert Disk().read(tmp_path / "big", bytes_max=100) == bytes(100)
    with pytest.raises(OSError, match="larger"):
        Disk().read(tmp_path / "big", bytes_max=99)
