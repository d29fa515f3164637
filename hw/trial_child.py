"""The child process of a trial: confine itself, do one job, answer, end.

    python -P -m shoal.hw.trial_child MEMORY_BYTES CPU_S PARENT_PID ANSWER_FD
    stdin: one JSON request until its end;  ANSWER_FD: u32 LE length + JSON of at most 1 MiB
    {"job": "plan" | "vectors" | "measure", ...} -> {"ok": {...}} | {"error": {code, text, hint}}

A model may ask for any amount of memory or never end (faults 20 and 21), and a vendor's driver may
crash. So one process tries one candidate: its private memory and CPU time are bounded before the
model is read, it gains no privilege, it leaves no core, it ends with its parent, and its working
directory no longer exists, so that a relative path inside a model finds nothing. Shared memory is
not under such a limit: the parent watches the resident size, and the clock.

The model comes as an inherited descriptor of sealed memory: nothing can be swapped in between.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from .. import ShoalError
from .choice import Outcome

if TYPE_CHECKING:
    from .board import Board

LENGTH: Final = struct.Struct("<I")
ANSWER_BYTES_MAX: Final = 1 << 20
REQUEST_BYTES_MAX: Final = 1 << 20
FILES_MAX: Final = 256  # open at once: libraries are closed once they are mapped
WRITE_BYTES_MAX: Final = 256 << 20  # of any one file, generated vectors among them
OOM_SCORE_ADJ: Final = 800  # when memory is short the kernel takes this process first
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PR_SET_NO_NEW_PRIVS: Final = 38
MEMORY_CODE: Final = "hw.trial.memory"

REFERENCES: Final = {".onnx": "ort", ".tflite": "litert"}
"""Whose answers the others are compared with where there are no golden vectors."""
THREADED: Final = frozenset({"ort", "litert", "openvino"})
"""Backends that share one call between threads of the CPU."""
ELSEWHERE: Final = frozenset({"device", "accelerator"})
"""Options that lead away from the CPU."""


def main(arguments: list[str]) -> int:
    """Do one job; see the module's head."""
    memory_bytes_max, cpu_s_max, parent, answer_fd = (int(each) for each in arguments)
    _confine(memory_bytes_max, cpu_s_max, parent)
    os.dup2(2, 1)  # what libraries print goes to standard error
    request = json.loads(sys.stdin.buffer.read(REQUEST_BYTES_MAX))
    answer = json.dumps(_answer(request)).encode()
    if len(answer) > ANSWER_BYTES_MAX:
        text = f"the answer of {len(answer)} bytes is too long"
        answer = json.dumps({"error": {"code": "hw.trial", "text": text, "hint": ""}}).encode()
    with os.fdopen(answer_fd, "wb") as file:
        file.write(LENGTH.pack(len(answer)) + answer)
    sys.stderr.flush()
    os._exit(0)  # not one more line of a library whose model was strange


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": JOBS[request.pop("job")](**request)}
    except Exception as exc:  # a foreign backend's own class, too
        from .trial import is_memory

        code, text, hint = "hw.trial.failed", f"{type(exc).__name__}: {exc}", ""
        if isinstance(exc, ShoalError):
            code, text, hint = exc.code, str(exc), exc.hint
        return _error(MEMORY_CODE if is_memory(exc) else code, text, hint)


def _error(code: str, text: str, hint: str = "") -> dict[str, Any]:
    return {"error": {"code": code, "text": text[:1000], "hint": hint[:1000]}}


# --- jobs ------------------------------------------------------------------------------------


def _plan(*, model_fd: int, threads: list[int], reference_only: bool) -> dict[str, Any]:
    """Say what this board is, and what there is to try on it, the reference first."""
    from .backends import BACKENDS
    from .board import Board

    model = _read(model_fd)
    _check(model)
    suffix = _suffix(model)
    board = Board.read()
    counts = threads or _thread_counts(board)
    rows = []
    for name in sorted(BACKENDS, key=lambda name: name != REFERENCES[suffix]):
        backend = BACKENDS[name]
        if suffix not in backend.suffixes or (reference_only and name != REFERENCES[suffix]):
            continue
        found = backend.probe()
        if found.state != "ready":
            rows.append(_row(name, "", 1, {}, Outcome.ABSENT, f"{found.state}: {found.detail}"))
            continue
        for variant, options in found.variants.items():
            threaded = name in THREADED and not ELSEWHERE & options.keys()
            for count in counts if threaded else [1]:
                row = _row(name, variant, count, options, Outcome.MEASURED, "")
                rows.append({**row, "simulated": found.simulated})
    return {"board": board.digest, "rows": rows, "reference": REFERENCES[suffix]}


def _row(
    name: str, variant: str, threads: int, options: Mapping[str, str], outcome: str, reason: str
) -> dict[str, Any]:
    candidate = {"backend": name, "variant": variant, "threads": threads, "options": dict(options)}
    return {"candidate": candidate, "outcome": outcome, "reason": reason, "simulated": False}


def _thread_counts(board: Board) -> list[int]:
    """Return 1, 2, half and all of the CPUs that this process may use."""
    cpus = len(board.limits.cpus) or len(board.cpus_online) or 1
    if board.limits.cpu_quota is not None:
        cpus = max(1, min(cpus, int(board.limits.cpu_quota)))
    return sorted({1, min(2, cpus), max(1, cpus // 2), cpus})


def _vectors(
    *, model_fd: int, vectors_fd: int, candidate: dict[str, Any], seconds: float, seed: int
) -> dict[str, Any]:
    """Run the reference on generated inputs and write the vectors."""
    from ..ext.call import Call
    from .backends import BACKENDS
    from .trial import Input, make_vectors, ports
    from .vectors import write_vectors

    model = _read(model_fd)
    _check(model)
    backend, threads = BACKENDS[candidate["backend"]], candidate["threads"]

    def load() -> tuple[Call, list[Input]]:
        engine = backend.prepare(model, threads=threads, options=candidate["options"])
        return Call(engine), ports(engine.inputs)

    vectors, text = make_vectors(load, seconds=seconds, seed=seed)
    with os.fdopen(vectors_fd, "wb", closefd=False) as file:
        write_vectors(file, vectors)
    return {"text": text}


def _measure(
    *,
    model_fd: int,
    vectors_fd: int,
    candidate: dict[str, Any],
    compare_s: float,
    time_s: float,
) -> dict[str, Any]:
    """Compare and time one candidate, and say where it ran."""
    from ..ext.call import Call
    from .backends import BACKENDS
    from .trial import measure
    from .vectors import read_vectors

    model = _read(model_fd)
    _check(model)
    vectors = read_vectors(io.BytesIO(_read(vectors_fd)))
    backend = BACKENDS[candidate["backend"]]
    before = _reset_peak()
    engine = backend.prepare(model, threads=candidate["threads"], options=candidate["options"])
    figures = measure(Call(engine), vectors, compare_s=compare_s, time_s=time_s)
    peak = _status("VmHWM")
    placement = backend.placement(model, engine)
    return {
        **asdict(figures),
        "ram_bytes": max(0, peak - before),
        "fallback": placement.cpu_share,
        "placement": placement.counts,
        "placement_note": placement.reason,
    }


JOBS: Final[Mapping[str, Callable[..., dict[str, Any]]]] = {
    "plan": _plan,
    "vectors": _vectors,
    "measure": _measure,
}


def _check(model: bytes) -> None:
    """Refuse what would need another file."""
    from ..ext.onnx_graph import OnnxFormatError, read_model
    from .trial import TrialError

    if _suffix(model) == ".tflite":  # it has no such thing, and a reader in front of the engine
        return
    try:
        external = read_model(model).external
    except OnnxFormatError as exc:
        raise TrialError(
            f"this is neither an .onnx nor a .tflite model: {exc}",
            hint=exc.hint or "check the file with the tool that exported it",
        ) from exc
    if external:
        raise TrialError(
            f"the model keeps weights in other files: {', '.join(external)[:200]}",
            hint="save it as one file: a model is verified as a whole",
        )


def _suffix(model: bytes) -> str:
    return ".tflite" if model[4:8] == b"TFL3" else ".onnx"


def _read(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def _reset_peak() -> int:
    """Let the peak of the resident size start anew; return the size now, in bytes."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # then the peak so far counts, which is that of the interpreter
    return _status("VmRSS")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
    return 0


def _confine(memory_bytes_max: int, cpu_s_max: int, parent: int) -> None:
    # RLIMIT_DATA, not RLIMIT_AS: it counts private writable memory as it becomes writable.
    # Runtimes reserve address space by the GiB that they never touch.
    for what, limit in (
        (resource.RLIMIT_DATA, memory_bytes_max),
        (resource.RLIMIT_CORE, 0),  # a core would hold the owner's data
        (resource.RLIMIT_FSIZE, WRITE_BYTES_MAX),
        (resource.RLIMIT_NOFILE, FILES_MAX),
    ):
        resource.setrlimit(what, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s_max, cpu_s_max + 1))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
        raise SystemExit("the parent is gone")
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE_ADJ))
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
