# ruff: noqa: D103 - the name of a test is its promise; a docstring says why where it must
"""Shared memory: what a client may register, and that nothing it does to its file hurts us."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shoal.agent.local.errors import RequestError
from shoal.agent.local.oip import Region
from shoal.agent.local.shm import RING_MAGIC, SharedMemory


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[SharedMemory]:
    (tmp_path / "shm").mkdir()
    found = SharedMemory(tmp_path / "shm", regions_max=3)
    yield found
    found.close()


@pytest.fixture
def file(tmp_path: Path, memory: SharedMemory) -> Path:
    path = tmp_path / "shm" / "x"
    path.write_bytes(bytes(range(100)))
    return path


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_reads_and_writes_where_it_was_told(memory: SharedMemory, file: Path) -> None:
    memory.register("r", "/x", 10, 50)
    assert memory.status("") == {"r": {"name": "r", "key": "/x", "offset": 10, "byte_size": 50}}
    assert memory.status("r") == memory.status("")
    assert memory.read(Region("r", 5, 4)) == bytes([15, 16, 17, 18])
    memory.write(Region("r", 0, 8), b"abc")
    assert file.read_bytes()[8:15] == b"\x08\x09abc\x0d\x0e"
    assert len(file.read_bytes()) == 100


@pytest.mark.parametrize(
    "key", ["", "/", "//x", "../x", "/../x", "a/x", ".", "..", "x\0", "missing", "x" * 300, "/link"]
)
def test_a_key_is_a_name_in_the_folder_and_nothing_else(
    memory: SharedMemory, file: Path, key: str
) -> None:
    """Whatever the key, no file elsewhere can be reached."""
    secret = file.parent.parent / "x"
    secret.write_bytes(bytes(100))
    (file.parent / "link").symlink_to(secret)
    (file.parent / "a").mkdir()
    (file.parent / "a" / "x").write_bytes(bytes(100))
    before = open_files()
    with pytest.raises(RequestError, match="Unable to open shared memory region"):
        memory.register("r", key, 0, 1)
    assert memory.status("") == {}
    assert open_files() == before


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_only_regular_files(memory: SharedMemory, file: Path, kind: str) -> None:
    """A pipe would block whoever opens or reads it."""
    (os.mkfifo if kind == "fifo" else os.mkdir)(file.parent / "other")
    before = open_files()
    with pytest.raises(RequestError, match="Unable to open"):
        memory.register("r", "other", 0, 1)
    assert open_files() == before


def test_a_ring_of_the_server_is_no_clients_memory(memory: SharedMemory, file: Path) -> None:
    file.write_bytes(RING_MAGIC + bytes(100))
    with pytest.raises(RequestError, match="is a ring"):
        memory.register("r", "x", 0, 1)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 101), (100, 1), (99, 2), (-1, 5), (0, 0), (0, -1), (1 << 70, 1)]
)
def test_a_region_lies_in_its_file(
    memory: SharedMemory, file: Path, offset: int, size: int
) -> None:
    before = open_files()
    with pytest.raises(RequestError):
        memory.register("r", "x", offset, size)
    assert memory.status("") == {}
    assert open_files() == before


def test_names_and_count_are_bounded(memory: SharedMemory, file: Path) -> None:
    for name in "abc":
        memory.register(name, "x", 0, 1)
    before = open_files()
    for name in ("a", "d", "", "n" * 256):
        with pytest.raises(RequestError):
            memory.register(name, "x", 0, 1)
    assert open_files() == before
    memory.unregister("a")
    memory.unregister("a")
    with pytest.raises(RequestError, match="Unable to find shared memory region: 'a'"):
        memory.status("a")
    memory.unregister("")
    assert memory.status("") == {}
    assert open_files() == before - 3


@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    offset=st.integers(-5, 70), size=st.integers(-5, 70), length=st.integers(0, 100),
    data=st.binary(max_size=70),
)  # fmt: skip
@example(offset=40, size=10, length=100, data=b"last bytes")
@example(offset=40, size=11, length=100, data=b"one too far")
@example(offset=0, size=50, length=70, data=bytes(50))
@example(offset=0, size=50, length=69, data=bytes(50))
def test_no_part_reaches_out_of_its_region(
    memory: SharedMemory, file: Path, offset: int, size: int, length: int, data: bytes
) -> None:
    """Any part of any file, cut to any length: the right bytes, or an error; others untouched."""
    memory.unregister("")
    file.write_bytes(bytes(range(100)))
    memory.register("r", "x", 20, 50)
    os.truncate(file, length)
    content = file.read_bytes()
    part = Region("r", offset, size)
    inside = offset >= 0 and size >= 0 and offset + size <= 50
    there = 20 + offset + size <= length
    if inside and there:
        assert memory.read(part) == content[20 + offset : 20 + offset + size]
    else:
        with pytest.raises(RequestError):
            memory.read(part)
    if inside and there and len(data) <= size:
        memory.write(part, data)
        at = 20 + offset
        assert file.read_bytes() == content[:at] + data + content[at + len(data) :]
    else:
        with pytest.raises(RequestError):
            memory.write(part, data)
        assert file.read_bytes() == content


def test_unregistering_while_others_read(memory: SharedMemory, file: Path) -> None:
    """A closed file's number may be another file's by then: a reader never sees that file."""
    other = file.parent / "other"
    other.write_bytes(b"\xff" * 100)
    stop = threading.Event()
    wrong: list[bytes] = []

    def read() -> None:
        while not stop.is_set():
            try:
                got = memory.read(Region("r", 0, 4))
            except RequestError:
                continue
            if got != bytes([0, 1, 2, 3]):
                wrong.append(got)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300):
        memory.register("r", "x", 0, 10)
        memory.unregister("r")
        os.close(os.open(other, os.O_RDONLY))
    stop.set()
    reader.join(30)
    assert wrong == []
