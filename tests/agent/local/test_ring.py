"""The ring's face of the core, with real processes. Kinds: stories, faults.

Invariant after every fault: the slot of whoever died is free again, and another client is served.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from shoal.agent.client import (
    Client,
    ClientInputError,
    OverloadedError,
    ServerGoneError,
    UnknownModelError,
)
from shoal.agent.local.config import CoreConfig, ModelSource
from shoal.agent.local.core import LocalCore
from shoal.agent.local.ring_front import RingConfig, RingFront
from shoal.agent.runtime import Runtime
from shoal.ext import ring
from tests.agent.local.models import adder
from tests.sims.raw_ring import RESPONSE, STEPS, RawClient
from tests.sims.ring_server import Doubler

SMALL = RingConfig(clients_max=4, request_bytes=16384, response_bytes=8192, reap_s=0.02)
DOCUMENT = Path(__file__).parents[3] / "docs" / "shared-memory-ring.md"
_names = count()


def new_name() -> str:
    """Return a name that no other test has."""
    return f"shoal-front-{os.getpid()}-{next(_names)}"


class Served:
    """A front with its core, started; a context manager that stops it."""

    def __init__(self, config: RingConfig = SMALL, *, lanes: bool = False) -> None:
        self.name = new_name()
        self.core = Doubler()
        lane = self.core.lane if lanes else None
        self.front = RingFront(self.core, self.name, config, lane=lane)
        self.path = ring.SHM / self.name

    def __enter__(self) -> Served:
        self.front.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.core.go.set()
        self.front.stop(20.0)
        assert not self.path.exists()


@pytest.fixture(params=[False, True], ids=["infer", "lane"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Give a small ring, of a core without lanes and of one with them."""
    with Served(lanes=request.param) as made:
        yield made


def eventually(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


def owners(path: Path) -> int:
    """Return how many slots are claimed."""
    client = RawClient(path)
    try:
        return sum(struct.unpack_from("<Q", client.map, at)[0] != 0 for at in client.places)
    finally:
        client.close()


def ask(name: str, *values: float, model: str = "m", timeout_s: float = 20.0) -> list[float]:
    """Ask once with a client of its own."""
    with Client(name, timeout_s=timeout_s) as client:
        data = array("f", values)
        found = client.infer_raw(model, {"x": ("FP32", (len(data),), data)})
        return array("f", bytes(found["y"][2])).tolist()


def test_the_document_is_enough(served: Served) -> None:
    """A client made from the document alone, in Python, asks and leaves."""
    client = RawClient(served.path)
    for _, step in client.steps():
        step()
    client.leave()
    client.close()
    assert owners(served.path) == 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_the_documents_client_in_c_works(served: Served, tmp_path: Path) -> None:
    """The program in the document compiles without a warning, asks, and leaves."""
    found = re.search(r"```c\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    source = tmp_path / "client.c"
    source.write_text(found[1], encoding="utf-8")
    program = tmp_path / "client"
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-sign-compare", "-O2"]
    subprocess.run(["cc", *flags, str(source), "-o", str(program)], check=True)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *words], capture_output=True, text=True, timeout=60)

    good = run(served.name, "m", "x", "4")
    assert (good.returncode, good.stdout, good.stderr) == (0, "y type 1: 0 2 4 6\n", "")
    assert run(served.name, "m", "x", "1000").stdout.endswith(" 1998\n")
    bad = run(served.name, "nobody", "x", "4")
    assert (bad.returncode, bad.stderr) == (1, "2: no model 'nobody'\n")
    assert run(new_name(), "m", "x", "4").returncode == 1
    assert owners(served.path) == 0


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_dies_after_any_step_costs_nothing(served: Served, step: str) -> None:
    """Killed after step k of a request, for every k; and one that is killed while it runs."""
    with Client(served.name) as other:
        x = {"x": ("FP32", (1,), array("f", [3]))}
        before = other.infer_raw("m", x)
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.sims.raw_ring", str(served.path), step],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == f"{step}\n".encode()
        assert owners(served.path) == (1 if step == "map" else 2)
        child.kill()  # not yet waited for: a zombie is dead too
        eventually(lambda: owners(served.path) == 1)
        assert other.infer_raw("m", x) == before
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert ask(served.name, 5) == [10]


def test_a_client_that_dies_while_its_model_runs_costs_nothing(served: Served) -> None:
    """Its slot is freed when the model is done, not before; the answer goes nowhere."""
    script = (
        "import sys; from array import array; from shoal.agent.client import Client\n"
        "client = Client(sys.argv[1]); client.models(); print('in', flush=True)\n"
        "client.infer_raw('wait', {'x': ('FP32', (1,), array('f', [1]))})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, served.name], stdout=subprocess.PIPE, text=True
    )
    raw = RawClient(served.path)
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    raw.n = 0
    eventually(lambda: raw.state == 2)
    child.kill()
    child.wait()
    child.stdout.close()
    time.sleep(0.1)  # five looks of the reaper
    assert owners(served.path) == 1
    assert ask(served.name, 5) == [10]  # meanwhile
    served.core.go.set()
    eventually(lambda: owners(served.path) == 0)
    raw.close()


def test_clients_that_are_killed_at_random_leave_the_ring_whole() -> None:
    """Twelve clients killed in the middle of calls they make without a pause."""
    script = (
        "import sys; from array import array; from shoal.agent.client import Client\n"
        "client = Client(sys.argv[1]); x = {'x': ('FP32', (200,), array('f', range(200)))}\n"
        "client.infer_raw('m', x); print('in', flush=True)\n"
        "while True: client.infer_raw('m', x)"
    )
    with Served() as served:
        for i in range(12):
            child = subprocess.Popen(
                [sys.executable, "-c", script, served.name], stdout=subprocess.PIPE
            )
            assert child.stdout is not None
            assert child.stdout.readline() == b"in\n"
            time.sleep(0.001 * i)
            child.kill()
            child.wait()
            child.stdout.close()
            assert ask(served.name, i) == [2 * i]
        eventually(lambda: owners(served.path) == 0)


def test_a_hostile_client_gets_answers_like_any_other(served: Served) -> None:
    """Nonsense in every field, in a row; then the same slot and another one are served."""
    raw = RawClient(served.path)
    raw.claim()
    for at in range(0, 740, 4):
        raw.write()
        raw.put("I", raw.request + at, 0xFFFFFFFF)
        for step in (raw.post, raw.mark, raw.ring, raw.wake):
            step()
        eventually(lambda: raw.state == RESPONSE)
        assert raw.u32(raw.slot + 196) in (0, 1, 2)
    assert ask(served.name, 1, 2) == [2, 4]
    for _, step in list(raw.steps())[2:]:
        step()
    # what belongs to the server, scribbled over
    raw.put("IIII", raw.slot + 64, 77, 1, 0, 0)
    for at in (192, 256, 260, *range(320, 448, 8)):
        raw.put("Q", at, 2**64 - 1)
    assert ask(served.name, 1, 2) == [2, 4]
    raw.put("II", 256, 0, 9)  # "somebody looks already": nobody is woken
    assert ask(served.name, 1, 2) == [2, 4]
    raw.leave()
    raw.close()


def test_sixty_four_clients_at_once() -> None:
    """Each in a slot of its own, all at the same time, more than there are threads."""
    config = RingConfig(clients_max=64, request_bytes=4096, response_bytes=4096, threads=4)
    with Served(config) as served:
        gate = threading.Barrier(64)
        wrong: list[object] = []

        def work(i: int) -> None:
            try:
                with Client(served.name, timeout_s=60) as client:
                    client.models()
                    gate.wait(60)
                    for j in range(20):
                        x = array("f", [i, j])
                        found = client.infer_raw("m", {"x": ("FP32", (2,), x)})
                        if bytes(found["y"][2]) != array("f", [2 * i, 2 * j]).tobytes():
                            wrong.append((i, j))
                    gate.wait(60)
            except Exception as exc:
                wrong.append(exc)
                gate.abort()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert wrong == []
        assert owners(served.path) == 0


def test_a_prepared_request_is_used_again_and_new_bytes_are_seen() -> None:
    """The core gets the same object while a client asks the same way, but not with strings."""
    with Served() as served, Client(served.name) as client:
        for value in (b"aaaa", b"bbbb"):
            found = client.infer_raw("echo", {"x": ("INT32", (1,), value)})
            assert found == {"x": ("INT32", (1,), bytearray(value))}
        first, second = served.core.asked
        assert first is second
        for value in (b"\1\0\0\0a", b"\1\0\0\0b"):
            found = client.infer_raw("echo", {"x": ("BYTES", (1,), value)})
            assert found == {"x": ("BYTES", (1,), bytearray(value))}
        assert served.core.asked[-1] is not served.core.asked[-2]
        for priority in (0, 2, 1, 0):
            client.infer_raw("echo", {"x": ("INT32", (1,), b"aaaa")}, priority=priority)
            want = {"priority": priority} if priority else {}
            assert served.core.asked[-1].parameters == want
        client.infer_raw("echo", {"x": ("INT32", (1,), b"aaaa")}, ["x"], version="7")
        asked = served.core.asked[-1]
        assert (asked.version, [each.name for each in asked.outputs]) == ("7", ["x"])
        first = second = asked = None  # type: ignore[assignment]
        served.core.asked.clear()  # they hold views of the ring


def test_a_lane_is_made_once_and_left_when_it_is_over() -> None:
    """Repeated requests take it; strings and priorities do not; a closed one is made anew."""
    with Served(lanes=True) as served, Client(served.name) as client:
        core, x = served.core, {"x": ("FP32", (1,), array("f", [3]))}
        want = {"y": ("FP32", (1,), bytearray(array("f", [6])))}
        for _ in range(3):
            assert client.infer_raw("m", x) == want
        assert (core.lanes, core.lane_runs, len(core.asked)) == (1, 3, 0)
        assert client.infer_raw("m", x, priority=1) == want
        assert (core.lanes, core.lane_runs, len(core.asked)) == (1, 3, 1)
        core.busy = True  # something is before it: it waits its turn in the queue
        assert client.infer_raw("m", x) == want
        assert (core.lanes, core.lane_runs, len(core.asked)) == (1, 3, 2)
        core.busy, core.generation = False, 1  # the model was loaded anew
        for _ in range(2):
            assert client.infer_raw("m", x) == want
        assert (core.lanes, core.lane_runs, len(core.asked)) == (2, 4, 3)
        with pytest.raises(UnknownModelError):
            client.infer_raw("nobody", x)
        client.infer_raw("echo", {"s": ("BYTES", (1,), b"\1\0\0\0a")})
        assert core.lanes == 2
        core.asked.clear()  # they hold views of the ring


def test_the_real_core_counts_and_refuses(tmp_path: Path) -> None:
    """Through a ring as through any face: statistics, checks, unload and load."""
    path = tmp_path / "m.onnx"
    path.write_bytes(adder())
    with Runtime() as runtime:
        core = LocalCore(CoreConfig(models=(ModelSource(name="m", path=path),)), runtime.load)
        core.start()
        name = new_name()
        front = RingFront(core, name, SMALL)
        front.start()
        try:
            with Client(name) as client:
                (entry,) = client.metadata("m")["inputs"]
                shape = tuple(2 if axis < 0 else axis for axis in entry["shape"])
                x = np.zeros(shape, np.float32)
                for _ in range(5):
                    (y,) = client.infer("m", {entry["name"]: x}).values()
                np.testing.assert_array_equal(y, x + 1)
                (counted,) = core.statistics("m", "")["model_stats"]
                assert counted["inference_stats"]["success"]["count"] == 5
                with pytest.raises(ClientInputError, match="FP64"):
                    client.infer("m", {entry["name"]: x.astype(np.float64)})
                core.unload("m")
                with pytest.raises(UnknownModelError):
                    client.infer("m", {entry["name"]: x})
                core.load("m", {})
                (y,) = client.infer("m", {entry["name"]: x}).values()
                np.testing.assert_array_equal(y, x + 1)
                core.drain(1.0)
                with pytest.raises(OverloadedError):
                    client.infer("m", {entry["name"]: x})
        finally:
            front.stop(5.0)
            core.drain(0.0)


def test_stop_answers_what_runs_and_tells_who_waits(served: Served) -> None:
    """A drain: the running call is answered, the next one meets no server."""
    answers: list[object] = []
    running = threading.Thread(
        target=lambda: answers.append(ask(served.name, 4, model="wait")),
    )
    running.start()
    raw = RawClient(served.path)
    raw.n = 0
    eventually(lambda: raw.state == 2)
    with Client(served.name) as client:
        client.models()
        stopping = threading.Thread(target=served.front.stop, args=(20.0,))
        stopping.start()
        served.core.go.set()
        stopping.join(30)
        running.join(30)
        assert answers == [[8]]
        with pytest.raises(ServerGoneError):
            client.models()
    raw.close()


def test_a_model_that_does_not_end_does_not_hold_the_stop() -> None:
    """The stop comes back in time; the client that waits is told, and the memory stays mapped."""
    with Served() as served:
        told: list[object] = []

        def work() -> None:
            try:
                ask(served.name, 4, model="wait")
            except ServerGoneError as exc:
                told.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        raw = RawClient(served.path)
        raw.n = 0
        eventually(lambda: raw.state == 2)
        served.front.stop(0.05)
        thread.join(20)
        assert len(told) == 1
        assert not served.path.exists()
        served.core.go.set()
        eventually(lambda: raw.state == RESPONSE)  # it ended, wrote its answer, and nothing broke
        raw.close()


def test_what_a_core_refuses_keeps_its_meaning(served: Served) -> None:
    """Codes become statuses, and the text goes along."""
    x = {"x": ("FP32", (1,), array("f", [1]))}
    with Client(served.name) as client:
        with pytest.raises(OverloadedError, match="the queue is full; ask later"):
            client.infer_raw("full", x)
        with pytest.raises(ClientInputError, match=r"outputs take 1048960 bytes.*8192"):
            client.infer_raw("large", x)
        with pytest.raises(ClientInputError, match="of the type 21"):
            raw_type(served)


def raw_type(served: Served) -> None:
    """Ask with four-bit numbers, which the protocol has no name for."""
    raw = RawClient(served.path)
    raw.claim()
    raw.write()
    raw.put("II", raw.request + 384 + 256, 21, 1)
    raw.put("Q", raw.request + 384 + 336, raw.count // 2)
    for step in (raw.post, raw.mark, raw.ring, raw.wake):
        step()
    eventually(lambda: raw.state == RESPONSE)
    text = raw.text()
    raw.leave()
    raw.close()
    raise ClientInputError(text)


def test_models_and_metadata_are_the_cores(served: Served) -> None:
    """As JSON, in the protocol's form."""
    with Client(served.name) as client:
        assert client.models() == json.loads(json.dumps(served.core.repository_index(ready=False)))
        assert client.metadata("m") == served.core.model_metadata("m", "")


@pytest.mark.parametrize(
    "fields",
    [
        {"threads": 0},
        {"threads": 257},
        {"spin_us": -1},
        {"spin_us": 1001},
        {"reap_s": 0.0},
        {"clients_max": 0},
        {"request_bytes": 100},
    ],
)
def test_a_config_that_cannot_be_served_is_refused(fields: dict[str, int]) -> None:
    """Before a file is made."""
    with pytest.raises(ValueError, match=r"must be"):
        RingConfig(**fields)
