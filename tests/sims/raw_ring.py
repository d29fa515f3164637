"""A client of the shared-memory ring written from docs/shared-memory-ring.md, step by step.

It shares no code with ours, so it proves that the document is enough, and it can stop after any
step, as a client does that is killed there. Numbers are not written atomically: one client at a
time.

    python -m tests.sims.raw_ring PATH STEP      do the steps up to STEP, say so, wait to be killed
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

SYS_FUTEX: Final = {"x86_64": 202, "aarch64": 98}
IDLE, REQUEST, RUNNING, RESPONSE = range(4)


def started(pid: int) -> int:
    """Return the start time of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) & 0xFFFFFFFF


class RawClient:
    """The steps of one request of the float vector 0, 1, … to the model "m", input "x"."""

    def __init__(self, path: Path, count: int = 256) -> None:
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        magic, _, self.slots, first, stride, self.room, _ = struct.unpack_from(
            "<8sIIQQQQ", self.map
        )
        assert magic == b"SHOALRNG"
        self.places: list[int] = [first + n * stride for n in range(self.slots)]
        self.n = -1
        self.count = count

    @property
    def slot(self) -> int:
        """Offset of the claimed slot."""
        return self.places[self.n]

    @property
    def request(self) -> int:
        """Offset of its request area."""
        return self.slot + 256

    @property
    def state(self) -> int:
        """State of the slot."""
        return self.u32(self.slot + 64)

    def u32(self, at: int) -> int:
        """Read a number of 4 bytes."""
        return int(struct.unpack_from("<I", self.map, at)[0])

    def put(self, form: str, at: int, *values: int | bytes) -> None:
        """Write numbers."""
        struct.pack_into("<" + form, self.map, at, *values)

    def claim(self) -> None:
        """Take the first free slot."""
        for n, at in enumerate(self.places):
            if struct.unpack_from("<Q", self.map, at)[0] == 0:
                self.put("Q", at, started(os.getpid()) << 32 | os.getpid())
                self.n = n
                self.put("II", at + 64, 0, 0)
                return
        raise RuntimeError("the ring is full")

    def write_half(self) -> None:
        """Write a header of nonsense, as one that is not finished."""
        self.put("IIII", self.request, 1, 64, 64, 0)
        self.put("256s", self.request + 16, b"\xff" * 256)

    def write(self) -> None:
        """Write header and tensor."""
        self.map[self.request : self.request + 768] = bytes(768)
        self.put("III", self.request, 1, 1, 0)
        self.put("256s", self.request + 16, b"m")
        tensor = self.request + 384
        self.put("256sIIq", tensor, b"x", 1, 1, self.count)
        self.put("QQ", tensor + 328, 768, 4 * self.count)
        self.put(f"{self.count}f", self.request + 768, *range(self.count))
        self.put("IIQ", self.slot + 128, 7, 0, 0)

    def post(self) -> None:
        """Say in the slot that there is a request."""
        self.put("I", self.slot + 64, REQUEST)

    def mark(self) -> None:
        """Say on the page that this slot has a request."""
        at = 320 + self.n // 64 * 8
        bits = struct.unpack_from("<Q", self.map, at)[0]
        self.put("Q", at, bits | 1 << self.n % 64)

    def ring(self) -> None:
        """Change the bell."""
        self.put("I", 192, (self.u32(192) + 1) & 0xFFFFFFFF)

    def wake(self) -> None:
        """Wake a server thread."""
        self.futex(192, 1, 1)

    def sleep(self) -> None:
        """Sleep until there is an answer."""
        until = time.monotonic() + 30
        while self.state != RESPONSE:
            assert time.monotonic() < until, "no answer"
            self.put("I", self.slot + 68, 1)
            if (seen := self.state) != RESPONSE:
                self.futex(self.slot + 64, 0, seen, 0.05)
            self.put("I", self.slot + 68, 0)

    def read(self) -> None:
        """Read the answer and check that it is the answer to this request."""
        sequence, status, tensors, _ = struct.unpack_from("<IIII", self.map, self.slot + 192)
        area = self.request + self.room
        assert (sequence, status, tensors) == (7, 0, 1), self.text()
        offset, size = struct.unpack_from("<QQ", self.map, area + 328)
        values = struct.unpack_from(f"<{size // 4}f", self.map, area + offset)
        assert values == tuple(2.0 * i for i in range(self.count))
        self.put("I", self.slot + 64, IDLE)

    def text(self) -> str:
        """Return the text of an answer."""
        size = self.u32(self.slot + 204)
        area = self.request + self.room
        return self.map[area : area + size].decode()

    def leave(self) -> None:
        """Give the slot back."""
        self.put("Q", self.slot, 0)

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Give each step of a request and its name, in order."""
        yield from (
            ("claim", self.claim),
            ("write_half", self.write_half),
            ("write", self.write),
            ("post", self.post),
            ("mark", self.mark),
            ("ring", self.ring),
            ("wake", self.wake),
            ("sleep", self.sleep),
            ("read", self.read),
        )

    def futex(self, at: int, op: int, value: int, wait_s: float | None = None) -> None:
        """Make the system call on a word of the ring, shared."""
        word = ctypes.c_uint32.from_buffer(self.map, at)
        nap = None
        if wait_s is not None:
            nap = ctypes.byref((ctypes.c_long * 2)(0, int(wait_s * 1e9)))
        number = SYS_FUTEX[os.uname().machine]
        ctypes.CDLL(None).syscall(number, ctypes.byref(word), op, value, nap, None, 0)
        del word  # or the map cannot be closed

    def close(self) -> None:
        """Unmap."""
        self.map.close()


STEPS: Final = [
    "map",
    "claim",
    "write_half",
    "write",
    "post",
    "mark",
    "ring",
    "wake",
    "sleep",
    "read",
]


def main(path: str, last: str) -> None:
    """Do the steps up to one, say so, and wait to be killed."""
    client = RawClient(Path(path))
    for name, step in client.steps():
        if last == "map":
            break
        step()
        if name == last:
            break
    print(last, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
