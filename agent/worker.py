"""The child process in which untrusted or heavy work runs: self-tests, training, evaluation.

    parent --frame--> stdin,  stdout --frame--> parent       frame = u32 LE length + MessagePack
    {"job": name, "cpu_s": n, ...}  ->  {"ok": {...}} | {"error": {"code", "text"}}

A model may ask for any amount of memory or never end (faults 20 and 21). So this process limits
its own address space before anything large is imported, its CPU time per job, and it ends with
its parent. Standard output is for frames alone: what libraries print goes to standard error. The
working directory is one that no longer exists, so that a relative path inside a model finds
nothing (faults 17 and 18).

Not here: the jobs (``jobs``), wall-clock limits and restarts (``children``).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final

import msgpack

from .. import ShoalError

LENGTH: Final = struct.Struct("<I")
REQUEST_BYTES_MAX: Final = 64 << 10  # a request holds paths and numbers
NICE: Final = 10  # serving goes first
OOM_SCORE_ADJ: Final = 800  # when memory is short the kernel takes this process, not the agent
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

Job = Callable[..., dict[str, Any]]


def main(arguments: list[str]) -> int:
    """Serve jobs until standard input ends.

    Args:
        arguments: Address space in bytes, process id of the parent.
    """
    memory_bytes_max, parent = (int(each) for each in arguments)
    _confine(memory_bytes_max, parent)
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    with out:
        from .jobs import JOBS  # only now: numpy and onnxruntime live inside the limits

        serve(sys.stdin.buffer, out, JOBS)
    return 0


def serve(source: BinaryIO, target: BinaryIO, jobs: Mapping[str, Job]) -> None:
    """Answer one frame after the other until the source ends."""
    while (request := _read(source)) is not None:
        answer = msgpack.packb(_answer(request, jobs))
        data = memoryview(LENGTH.pack(len(answer)) + answer)
        while data:
            data = data[target.write(data) :]


def _answer(request: dict[str, Any], jobs: Mapping[str, Job]) -> dict[str, Any]:
    name, cpu_s = request.pop("job"), request.pop("cpu_s")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent_s = int(usage.ru_utime + usage.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent_s + cpu_s, resource.RLIM_INFINITY))
    try:
        return {"ok": jobs[name](**request)}
    except ShoalError as exc:
        return {"error": {"code": exc.code, "text": str(exc)[:1000]}}
    except MemoryError as exc:
        return {"error": {"code": "agent.child.resource_limit", "text": str(exc)[:1000]}}
    except Exception as exc:  # a model's own doing; the parent decides what it means
        text = f"{type(exc).__name__}: {exc}"[:1000]
        memory = "alloc" in text.lower()  # onnxruntime wraps std::bad_alloc in a plain error
        code = "agent.child.resource_limit" if memory else "agent.child.failed"
        return {"error": {"code": code, "text": text}}


def _read(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    if length > REQUEST_BYTES_MAX:
        raise ValueError(f"a request of {length} bytes is above {REQUEST_BYTES_MAX}")
    found: dict[str, Any] = msgpack.unpackb(source.read(length))
    return found


def _confine(memory_bytes_max: int, parent: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes_max, memory_bytes_max))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the owner's data
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
        raise SystemExit("the parent is gone")
    os.nice(NICE)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE_ADJ))
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
