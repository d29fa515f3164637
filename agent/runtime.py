"""Run models: the part of shoal that is useful with no fleet at all.

    with Runtime() as runtime:
        model = runtime.load("wearable.onnx", threads=1)
        outputs = model.infer({"x": window})

Inputs are checked and never cast: a wrong dtype is a wrong answer that nobody notices. Outputs
are the caller's own arrays and stay valid after later calls and after close. A model may be used
from several threads at once; the interpreter lock is released while it runs.
"""

from __future__ import annotations

import math
import operator
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self

from .. import ShoalError
from ..ext.call import TYPES, Call
from ..proto import latency
from .engines import default_folder, engine_for
from .errors import ModelClosedError, ModelError, ModelFormatError, ModelInputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..ext._engine import Engine

MODEL_BYTES_MAX: Final = 2 << 30  # protobuf itself ends there (fault 28)
_NUMBERS: Final = {name: number for number, (name, _) in TYPES.items()}


class Monitor(Protocol):
    """Anything that wants to see what a model saw and said."""

    def observe(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        latency_ns: int,
    ) -> None:
        """Take note of one call; must not keep or change the arrays.

        What it raises, ``infer`` raises: the model has run, and the answer is lost.
        """


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one input or output is."""

    name: str
    type: str
    """ONNX's name: "float", "double", "int8", …, "bool", "string", "bfloat16", "int4"."""
    shape: tuple[int, ...]
    """-1 where any size goes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype that stands for the type.

        Text is object (str or bytes); bfloat16 the raw bits as uint16, 8-bit floats as uint8;
        4-bit integers are int8 or uint8, one value each.
        """
        import numpy as np

        return np.dtype(TYPES[_NUMBERS[self.type]][1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """How an input is converted inside the step: float32 value = raw * scale + bias."""

    type: Literal["uint8", "int8", "uint16", "int16", "float"] = "uint8"
    """Type of the raw values that the caller passes."""
    scale: Sequence[float] = (1.0,)
    """One factor, or one for each channel."""
    bias: Sequence[float] = (0.0,)
    """As many as ``scale``."""
    axis: int = 1
    """Axis of the channels, if there are several factors."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.type not in ("uint8", "int8", "uint16", "int16", "float"):
            raise ValueError(f"raw values are uint8, int8, uint16, int16 or float, not {self.type}")
        if not all(math.isfinite(each) for each in (*self.scale, *self.bias)):
            raise ValueError("scale and bias must be finite")


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
    """Owns loaded models. Cheap to make; a context manager that closes what it loaded.

    Args:
        trials: Folder where ``shoal-agent trial`` keeps what it chose on this device, which
            ``backend="auto"`` follows; None: where the command keeps it for this user.
    """

    def __init__(self, *, trials: Path | None = None) -> None:
        self._models: list[Model] = []
        self._lock = threading.Lock()
        self._closed = False
        self._trials = trials or default_folder(os.environ)

    def load(
        self,
        model: Path | str | bytes,
        *,
        name: str | None = None,
        threads: int = 1,
        backend: str = "auto",
        monitor: Monitor | None = None,
        prepare: Mapping[str, Prepare] | None = None,
        nan: Literal["pass", "refuse"] = "pass",
        signature: str | None = None,
    ) -> Model:
        """Load a model and return it, ready to run.

        Args:
            model: Path of an ``.onnx`` or ``.tflite`` file, or the bytes of one. Weights in
                other files are refused: a model is one file that was verified as a whole.
            name: How to call it in errors and statistics; the file's stem by default.
            threads: Threads inside one call, 1 to 1024; a trial's choice brings its own number.
            backend: What runs it: "ort", "kernel", "litert", "openvino", … (see
                ``shoal-agent doctor``). "auto" takes what is fastest here among what answers
                as ONNX Runtime does, to 1e-6 of an output's largest value, integers to the bit.
            monitor: Sees every successful call. The agent's own runs inside the step.
            prepare: Inputs that the caller passes raw and the step converts.
            nan: "refuse" refuses float inputs that hold NaN or an infinity; "pass" lets the
                model see them.
            signature: Key of a .tflite model's signature; None: its first.

        Raises:
            ModelFormatError: Not a readable model, or one that no engine here can run.
            ModelClosedError: The runtime was closed.
            ValueError: ``threads``, ``backend``, ``prepare`` or ``nan`` is out of range.
        """
        threads = operator.index(threads)
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be 1 to 1024, not {threads}")
        if monitor is not None and not callable(getattr(monitor, "observe", None)):
            raise TypeError(f"a monitor has observe(); {type(monitor).__name__} has none")
        if nan not in ("pass", "refuse"):
            raise ValueError(f"nan must be pass or refuse, not {nan!r:.80}")
        if self._closed:
            raise ModelClosedError("the runtime is closed", hint="make a new Runtime")
        label = name or ("model" if isinstance(model, bytes) else Path(model).stem)
        data = _read(model, label)
        try:
            engine = engine_for(
                data,
                backend=backend,
                threads=threads,
                trials=self._trials,
                signature=signature,
            )
        except ShoalError as exc:
            raise ModelFormatError(
                f"model {label} is not one that this runtime can run: {exc!s:.500}", hint=exc.hint
            ) from exc
        loaded = Model(engine, name=label, monitor=monitor, prepare=prepare, nan=nan)
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


class Model(Call):
    """One loaded model; made by :meth:`Runtime.load`. Thread-safe.

    ``infer``, ``infer_into`` and ``infer_raw`` are inherited from the kernel: a Python frame
    around them would cost a tenth of a small model.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        monitor: Monitor | None = None,
        prepare: Mapping[str, Prepare] | None = None,
        nan: Literal["pass", "refuse"] = "pass",
    ) -> None:
        entries = {}
        for port, each in (prepare or {}).items():
            if port not in [known for known, _, _ in engine.inputs]:
                raise ValueError(f"model {name} has no input {port!r:.80} to prepare")
            entries[port] = (_NUMBERS[each.type], each.axis, list(each.scale), list(each.bias))
        super().__init__(
            engine,
            name=name,
            refused=ModelInputError,
            failed=ModelError,
            closed=ModelClosedError,
            monitor=getattr(monitor, "tap", monitor),
            prepare=entries,
            nan_refused=nan == "refuse",
        )
        self.inputs = tuple(
            TensorSpec(port, TYPES[entries[port][0] if port in entries else kind][0], shape)
            for port, kind, shape in engine.inputs
        )
        self.outputs = tuple(
            TensorSpec(port, TYPES[kind][0], shape) for port, kind, shape in engine.outputs
        )

        self._reset: Callable[[], None] | None = getattr(engine, "reset", None)

    def reset(self) -> None:
        """Forget the state that a streaming model keeps between calls; no call may run.

        Raises:
            ModelError: The model keeps no state, or its engine cannot forget it.
            ModelClosedError: The model was closed.
        """
        if self.closed:
            raise ModelClosedError(f"model {self.name} is closed")
        if not self.stateful or self._reset is None:
            raise ModelError(
                f"model {self.name} keeps no state that {self.backend} could forget",
                hint="load it again",
            )
        self._reset()

    def close(self) -> None:
        """Refuse further calls; memory is free when the last call that runs ends."""
        self._reset = None
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<Model {self.name} {self.backend} {self.version}{state}>"

    def stats(self) -> Stats:
        """Return counts and latency percentiles since the model was loaded."""
        calls, errors, counts = self.counters()
        return Stats(
            calls=calls,
            errors=errors,
            latency_p50_us=latency.quantile_us(counts, 0.5),
            latency_p99_us=latency.quantile_us(counts, 0.99),
        )


def _read(model: Path | str | bytes, label: str) -> bytes:
    if isinstance(model, bytes):
        data = model
    else:
        path = Path(model)
        try:
            # A fifo would make the open wait, a device never ends.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise ModelFormatError(f"{path} is no regular file; nothing was loaded")
                data = file.read(MODEL_BYTES_MAX + 1)
        except OSError as exc:
            raise ModelFormatError(f"cannot read the model {path}: {exc.strerror}") from exc
    if len(data) > MODEL_BYTES_MAX:
        raise ModelFormatError(f"model {label} is larger than {MODEL_BYTES_MAX} bytes")
    if not data:
        raise ModelFormatError(f"model {label} is empty")
    return data
