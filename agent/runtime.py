"""Run models: the part of shoal that is useful with no fleet at all.

    with Runtime() as runtime:
        model = runtime.load("wearable.onnx", threads=1)
        outputs = model.infer({"x": window})

Inputs are checked and never cast: a wrong dtype is a wrong answer that nobody notices. Outputs
are the caller's own arrays and stay valid after later calls and after close. A model may be used
from several threads at once; the interpreter lock is released while it runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..proto import latency
from .errors import ModelClosedError, ModelError, ModelFormatError, ModelInputError

MODEL_BYTES_MAX: Final = 2 << 30  # protobuf itself ends there (fault 28)

_DTYPES: Final[Mapping[str, type[np.generic]]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


class Monitor(Protocol):
    """Anything that wants to see what a model saw and said."""

    def observe(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        latency_ns: int,
    ) -> None:
        """Take note of one call; must not keep the arrays."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one input or output is."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """-1 where any size goes."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a model has done since it was loaded."""

    calls: int
    errors: int
    """Calls that the engine refused; a refused input is not counted."""
    latency_p50_us: float
    latency_p99_us: float
    """Upper bounds, within a factor 2**(1/3); 0 before the first call."""


class Runtime:
    """Owns loaded models. Cheap to make; a context manager that closes what it loaded."""

    def __init__(self) -> None:
        self._models: list[Model] = []
        self._lock = threading.Lock()
        self._closed = False

    def load(
        self,
        model: Path | str | bytes,
        *,
        name: str | None = None,
        threads: int = 1,
        monitor: Monitor | None = None,
    ) -> Model:
        """Load a model and return it, ready to run.

        Args:
            model: Path of an ``.onnx`` file, or the bytes of one. Weights in other files are
                refused: a model is one file that was verified as a whole.
            name: How to call it in errors and statistics; the file's stem by default.
            threads: Threads inside one call, 1 to 1024.
            monitor: Sees every successful call.

        Raises:
            ModelFormatError: Not a readable ONNX model, or one that this engine cannot run.
            ModelClosedError: The runtime was closed.
            ValueError: ``threads`` is out of range.
        """
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be 1 to 1024, not {threads}")
        if self._closed:
            raise ModelClosedError("the runtime is closed", hint="make a new Runtime")
        label = name or ("model" if isinstance(model, bytes) else Path(model).stem)
        loaded = Model(label, _session(_read(model, label), label, threads), monitor)
        with self._lock:
            self._models = [each for each in self._models if not each.closed] + [loaded]
        return loaded

    def close(self) -> None:
        """Close every model; a call that runs finishes first."""
        self._closed = True
        with self._lock:
            models, self._models = self._models, []
        for model in models:
            model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class Model:
    """One loaded model; made by :meth:`Runtime.load`. Thread-safe."""

    def __init__(self, name: str, session: ort.InferenceSession, monitor: Monitor | None) -> None:
        self.name = name
        self.inputs = tuple(_spec(each, name) for each in session.get_inputs())
        self.outputs = tuple(_spec(each, name) for each in session.get_outputs())
        self._session: ort.InferenceSession | None = session
        self._monitor = monitor
        self._wanted = {spec.name: spec for spec in self.inputs}
        self._names = [spec.name for spec in self.outputs]
        self._lock = threading.Lock()
        self._latency = [0] * latency.BINS
        self._errors = 0

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._session is None

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the model once.

        Args:
            inputs: One C-contiguous array for each of :attr:`inputs`, of exactly its dtype and
                shape (any size where the shape says -1). NaN and infinity are passed on.

        Returns:
            One array for each of :attr:`outputs`, by name, owned by the caller.

        Raises:
            ModelInputError: A name, dtype, shape or layout is wrong; says what was expected.
            ModelClosedError: The model was closed.
            ModelError: The engine failed in the middle; the model stays usable.
        """
        session = self._session
        if session is None:
            raise ModelClosedError(f"model {self.name} is closed")
        self._check(inputs)
        start = time.perf_counter_ns()
        try:
            values = session.run(self._names, dict(inputs))
        except Exception as exc:  # the engine raises classes of its own, rooted in Exception
            with self._lock:
                self._errors += 1
            raise ModelError(f"model {self.name} failed: {exc!s:.500}") from exc
        took_ns = time.perf_counter_ns() - start
        outputs = dict(zip(self._names, values, strict=True))
        with self._lock:
            self._latency[latency.bin_of(took_ns / 1000)] += 1
        if self._monitor is not None:
            self._monitor.observe(inputs, outputs, took_ns)
        return outputs

    def stats(self) -> Stats:
        """Return counts and latency percentiles since the model was loaded."""
        with self._lock:
            counts, errors = list(self._latency), self._errors
        return Stats(
            calls=sum(counts),
            errors=errors,
            latency_p50_us=latency.quantile_us(counts, 0.5),
            latency_p99_us=latency.quantile_us(counts, 0.99),
        )

    def close(self) -> None:
        """Release the engine's memory; a second close does nothing."""
        self._session = None

    def _check(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        if inputs.keys() != self._wanted.keys():
            raise ModelInputError(
                f"model {self.name} takes the inputs {sorted(self._wanted)}, not {sorted(inputs)}"
            )
        for name, spec in self._wanted.items():
            value = inputs[name]
            if not isinstance(value, np.ndarray):
                raise ModelInputError(
                    f"input {name} of {self.name} must be a numpy array, not {type(value).__name__}"
                )
            if value.dtype != spec.dtype:
                raise ModelInputError(
                    f"input {name} of {self.name} must be {spec.dtype}, not {value.dtype}",
                    hint="convert it where its meaning is known; shoal never casts",
                )
            fits = len(value.shape) == len(spec.shape) and all(
                want in (-1, have) for want, have in zip(spec.shape, value.shape, strict=True)
            )
            if not fits:
                raise ModelInputError(
                    f"input {name} of {self.name} must have shape {spec.shape}, not {value.shape}"
                )
            if not value.flags.c_contiguous:
                raise ModelInputError(
                    f"input {name} of {self.name} is not C-contiguous",
                    hint="pass numpy.ascontiguousarray(x)",
                )


def _read(model: Path | str | bytes, label: str) -> bytes:
    if isinstance(model, bytes):
        data = model
    else:
        path = Path(model)
        try:
            if path.stat().st_size > MODEL_BYTES_MAX:
                raise ModelFormatError(f"{path} is larger than {MODEL_BYTES_MAX} bytes")
            data = path.read_bytes()
        except OSError as exc:
            raise ModelFormatError(f"cannot read the model {path}: {exc.strerror}") from exc
    if not data:
        raise ModelFormatError(f"model {label} is empty")
    return data


def _session(data: bytes, label: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, with the engine's own text
    options.enable_cpu_mem_arena = False  # small models: 5 % faster, and two threads scale
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # as above
        raise ModelFormatError(
            f"model {label} is not an ONNX model this runtime can run: {exc!s:.300}",
            hint="check the file with the tool that exported it; only self-contained .onnx loads",
        ) from exc


def _spec(argument: Any, label: str) -> TensorSpec:
    try:
        dtype = np.dtype(_DTYPES[argument.type])
    except KeyError as exc:
        raise ModelFormatError(
            f"model {label}: {argument.name} has the type {argument.type}, which is not supported",
            hint=f"supported: {', '.join(sorted(_DTYPES))}",
        ) from exc
    shape = tuple(size if isinstance(size, int) else -1 for size in argument.shape)
    return TensorSpec(argument.name, dtype, shape)
