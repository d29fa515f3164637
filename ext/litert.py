"""Run .tflite models on LiteRT.

    bytes --tflite.read--> checked --LiteRtEngine--> Engine (bind, run, unbind without the GIL)

``engine`` chooses: LiteRT's C API where it can, else the Python interpreter of the same package,
else the older ``tflite-runtime``. The C calls are in ``_litert``, the reading of files in
``tflite``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from ._litert import Library, LiteRtError, Session
from .errors import KernelError
from .tflite import (
    Quantization,
    TfliteError,
    TfliteGraph,
    TfliteLimits,
    TfliteSignature,
    TfliteTensor,
    read,
)

if TYPE_CHECKING:
    from ._pyengine import PyEngine

__all__ = [
    "LiteRtEngine",
    "LiteRtError",
    "LiteRtMissingError",
    "Quantization",
    "TfliteError",
    "TfliteGraph",
    "TfliteLimits",
    "engine",
    "interpret",
    "read",
    "signatures",
]

Accelerator = Literal["cpu", "gpu", "npu"]

PACKAGE = "ai-edge-litert"
# The versions whose C functions take what _litert passes: read from their machine code, and run
# (2.1.6, 2.2.0, 2.3.0). Before, LiteRtCreateModelFromBuffer took no environment, and crashed.
ABI_FIRST: Final = (2, 1, 6)
ABI_LAST: Final = (2, 3)  # any patch of it
ACCELERATORS: Final[dict[Accelerator, int]] = {"cpu": 1, "gpu": 2, "npu": 4}
AXES_MAX = 8  # of LiteRT's tensors


class LiteRtMissingError(KernelError):
    """LiteRT is not installed here, or not in a version whose C functions are known."""

    code = "ext.litert.missing"


def signatures(model: bytes) -> tuple[str, ...]:
    """Return the keys of a model's signatures; ("",) if it has none.

    Raises:
        TfliteError: As ``read``.
    """
    return tuple(s.key for s in read(model).signatures)


_libraries: dict[int, tuple[Library, str]] = {}  # by accelerators; opened once, never closed
_libraries_lock = threading.Lock()


def library(accelerators: int = 1) -> tuple[Library, str]:
    """Return LiteRT's library and its version, opened at the first call.

    Nothing of the package is imported: it is found by its name and opened by its path.

    Raises:
        LiteRtMissingError: Not installed, or of a version whose functions are not known.
        LiteRtError: It does not open.
    """
    with _libraries_lock:
        if accelerators not in _libraries:
            spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
            if spec is None or spec.origin is None:
                raise LiteRtMissingError(
                    "LiteRT is not installed", hint="pip install 'shoal[litert]'"
                )
            version = importlib.metadata.version(PACKAGE)
            numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
            if not (numbers >= ABI_FIRST and numbers[: len(ABI_LAST)] <= ABI_LAST):
                raise LiteRtMissingError(
                    f"{PACKAGE} {version} is installed, and its C functions are not known here",
                    hint="install 2.1.6 or later, before 2.4",
                )
            folder = Path(spec.origin).parent
            opened = Library(bytes(folder / "libLiteRt.so"), accelerators, bytes(folder))
            _libraries[accelerators] = opened, version
        return _libraries[accelerators]


class LiteRtEngine(Session):
    """One signature of a .tflite model, run by LiteRT's C API.

    Quantised tensors are exposed as their integers, as LiteRT's own interpreter does. Any number
    of threads may use it; calls wait for each other, so give each worker its own engine.

    Args:
        model: The file's bytes.
        signature: Key of the signature; None is the first. See ``signatures``.
        threads: Of the CPU for one call, 1 to 1024.
        accelerator: What to run on.
        fallback: Whether operators that the accelerator lacks may run on the CPU.
        limits: How large the file may be inside.

    Raises:
        TfliteError: The bytes are no such model, or its ports cannot be offered here.
        LiteRtMissingError: LiteRT is not installed, or its version is not known.
        LiteRtError: LiteRT cannot compile the model; the message has its status.

    Attributes:
        accelerated: Whether the accelerator (for the CPU: its fast kernels) runs every operator.
        graph: What the file says.
        quantization: For each port that has any, how its integers mean real numbers.
    """

    graph: TfliteGraph
    quantization: dict[str, Quantization]

    def __init__(
        self,
        model: bytes,
        signature: str | None = None,
        *,
        threads: int = 1,
        accelerator: Accelerator = "cpu",
        fallback: bool = False,
        limits: TfliteLimits | None = None,
    ) -> None:
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be 1 to 1024, not {threads}")
        if accelerator not in ACCELERATORS:
            raise ValueError(f"accelerator must be one of {[*ACCELERATORS]}, not {accelerator!r}")
        model = bytes(model)
        self.graph = read(model, limits)
        chosen = self.graph.signature(signature)
        tensors = self.graph.subgraphs[chosen.subgraph].tensors
        self.quantization = {
            name: scaled
            for name, index in (*chosen.inputs, *chosen.outputs)
            if (scaled := tensors[index].quantization) is not None
        }
        inputs = _ports(chosen.inputs, tensors)
        outputs = _ports(chosen.outputs, tensors)
        bits = ACCELERATORS[accelerator] | (1 if fallback else 0)
        opened, version = library(bits)
        try:
            super().__init__(
                opened,
                version,
                model,
                chosen.key,
                inputs,
                outputs,
                threads=threads,
                accelerators=bits,
                stateful=self.graph.stateful,
            )
        except LiteRtError as exc:
            if self.graph.custom:
                exc.hint = "the model needs custom operators: " + ", ".join(self.graph.custom)
            raise
        if accelerator != "cpu" and not fallback and not self.accelerated:
            raise LiteRtError(
                f"the {accelerator} does not run every operator of the model",
                hint="allow the fallback to the CPU",
            )


class Interpreted(NamedTuple):
    """A signature run by the Python interpreter: what PyEngine is made of."""

    version: str
    inputs: tuple[tuple[str, int, tuple[int, ...]], ...]
    """(name, ONNX type, shape) each."""
    outputs: tuple[tuple[str, int, tuple[int, ...]], ...]
    call: Callable[[list[Any]], list[Any]]
    """From arrays to arrays; any thread may call it, they wait for each other."""
    stateful: bool


def engine(
    model: bytes,
    signature: str | None = None,
    *,
    threads: int = 1,
    accelerator: Accelerator = "cpu",
    fallback: bool = False,
    limits: TfliteLimits | None = None,
) -> LiteRtEngine | PyEngine:
    """Return the best engine for a .tflite model that this machine has.

    LiteRT's C API, if its version is known and no output's shape depends on the data: it cannot
    give such outputs. Else the Python interpreter, on the CPU, about 3 us a call slower.

    Args:
        model: See ``LiteRtEngine``, as for the rest.
        signature: Key of the signature; None is the first.
        threads: Of the CPU for one call.
        accelerator: What to run on.
        fallback: Whether operators that the accelerator lacks may run on the CPU.
        limits: How large the file may be inside.

    Raises:
        TfliteError: The bytes are no such model, or its ports cannot be offered here.
        LiteRtMissingError: There is no LiteRT that can run it; the hint says what to install.
        LiteRtError: LiteRT cannot compile the model.
    """
    graph = read(model, limits)
    if not _data_dependent(graph, graph.signature(signature)):
        try:
            return LiteRtEngine(
                model,
                signature,
                threads=threads,
                accelerator=accelerator,
                fallback=fallback,
                limits=limits,
            )
        except LiteRtMissingError:
            if accelerator != "cpu":
                raise
    elif accelerator != "cpu" and not fallback:
        raise LiteRtError(f"the {accelerator} gives no outputs whose shape depends on the data")
    from ._pyengine import PyEngine  # brings NumPy: only where it is needed

    made = interpret(model, signature, threads=threads, limits=limits)
    return PyEngine(
        "litert-python", made.version, made.inputs, made.outputs, made.call, stateful=made.stateful
    )


def interpret(
    model: bytes,
    signature: str | None = None,
    *,
    threads: int = 1,
    limits: TfliteLimits | None = None,
) -> Interpreted:
    """Load a model into the Python interpreter of LiteRT, or of the older tflite-runtime.

    Raises:
        TfliteError: As ``LiteRtEngine``.
        LiteRtMissingError: Neither is installed, or tflite-runtime with NumPy 2 or later.
        LiteRtError: It cannot prepare the model.
    """
    graph = read(model, limits)
    chosen = graph.signature(signature)
    tensors = graph.subgraphs[chosen.subgraph].tensors
    inputs, outputs = _ports(chosen.inputs, tensors), _ports(chosen.outputs, tensors)
    make, version = _interpreter_class()
    try:
        interpreter = make(model_content=bytes(model), num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as exc:
        raise LiteRtError(f"LiteRT cannot prepare the model: {exc}") from exc
    lock = threading.Lock()

    def by_index(arrays: list[Any]) -> list[Any]:
        with lock:
            resized = False
            for (_, index), array in zip(chosen.inputs, arrays, strict=True):
                if -1 in tensors[index].shape:
                    interpreter.resize_tensor_input(index, array.shape, strict=True)
                    resized = True
            if resized:
                interpreter.allocate_tensors()
            for (_, index), array in zip(chosen.inputs, arrays, strict=True):
                interpreter.set_tensor(index, array)
            interpreter.invoke()
            return [interpreter.get_tensor(index) for _, index in chosen.outputs]

    def by_name(arrays: list[Any]) -> list[Any]:
        with lock:
            runner = interpreter.get_signature_runner(chosen.key)
            named = dict(zip((name for name, _ in chosen.inputs), arrays, strict=True))
            found = runner(**named)
            return [found[name] for name, _ in chosen.outputs]

    return Interpreted(
        version,
        tuple((name, kind, shape) for name, (kind, _, shape) in inputs.items()),
        tuple((name, kind, shape) for name, (kind, _, shape) in outputs.items()),
        by_name if chosen.key else by_index,
        graph.stateful,
    )


def _interpreter_class() -> tuple[Any, str]:
    """Return the interpreter's class and the version of its package."""
    if importlib.util.find_spec("ai_edge_litert") is not None:
        from ai_edge_litert import interpreter  # type: ignore[import-untyped]

        return interpreter.Interpreter, importlib.metadata.version(PACKAGE)
    if importlib.util.find_spec("tflite_runtime") is None:
        raise LiteRtMissingError("LiteRT is not installed", hint="pip install 'shoal[litert]'")
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:  # it was built for the other ABI, and ends the process
        raise LiteRtMissingError(
            f"tflite-runtime cannot run beside NumPy {numpy}: it needs numpy < 2",
            hint="pip install 'shoal[litert]', or numpy<2 if the board has nothing newer",
        )
    from tflite_runtime import (  # type: ignore[import-not-found]
        interpreter as legacy,
    )

    return legacy.Interpreter, importlib.metadata.version("tflite-runtime")


def _data_dependent(graph: TfliteGraph, chosen: TfliteSignature) -> bool:
    """Return whether an output's shape is open though every input's is fixed."""
    tensors = graph.subgraphs[chosen.subgraph].tensors
    return any(-1 in tensors[i].shape for _, i in chosen.outputs) and not any(
        -1 in tensors[i].shape for _, i in chosen.inputs
    )


def _ports(
    rows: Sequence[tuple[str, int]], tensors: Sequence[TfliteTensor]
) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Return for each name (ONNX type, LiteRT type, shape)."""
    ports: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for name, index in rows:
        tensor = tensors[index]
        if not tensor.onnx_type or len(tensor.shape) > AXES_MAX:
            raise TfliteError(
                f"{name!r} is of type {tensor.type} and shape {tensor.shape}; inputs and outputs "
                f"have at most {AXES_MAX} axes of numbers"
            )
        if name in ports:
            raise TfliteError(f"two ports of the model are named {name!r}")
        ports[name] = tensor.onnx_type, tensor.element, tensor.shape
    return ports
