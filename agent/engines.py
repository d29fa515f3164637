"""Choose what runs a model: which engine, by its format, this device's trial, and a look.

    .tflite -> LiteRT
    .onnx   -> what a trial on this device chose, if its numbers are ONNX Runtime's
            -> the kernel path, where it takes the model, agrees and is faster here and now
            -> ONNX Runtime

Nothing here imports NumPy: a server of small models does without it.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import struct
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from .. import ShoalError
from ..ext import micro, ort
from ..ext._engine import Engine, trim_memory
from ..ext.call import TYPES, Call
from ..ext.errors import KernelError

AGREE_REL: Final = 1e-6
"""Of an output's largest value: how far "auto" may be from ONNX Runtime."""
LOOK_REL: Final = 9e-7
"""… and how far in a look: the largest of many errors is beyond the largest of those looked at."""
FASTER_MIN: Final = 1.1  # noise of two short measurements
LOOKS: Final = 512  # inputs that are compared; a rounding that differs in 1 of 100 is seen
LOOKS_MIN: Final = 32
LOOK_S: Final = 0.05  # beyond LOOKS_MIN it ends when this time is over
ROUNDS: Final = 5
ROUND_S: Final = 0.002
KERNEL_VALUES_MAX: Final = 1 << 16  # elements of inputs and outputs of a model that is looked at
_TFLITE: Final = b"TFL3"
_CODES: Final = {"float32": "f", "float64": "d", "uint8": "B", "int8": "b"}


def is_tflite(model: bytes) -> bool:
    """Whether the bytes are a .tflite flatbuffer."""
    return model[4:8] == _TFLITE


def default_folder(environ: Mapping[str, str]) -> Path:
    """Return where this user's choices are kept; XDG Base Directory 0.8."""
    base = environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "shoal" / "trials"


def engine_for(
    model: bytes,
    *,
    backend: str,
    threads: int,
    trials: Path | None = None,
    signature: str | None = None,
) -> Engine:
    """Return an engine for a model.

    Args:
        model: Bytes of an .onnx or .tflite file.
        backend: "auto", "ort", "kernel", "litert", or another of ``hw.backends``.
        threads: Threads inside one call.
        trials: Folder of choices that trials on this device kept; None: not asked.
        signature: Key of a .tflite model's signature; None: its first.

    Raises:
        ShoalError: The backend is not here, or refuses the model.
        ValueError: There is no such backend.
    """
    if backend == "litert" or (backend == "auto" and is_tflite(model)):
        from ..ext import litert

        return litert.engine(model, signature, threads=threads)
    if signature is not None:
        raise ValueError("only .tflite models have signatures")
    if backend == "ort":
        return ort.load(model, threads=threads)
    if backend == "kernel":
        return micro.compile(model)
    if backend != "auto":
        return _from_backend(backend, model, threads, {})
    if trials is not None and trials.is_dir():
        chosen = _tried(model, trials)
        if chosen is not None:
            return chosen
    return _looked_at(model, threads)


def _from_backend(name: str, model: bytes, threads: int, options: dict[str, str]) -> Engine:
    from ..hw.backends import BACKENDS

    if name not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, not {name!r:.80}")
    made: Any = BACKENDS[name].prepare(model, threads=threads, options=options)
    if not isinstance(made, Engine):
        raise KernelError(f"the backend {name} prepares models, but cannot run them on this device")
    return made


def _tried(model: bytes, trials: Path) -> Engine | None:
    """Return the engine that a trial on this very device chose, if it answers as ORT does."""
    digest = hashlib.sha256(model).hexdigest()
    if not any(trials.glob(f"{digest[:16]}-*.json")):
        return None  # most models: reading the board costs 9 ms and 4 MB of imports
    from ..hw.board import Board
    from ..hw.cache import Cache, versions

    choice = Cache(trials).lookup(digest, Board.read().digest, versions())
    if choice is None or choice.error_rel > AGREE_REL or choice.backend == "kernel":
        return None  # the kernel path is looked at in any case: a trial has fewer vectors
    try:
        return _from_backend(choice.backend, model, choice.threads, dict(choice.options))
    except (ShoalError, ValueError):
        return None  # the device changed since: what is chosen without a trial still runs


def _looked_at(model: bytes, threads: int) -> Engine:
    """Return the kernel path's engine if it agrees with ORT's and is faster; else ORT's."""
    reference = ort.load(model, threads=threads)
    if isinstance(micro.recognise(model), micro.NotRecognised):
        return reference
    try:
        kernel = micro.compile(model)
    except KernelError:
        return reference
    if (
        kernel.inputs != reference.inputs
        or kernel.outputs != reference.outputs
        or any(TYPES[kind][1] not in _CODES for _, kind, _ in (*kernel.inputs, *kernel.outputs))
        or sum(_size(shape) for _, _, shape in (*kernel.inputs, *kernel.outputs))
        > KERNEL_VALUES_MAX
    ):
        return reference
    # The same inputs at every load: whether a device runs the kernel path is not left to chance.
    if not _wins(kernel, reference, random.Random(hashlib.sha256(model).digest())):
        return reference
    del reference
    trim_memory()  # a session takes several times the model's size
    return kernel


def _wins(kernel: Engine, reference: Engine, rng: random.Random) -> bool:
    """Whether the kernels answer as the reference does, and faster.

    Inputs are normal, of scales from 1/16 to 4. Beyond, a Softmax of large logits is
    ill-conditioned in float32: 30 small networks then differ from ORT by up to 2e-6.
    """
    ours, theirs = Call(kernel), Call(reference)
    end_s = time.perf_counter() + LOOK_S
    inputs: dict[str, tuple[tuple[int, ...], bytes]] = {}
    try:
        for look in range(LOOKS):
            inputs = {
                name: (_ones(shape), _values(rng, kind, _size(shape), 4.0 ** (look % 4 - 2)))
                for name, kind, shape in kernel.inputs
            }
            if look >= LOOKS_MIN and time.perf_counter() > end_s:
                break
            if not _agree(ours.infer_raw(inputs), theirs.infer_raw(inputs), kernel):
                return False
        fast = slow = math.inf
        for _ in range(ROUNDS):
            fast = min(fast, FASTER_MIN * _round_s(lambda: ours.infer_raw(inputs), ROUND_S))
            slow = min(slow, _round_s(lambda: theirs.infer_raw(inputs), ROUND_S))
    finally:
        ours.close()
        theirs.close()
    return fast < slow


def _ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if size < 0 else size for size in shape)


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for size in _ones(shape):
        count *= size
    return count


def _values(rng: random.Random, kind: int, count: int, scale: float) -> bytes:
    code = _CODES[TYPES[kind][1]]
    if code in "fd":
        return array(code, (rng.gauss(0, scale) for _ in range(count))).tobytes()
    return rng.randbytes(count)


def _agree(
    ours: dict[str, tuple[tuple[int, ...], bytes]],
    theirs: dict[str, tuple[tuple[int, ...], bytes]],
    engine: Engine,
) -> bool:
    for name, kind, _ in engine.outputs:
        (shape, data), (wanted, expected) = ours[name], theirs[name]
        if shape != wanted:
            return False
        if data == expected:
            continue
        code = _CODES[TYPES[kind][1]]
        size = struct.calcsize(code)
        found = struct.unpack(f"{len(data) // size}{code}", data)
        right = struct.unpack(f"{len(data) // size}{code}", expected)
        largest = max(abs(value) for value in right)
        far = max(abs(a - b) for a, b in zip(found, right, strict=True))
        if code not in "fd" or not far <= LOOK_REL * largest:
            return False
    return True


def _round_s(call: Callable[[], object], budget_s: float) -> float:
    """Return the mean time of a call over about `budget_s`."""
    calls = 0
    start = time.perf_counter()
    while (took := time.perf_counter() - start) < budget_s or not calls:
        call()
        calls += 1
    return took / calls
