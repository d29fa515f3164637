"""The ring's two ends. Kinds: vectors (the layout), properties (hostile bytes), faults.

Fuzz invariant: whatever bytes a slot holds, ``request`` gives a request whose views lie inside
the slot's request area or raises RequestError, and ``read`` likewise for an answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.ext import ring
from shoal.ext.ring import Plan, Port, RingSizes, Server
from tests.sims.raw_ring import RawClient

SIZES = RingSizes(clients_max=4, request_bytes=8192, response_bytes=4096)
OK, TAKE_NS = 0, 5_000_000_000
_names = count()


def new_name() -> str:
    """Return a name that no other test has."""
    return f"shoal-test-{os.getpid()}-{next(_names)}"


@contextlib.contextmanager
def both(sizes: RingSizes = SIZES) -> Iterator[tuple[Server, Port, ring.RingFile]]:
    """Give a server, and a client of it that has a slot."""
    file = ring.create(new_name(), sizes)
    server = Server(*file.arguments)
    port = Port(*file.arguments)
    assert port.claim(ring.me())
    try:
        yield server, port, file
    finally:
        port.detach()
        server.detach()
        file.close(remove=True)


def plan_of(port: Port, n: int = 4, model: str = "m") -> Plan:
    """Return a plan of one float input."""
    return Plan(1, model, "", [("x", 1, (n,), 4 * n, "f")], [], port.request_bytes)


def echo(server: Server) -> None:
    """Answer one request by its inputs."""
    slot = server.take(0, TAKE_NS)
    request = server.request(slot)
    rows = [(n, request.types[n], shape, data) for n, (shape, data) in request.inputs.items()]
    assert server.answer(slot, rows) == 0


def test_a_request_comes_back_as_it_was_sent() -> None:
    """All that a client says reaches the server, and the answer reaches the client."""
    with both() as (server, port, _):
        plan = Plan(
            1,
            "mödel",
            "7",
            [("x", 1, (2, 2), 16, "f"), ("s", 8, (2,), 9, "")],
            ["y", "z"],
            port.request_bytes,
        )
        x = memoryview(array("f", [1, 2, 3, 4])).cast("B").cast("f", (2, 2))
        text = b"\x01\0\0\0a\0\0\0\0"
        assert port.post(plan, {"x": x, "s": text}, 123, 2) == -1
        slot = server.take(0, TAKE_NS)
        request = server.request(slot)
        assert (request.kind, request.model, request.revision) == (1, "mödel", "7")
        assert (request.outputs, request.priority, request.deadline_ns) == (("y", "z"), 2, 123)
        assert request.types == {"x": 1, "s": 8}
        assert {n: (s, bytes(d)) for n, (s, d) in request.inputs.items()} == {
            "x": ((2, 2), bytes(x)),
            "s": ((2,), text),
        }
        answered = [("y", 7, (1,), b"12345678"), ("z", 1, (), b"1234"), ("e", 1, (0, 3), b"")]
        assert server.answer(slot, answered) == 0
        assert port.wait(0, TAKE_NS)
        status, found = port.read(plan, None, lambda number: None)
        assert status == OK
        assert found == {name: (kind, shape, data) for name, kind, shape, data in answered}


def test_a_header_that_did_not_change_is_not_parsed_again() -> None:
    """The request object is the same, its bytes are the new ones, strings are copied anew."""
    with both() as (server, port, _):
        plan = Plan(
            1, "m", "", [("x", 1, (1,), 4, ""), ("s", 8, (1,), 5, "")], [], port.request_bytes
        )
        seen = []
        for x, s in ((b"1111", b"\x01\0\0\0a"), (b"2222", b"\x01\0\0\0b")):
            port.post(plan, {"x": x, "s": s}, 0, 0)
            slot = server.take(0, TAKE_NS)
            request = server.request(slot)
            assert {n: bytes(d) for n, (_, d) in request.inputs.items()} == {"x": x, "s": s}
            seen.append(request)
            assert isinstance(request.inputs["s"][1], bytes)
            server.answer(slot, [])
            port.wait(0, TAKE_NS)
            port.read(plan, None, lambda number: None)
        assert seen[0] is seen[1]


def test_the_views_of_a_request_cannot_be_written() -> None:
    """A model or a monitor cannot change what the client sent."""
    with both() as (server, port, _):
        port.post(plan_of(port), {"x": array("f", [0] * 4)}, 0, 0)
        view = server.request(server.take(0, TAKE_NS)).inputs["x"][1]
        assert isinstance(view, memoryview)
        assert view.readonly


def test_a_view_that_somebody_kept_keeps_the_memory() -> None:
    """A monitor that keeps what it saw reads stale bytes, not memory that is gone."""
    with both() as (server, port, file):
        port.post(plan_of(port), {"x": array("f", [1, 2, 3, 4])}, 0, 0)
        view = server.request(server.take(0, TAKE_NS)).inputs["x"][1]
        port.detach()
        server.detach()
        file.close(remove=True)
        assert not file.memory.closed
        assert bytes(view) == array("f", [1, 2, 3, 4]).tobytes()
    with both() as (server, port, file):
        pass
    assert file.memory.closed


def test_inputs_that_are_not_the_plans_are_not_posted() -> None:
    """A plan is used again only for the dtype, shape and order it was made for."""
    with both() as (server, port, _):
        plan = plan_of(port)
        two = memoryview(array("f", [0] * 4)).cast("B").cast("f", (2, 2))
        for wrong in (array("i", [0] * 4), array("f", [0] * 3), two, b"0" * 16):
            assert port.post(plan, {"x": wrong}, 0, 0) == 0
        with pytest.raises(BufferError):
            port.post(plan, {"x": memoryview(array("f", [0] * 8))[::2]}, 0, 0)
        with pytest.raises(KeyError):
            port.post(plan, {"y": array("f", [0] * 4)}, 0, 0)
        with pytest.raises(TypeError):
            port.post(plan, {"x": [0, 0, 0, 0]}, 0, 0)
        assert server.take(0, 1) == -1
        assert not port.in_flight


@pytest.mark.parametrize(
    "row",
    [
        ("x" * 256, 1, (1,), 4, ""),
        ("a\0b", 1, (1,), 4, ""),
        ("x", 1, (1,) * 9, 4, ""),
        ("x", 1, (4096,), 16384, ""),
    ],
    ids=["name", "zero", "axes", "size"],
)
def test_a_plan_refuses_what_has_no_place(row: tuple[str, int, tuple[int, ...], int, str]) -> None:
    """Names, axes and sizes are bounded by the layout and the ring."""
    with pytest.raises(ValueError, match=r"."):
        Plan(1, "m", "", [row], [], SIZES.request_bytes)


def test_an_answer_that_does_not_fit_says_how_large_it_is() -> None:
    """The slot still waits then, and takes a text instead, cut to the area."""
    with both() as (server, port, _):
        plan = plan_of(port)
        port.post(plan, {"x": array("f", [0] * 4)}, 0, 0)
        slot = server.take(0, TAKE_NS)
        assert server.answer(slot, [("y", 2, (5000,), bytes(5000))]) > 5000
        many = [(f"y{i}", 2, (0,), b"") for i in range(20)]  # the entries alone do not fit
        assert server.answer(slot, many) > 4096
        with pytest.raises(ValueError, match="64"):
            server.answer(slot, many * 4)
        assert not port.wait(0, 0)
        server.answer_text(slot, 6, "é" * 5000)
        assert port.wait(0, TAKE_NS)
        status, text = port.read(plan, None, lambda number: None)
        assert (status, len(text.encode())) == (6, 4096)


def test_who_asks_first_is_not_passed_over() -> None:
    """Each of the slots that ask is taken once."""
    with both() as (server, port, file):
        ports = [port] + [Port(*file.arguments) for _ in range(3)]
        for each in ports[1:]:
            assert each.claim(ring.me())
        assert sorted(each.index for each in ports) == [0, 1, 2, 3]
        extra = Port(*file.arguments)
        assert not extra.claim(ring.me())
        for each in ports:
            each.post(plan_of(each), {"x": array("f", [each.index] * 4)}, 0, 0)
        assert sorted(server.take(0, TAKE_NS) for _ in range(4)) == [0, 1, 2, 3]
        assert server.take(0, 1) == -1
        for each in (*ports[1:], extra):
            each.detach()


def test_a_request_is_withdrawn_or_awaited() -> None:
    """A slot is used again only when the server does not have it."""
    with both() as (server, port, _):
        plan, x = plan_of(port), {"x": array("f", [0] * 4)}
        port.post(plan, x, 0, 0)
        assert port.withdraw()
        assert server.take(0, 1) == -1
        port.post(plan, x, 0, 0)
        slot = server.take(0, TAKE_NS)
        assert not port.withdraw()
        assert not port.release()
        with pytest.raises(ValueError, match="flight"):
            port.post(plan, x, 0, 0)
        server.answer(slot, [])
        assert port.withdraw()
        port.post(plan, x, 0, 0)
        echo(server)
        assert port.wait(0, TAKE_NS)
        assert port.read(plan, None, lambda number: None)[1] == {
            "x": (1, (4,), array("f", [0] * 4).tobytes())
        }
        assert port.release()
        assert server.owners() == []


def test_one_slot_is_never_run_twice_at_once() -> None:
    """A client that posts again while its request runs is taken when that one is answered."""
    with both() as (server, port, file):
        raw = RawClient(file.path, 4)
        raw.n = port.index
        raw.write()
        for step in (raw.post, raw.mark, raw.ring):
            step()
        slot = server.take(0, TAKE_NS)
        for step in (raw.post, raw.mark, raw.ring):  # hostile: the state is the server's now
            step()
        assert server.take(0, 1) == -1
        server.answer(slot, [])
        raw.post()
        raw.mark()
        assert server.take(0, TAKE_NS) == slot
        server.answer_text(slot, 1, "")
        raw.close()


def test_a_request_whose_bell_was_lost_is_swept_up() -> None:
    """A client that died before it rang, or whose bit another wiped out, is found by its state."""
    with both() as (server, port, file):
        raw = RawClient(file.path, 4)
        raw.n = port.index
        raw.write()
        raw.post()
        assert server.take(0, 1) == -1
        assert server.sweep() == 1
        assert server.take(0, TAKE_NS) == port.index
        assert server.sweep() == 0
        server.answer_text(port.index, 1, "")
        raw.close()


def test_a_slot_in_use_is_not_reclaimed() -> None:
    """What the server runs is finished first; a slot that changed hands stays."""
    with both() as (server, port, _):
        owner = ring.me()
        port.post(plan_of(port), {"x": array("f", [0] * 4)}, 0, 0)
        slot = server.take(0, TAKE_NS)
        assert not server.reclaim(slot, owner)
        server.answer_text(slot, 1, "")
        assert not server.reclaim(slot, owner + 1)
        assert server.owners() == [(slot, owner)]
        assert server.reclaim(slot, owner)
        assert server.owners() == []
        assert not port.mine


def test_stop_ends_a_take_that_sleeps() -> None:
    """A thread in ``take`` hears of it, and so does every later one."""
    with both() as (server, _, _):
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(server.take(0, 60_000_000_000)))
        thread.start()
        server.stop()
        thread.join(20)
        assert found == [-2]
        assert server.take(1000, 60_000_000_000) == -2


def test_threads_take_every_request_once() -> None:
    """Four threads that spin, sleep and wake lose nothing, with four clients that never pause."""
    calls = 300
    with both() as (server, first, file):
        taken = [0] * 4

        def serve(i: int) -> None:
            while (slot := server.take((i % 2) * 20_000, 100_000_000)) != -2:
                if slot >= 0:
                    taken[i] += 1
                    request = server.request(slot)
                    shape, data = request.inputs["x"]
                    server.answer(slot, [("x", 1, shape, data)])

        def ask(port: Port) -> None:
            plan = plan_of(port)
            for i in range(calls):
                x = array("f", [port.index, i, 0, 0])
                assert port.post(plan, {"x": x}, 0, 0) == -1
                until = time.monotonic() + 20
                while not port.wait(0, 1_000_000_000):
                    assert time.monotonic() < until
                assert port.read(plan, None, lambda number: None) == (
                    OK,
                    {"x": (1, (4,), x.tobytes())},
                )
            done.append(port.index)

        done: list[int] = []
        ports = [first] + [Port(*file.arguments) for _ in range(3)]
        for port in ports[1:]:
            assert port.claim(ring.me())
        servers = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
        clients = [threading.Thread(target=ask, args=(port,)) for port in ports]
        for thread in servers + clients:
            thread.start()
        for thread in clients:
            thread.join(60)
        server.stop()
        for thread in servers:
            thread.join(20)
        assert sorted(done) == [0, 1, 2, 3]
        assert sum(taken) == 4 * calls
        for port in ports[1:]:
            port.detach()


# ---- hostile bytes -----------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 63, 64, 65, 768, 2**63]))
# Where the fields are whose values matter; arbitrary bytes alone would never get past the first.
FIELDS = [0, 4, 8, 16, 272, 384, 640, 644, 648, 656, 712, 720, 736, 992, 996, 1000, 1064, 1072]


def posted(server: Server, port: Port, file: ring.RingFile, area: bytes) -> int:
    """Put bytes in the request area of a slot as a client would, and take the slot."""
    plan = plan_of(port)
    port.post(plan, {"x": array("f", [1, 2, 3, 4])}, 0, 0)
    slot = server.take(0, TAKE_NS)
    start = 4096 + port.index * SIZES.stride + 256
    file.memory[start : start + len(area)] = area
    return slot


@given(patches=st.lists(st.tuples(st.sampled_from(FIELDS), NUMBERS, st.sampled_from("IQ"))))
@settings(max_examples=400, deadline=None)
def test_any_header_is_a_request_or_refused(patches: list[tuple[int, int, str]]) -> None:
    """The fuzz invariant, from a good header with some fields overwritten."""
    with both() as (server, port, file):
        plan = Plan(
            1,
            "m",
            "",
            [("x", 1, (4,), 16, ""), ("s", 8, (1,), 5, "")],
            ["y"],
            port.request_bytes,
        )
        area = bytearray(plan.header)
        for at, value, form in patches:
            struct.pack_into(
                "<" + form, area, at, value & (0xFFFFFFFF if form == "I" else 2**64 - 1)
            )
        slot = posted(server, port, file, bytes(area))
        try:
            request = server.request(slot)
        except ring.RequestError as exc:
            server.answer_text(slot, 1, str(exc))
            return
        assert len(request.model.encode()) < 256
        assert len(request.inputs) <= 64
        for _, (shape, data) in request.inputs.items():
            assert len(data) <= SIZES.request_bytes
            assert all(axis >= 0 for axis in shape)
            bytes(data)  # every byte can be read
        server.answer_text(slot, 0, "")


@given(area=st.binary(max_size=1024))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_request_or_refused(area: bytes) -> None:
    """The fuzz invariant, from nothing."""
    with both() as (server, port, file):
        slot = posted(server, port, file, area)
        with contextlib.suppress(ring.RequestError):
            server.request(slot)
        server.answer_text(slot, 1, "")


@pytest.mark.parametrize(
    ("at", "form", "value", "said"),
    [
        (0, "I", 9, "kind 9"),
        (4, "I", 65, "65 inputs"),
        (8, "I", 65, "65 are wanted|65 outputs"),
        (16, "256s", b"x" * 256, "does not end"),
        (16, "256s", b"\xff", "not UTF-8"),
        (384, "256s", b"", "no name"),
        (640, "I", 99, "unknown type"),
        (640, "I", 2**31 + 1, "unknown type"),
        (644, "I", 9, "9 axes"),
        (648, "q", -1, "axis 0"),
        (648, "q", 2**62, "beyond"),
        (648, "q", 5, "take 20"),
        (712, "Q", 0, "lies at 0"),
        (712, "Q", 700, "lies at 700"),
        (712, "Q", 2**64 - 64, "lies at"),
        (712, "Q", 8192, "lies at"),
        (720, "Q", 2**64 - 1, "bytes"),
    ],
)
def test_each_field_is_checked(at: int, form: str, value: int | bytes, said: str) -> None:
    """One wrong field is enough, and the message names it."""
    with both() as (server, port, file):
        area = bytearray(plan_of(port).header)
        struct.pack_into("<" + form, area, at, value)
        slot = posted(server, port, file, bytes(area))
        with pytest.raises(ring.RequestError, match=said):
            server.request(slot)
        server.answer_text(slot, 1, "refused")
        # ... and the same slot serves a good request then
        assert port.wait(0, TAKE_NS)
        plan = plan_of(port)
        assert port.read(plan, None, lambda number: None) == (1, "refused")
        port.post(plan, {"x": array("f", [1, 2, 3, 4])}, 0, 0)
        echo(server)


def test_an_input_that_is_there_twice_is_refused() -> None:
    """Which of the two was meant nobody knows."""
    with both() as (server, port, file):
        rows = [("x", 1, (1,), 4, ""), ("y", 1, (1,), 4, "")]
        area = bytearray(Plan(1, "m", "", rows, [], port.request_bytes).header)
        area[384 + 352 : 384 + 352 + 1] = b"x"
        slot = posted(server, port, file, bytes(area))
        with pytest.raises(ring.RequestError, match="twice"):
            server.request(slot)
        server.answer_text(slot, 1, "")


@given(
    patches=st.lists(
        st.tuples(st.sampled_from([0, 256, 260, 264, 272, 328, 336]), NUMBERS), min_size=1
    ),
    head=st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
    spoil_head=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_answer_is_read_or_refused(
    patches: list[tuple[int, int]], head: tuple[int, int, int, int], spoil_head: bool
) -> None:
    """The client believes other clients, which can write into its slot, no more than the server."""
    with both() as (server, port, file):
        plan = plan_of(port)
        port.post(plan, {"x": array("f", [1, 2, 3, 4])}, 0, 0)
        echo(server)
        slot = 4096 + port.index * SIZES.stride
        area = slot + 256 + SIZES.request_bytes
        for at, value in patches:
            struct.pack_into("<Q", file.memory, area + at, value)
        if spoil_head:
            struct.pack_into("<IIII", file.memory, slot + 192, *head)
        assert port.wait(0, TAKE_NS)
        with contextlib.suppress(ring.AnswerError):
            status, found = port.read(plan, None, lambda number: None)
            if status == OK:
                assert all(len(data) <= SIZES.response_bytes for _, _, data in found.values())
        # the slot is idle whatever was there
        port.post(plan, {"x": array("f", [1, 2, 3, 4])}, 0, 0)
        echo(server)


# ---- the file ----------------------------------------------------------------------------------


def test_a_ring_has_one_server() -> None:
    """The second is told, and the first one's ring is not touched."""
    name = new_name()
    with ring.create(name, SIZES) as file:
        inode = file.path.stat().st_ino
        with pytest.raises(ring.RingTakenError, match="another process"):
            ring.create(name, SIZES)
        assert file.path.stat().st_ino == inode
        assert file.path.stat().st_mode & 0o777 == 0o600
        assert file.path.stat().st_size == SIZES.total_bytes
        assert file.path.stat().st_blocks * 512 >= SIZES.total_bytes  # all of it is there
        file.unlink()


def test_what_a_dead_server_left_is_replaced() -> None:
    """Its name is free again; its clients keep the old memory."""
    name = new_name()
    script = (
        "from shoal.ext import ring; import sys, os\n"
        "ring.create(sys.argv[1], ring.RingSizes(clients_max=1))\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, name], check=True)
    with pytest.raises(ring.RingMissingError, match="gone"):
        ring.attach(name)
    with ring.create(name, SIZES) as file:
        with ring.attach(name) as found:
            assert found.generation == file.generation
            assert found.server == ring.me()
            assert found.sizes == SIZES
        file.close(remove=True)
    assert not file.path.exists()
    with pytest.raises(ring.RingMissingError, match="no server"):
        ring.attach(name)


def test_a_closing_server_leaves_the_next_ones_name() -> None:
    """Only its own file is removed."""
    name = new_name()
    old = ring.create(name, SIZES)
    old.path.unlink()
    with ring.create(name, SIZES) as new:
        old.close(remove=True)
        assert new.path.exists()
        new.unlink()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", ".x", "x" * 201, "a b", "a\n", "é"])
def test_a_bad_name_is_refused(name: str) -> None:
    """A name is one plain file's."""
    for act in (partial(ring.create, name, SIZES), partial(ring.attach, name)):
        with pytest.raises(ring.RingNameError):
            act()


def test_a_file_that_is_no_ring_is_left_alone(tmp_path: Path) -> None:
    """Another program's file is neither replaced nor mapped; a link is not followed."""
    name = new_name()
    path = ring.SHM / name
    try:
        path.write_bytes(bytes(8192))
        with pytest.raises(ring.RingNameError, match="no ring"):
            ring.create(name, SIZES)
        with pytest.raises(ring.RingFormatError):
            ring.attach(name)
        path.write_bytes(b"SHOALRNG")
        with pytest.raises(ring.RingFormatError):
            ring.attach(name)
        path.unlink()
        target = tmp_path / "target"
        target.write_bytes(b"SHOALRNG" + bytes(8192))
        path.symlink_to(target)
        for act in (partial(ring.create, name, SIZES), partial(ring.attach, name)):
            with pytest.raises(ring.RingNameError):
                act()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [(8, "I", 2), (12, "I", 0), (12, "I", 1025), (16, "Q", 0), (24, "Q", 2**40), (32, "Q", 2**63)],
)
def test_a_page_that_contradicts_itself_is_refused(at: int, form: str, value: int) -> None:
    """Sizes come from the file, so they are checked before anything is mapped by them."""
    name = new_name()
    with ring.create(name, SIZES) as file:
        struct.pack_into("<" + form, file.memory, at, value)
        with pytest.raises(ring.RingFormatError):
            ring.attach(name)
        file.unlink()


def test_a_full_tmpfs_is_an_error_of_the_start() -> None:
    """Not a SIGBUS at some later request; and nothing is left behind."""
    name = new_name()
    left = os.statvfs(ring.SHM)
    most = left.f_bavail * left.f_frsize
    sizes = RingSizes(clients_max=1024, request_bytes=1 << 32, response_bytes=1 << 32)
    assert sizes.total_bytes > most
    with pytest.raises(OSError, match=r".") as caught:
        ring.create(name, sizes)
    assert caught.value.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
    assert not (ring.SHM / name).exists()
    again = os.statvfs(ring.SHM)
    assert again.f_bavail * again.f_frsize > most - (64 << 20)


def test_sizes_that_no_ring_can_have_are_refused() -> None:
    """By the config and by the kernel, which trusts nobody."""
    for fields in ({"clients_max": 0}, {"clients_max": 1025}, {"request_bytes": 4097}):
        with pytest.raises(ValueError, match=r"must be"):
            RingSizes(**fields)
    with pytest.raises(ValueError, match="contradict"):
        Port(bytearray(8192), 1, 4096, 64, 4096, 4096)
    with pytest.raises(ValueError, match="contradict"):
        Port(bytearray(8192), 1, 4096, 8448, 4096, 4096)


def test_who_is_dead_is_told_from_who_has_its_number() -> None:
    """A process that ended, one that is a zombie, one with another start time."""
    assert ring.alive(ring.me())
    assert not ring.alive(ring.me() ^ 1 << 40)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    raw = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    known = int(raw) << 32 | child.pid
    assert ring.alive(known)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not ring.alive(known)  # a zombie
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    assert not ring.alive(known)


def test_a_detached_end_says_so() -> None:
    """No call touches memory that is not mapped any more."""
    with both() as (server, port, _):
        plan = plan_of(port)
        server.detach()
        port.detach()
        for act in (
            lambda: server.take(0, 1),
            server.stop,
            server.owners,
            server.sweep,
            lambda: server.request(0),
            lambda: server.answer(0, []),
            lambda: server.answer_text(0, 0, ""),
            lambda: server.reclaim(0, 1),
            lambda: port.claim(1),
            lambda: port.post(plan, {}, 0, 0),
            lambda: port.wait(0, 0),
            lambda: port.read(plan, None, lambda number: None),
            lambda: port.closed,
        ):
            with pytest.raises(ValueError, match="detached"):
                act()
