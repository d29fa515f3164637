"""The artefact store: what is there is whole, what is refused leaves nothing."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.proto.errors import ContractError
from shoal.server.errors import BusyError, InvalidError, NotFoundError, StoreError
from shoal.server.registry import ArtefactConfig, Artefacts
from shoal.server.store import Store
from tests.sims.stores import fresh_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return an empty database."""
    found = fresh_store(tmp_path / "fleet.db")
    yield found
    found.close()


def make(store: Store, root: Path, **bounds: int) -> Artefacts:
    """Return an artefact store."""
    return Artefacts(root / "artefacts", store, clock=lambda: 7, config=ArtefactConfig(**bounds))


def files(root: Path) -> list[Path]:
    """Return every file of the artefact store."""
    return [path for path in (root / "artefacts").rglob("*") if path.is_file()]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=5))
def test_what_was_put_comes_back(store: Store, tmp_path: Path, chunks: list[bytes]) -> None:
    """Chunked or whole, the same bytes have the same name and are stored once."""
    artefacts, data = make(store, tmp_path), b"".join(chunks)
    sha256 = artefacts.put(iter(chunks), "dataset")
    assert sha256 == artefacts.put(data, "dataset") == hashlib.sha256(data).hexdigest()
    assert artefacts.read(sha256, bytes_max=len(data)) == data
    assert artefacts.size(sha256) == len(data)
    with artefacts.open(sha256) as file:
        assert file.read() == data
    assert stat.S_IMODE(artefacts.path(sha256).stat().st_mode) == 0o600


def test_what_is_too_much_is_refused_while_it_comes(store: Store, tmp_path: Path) -> None:
    """An endless upload is stopped at the bound, and leaves no file."""
    artefacts, taken = make(store, tmp_path, bytes_max=1000, total_bytes_max=1500), [0]

    def endless() -> Iterator[bytes]:
        while True:
            taken[0] += 1
            yield b"x" * 100

    with pytest.raises(InvalidError, match="exceeds 1000 bytes"):
        artefacts.put(endless(), "dataset")
    assert taken[0] == 11
    artefacts.put(b"a" * 1000, "dataset")
    with pytest.raises(BusyError, match="full"):
        artefacts.put(b"b" * 600, "dataset")
    assert len(files(tmp_path)) == 1
    # What was refused is not counted, and what is deleted makes room.
    first = artefacts.put(b"c" * 500, "dataset")
    artefacts.delete(first)
    artefacts.put(b"d" * 500, "dataset")
    # A store that is opened anew counts what is there.
    with pytest.raises(BusyError):
        make(store, tmp_path, bytes_max=1000, total_bytes_max=1500).put(b"e", "dataset")


@pytest.mark.parametrize("digest", ["", "../" * 20 + "a" * 4, "A" * 64, "a" * 63, "a/" * 32])
def test_only_digests_are_paths(store: Store, tmp_path: Path, digest: str) -> None:
    """Nothing but 64 lowercase hex digits reaches the file system."""
    artefacts = make(store, tmp_path)
    for call in (artefacts.path, artefacts.size, artefacts.open, artefacts.delete):
        with pytest.raises(ContractError):
            call(digest)


def test_damage_on_disk_is_told(store: Store, tmp_path: Path) -> None:
    """A file that changed its length is not opened; one that changed its bytes is not read."""
    artefacts = make(store, tmp_path)
    sha256 = artefacts.put(b"12345", "bundle")
    artefacts.path(sha256).write_bytes(b"12346")
    with pytest.raises(StoreError, match="damaged"):
        artefacts.read(sha256, bytes_max=10)
    artefacts.path(sha256).write_bytes(b"1234")
    with pytest.raises(StoreError, match="4 bytes on disk, not 5"):
        artefacts.open(sha256)
    artefacts.path(sha256).unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        artefacts.open(sha256)
    # The same bytes put again mend it.
    artefacts.put(b"12345", "bundle")
    assert artefacts.read(sha256, bytes_max=10) == b"12345"


def test_bad_requests_are_refused(store: Store, tmp_path: Path) -> None:
    """Nothing, an unknown kind, more than the reader can hold, nothing of that name."""
    artefacts = make(store, tmp_path)
    with pytest.raises(InvalidError, match="kind"):
        artefacts.put(b"1", "virus")
    with pytest.raises(InvalidError, match="at least one byte"):
        artefacts.put(b"", "bundle")
    sha256 = artefacts.put(b"12345", "bundle")
    with pytest.raises(InvalidError, match="more than 4"):
        artefacts.read(sha256, bytes_max=4)
    artefacts.delete(sha256)
    artefacts.delete(sha256)
    with pytest.raises(NotFoundError):
        artefacts.open(sha256)
    assert files(tmp_path) == []


def test_a_crash_leaves_nothing_that_is_taken_for_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at each system call that makes the file durable: no row without a whole file."""
    artefacts, sync = make(store, tmp_path), os.fsync
    data = b"precious"
    sha256 = hashlib.sha256(data).hexdigest()
    for at in range(1, 4):
        left = [at]

        def dying(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(5, "Input/output error")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", dying)
        with pytest.raises(StoreError, match="Input/output error"):
            artefacts.put(data, "bundle")
        with pytest.raises(NotFoundError):
            artefacts.size(sha256)
    monkeypatch.setattr(os, "fsync", sync)
    (tmp_path / "artefacts" / "incoming" / "tmpabc").write_bytes(b"half")
    assert artefacts.sweep() == 1
    assert artefacts.put(data, "bundle") == sha256
    assert artefacts.read(sha256, bytes_max=100) == data


def test_many_writers_of_the_same_bytes(store: Store, tmp_path: Path) -> None:
    """Two operators may upload the same data set at once."""
    artefacts, found = make(store, tmp_path), list[str]()
    threads = [
        threading.Thread(target=lambda: found.append(artefacts.put(b"same" * 1000, "dataset")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("bounds", [{"bytes_max": 0}, {"bytes_max": 2, "total_bytes_max": 1}])
def test_bounds_that_cannot_work_are_refused(bounds: dict[str, int]) -> None:
    """A store that takes nothing is a typing error."""
    with pytest.raises(ValueError, match="bytes_max"):
        ArtefactConfig(**bounds)
