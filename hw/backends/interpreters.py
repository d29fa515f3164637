"""Run a .tflite that was compiled for an accelerator, through LiteRT's interpreter and a delegate.

A vendor's compiler has put what the accelerator takes into one custom operator; the vendor's
delegate runs that, and whatever is beside it runs on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from ...ext import flatbuffer, tflite
from ...ext.errors import KernelError
from ...ext.flatbuffer import FlatbufferError
from .base import CPU, BackendError, Package, Placed, Placement, Port, package, short

if TYPE_CHECKING:
    from .engines import Arrays, VendorEngine

_TYPES: Final = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7,
    "bool": 9, "float16": 10, "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip

TABLES_MAX: Final = 250_000  # as ext.tflite's: the largest model met has 8,000
BUILTIN_CUSTOM: Final = 32


def installed() -> Package | None:
    """Return the package with the interpreter, not imported."""
    return package("ai_edge_litert", "ai-edge-litert") or package("tflite_runtime")


def interpreter_module() -> Any:
    """Import the interpreter's module, of LiteRT or of the older tflite-runtime."""
    if package("ai_edge_litert") is not None:
        from ai_edge_litert import interpreter  # type: ignore[import-untyped]
    else:
        from tflite_runtime import interpreter  # type: ignore[import-not-found]
    return interpreter


def load_delegate(library: str) -> Any:
    """Open a vendor's delegate.

    Raises:
        BackendError: The library is not here, or finds no device.
    """
    module = interpreter_module()
    try:
        return module.load_delegate(library)
    except (OSError, ValueError, RuntimeError) as exc:
        raise BackendError(f"{library} does not open: {short(exc) or 'no reason given'}") from exc


def read_graph(model: bytes) -> tflite.TfliteGraph:
    """Return what a .tflite says.

    Raises:
        BackendError: It is no such file, or it does not hold together.
    """
    try:
        return tflite.read(model)
    except KernelError as exc:
        raise BackendError(str(exc), hint=exc.hint) from exc


def custom_placement(model: bytes, custom: str, device: str) -> Placement:
    """Say which operators of a compiled file are the accelerator's.

    Read here and not by ``read_graph``, which refuses what a compiler may write: its operators
    read scratch memory that nobody has written. Only what the file says is taken, nothing is run.

    Args:
        model: As the vendor's compiler wrote it.
        custom: Name of the vendor's operator.
        device: Its device's name.

    Raises:
        BackendError: The file cannot be read.
    """
    try:
        nodes = [
            Placed(name, op, device if op == custom else CPU) for name, op in _operators(model)
        ]
    except FlatbufferError as exc:
        raise BackendError(f"not a .tflite model: {exc}") from exc
    return Placement.of(nodes, f"of the compiled file: one {custom} stands for many operators")


def _operators(model: bytes) -> Iterator[tuple[str, str]]:
    """Yield each operator's first output and name. Fields are numbered as in schema.fbs."""
    root = flatbuffer.Reader(model, tables_max=TABLES_MAX).root()
    codes = []
    for code in root.tables(1):
        builtin = max(code.scalar(0, "<b"), code.scalar(3, "<i"))
        codes.append(code.text(1) if builtin == BUILTIN_CUSTOM else f"builtin {builtin}")
    for graph in root.tables(2):
        names = [tensor.text(3) for tensor in graph.tables(0)]
        for operator in graph.tables(3):
            outputs, index = operator.numbers(2, "i"), operator.scalar(0, "<I")
            if index >= len(codes) or any(not 0 <= each < len(names) for each in outputs):
                raise FlatbufferError("broken file: an operator's index is out of range")
            yield names[outputs[0]] if outputs else "", codes[index]


def load(
    model: bytes, *, backend: str, version: str, threads: int, delegate: Any, attest: Any
) -> VendorEngine:
    """Load a .tflite with a delegate.

    Args:
        model: The file's bytes.
        backend: Name of the engine's backend.
        version: Of the delegate or the interpreter.
        threads: Of the CPU.
        delegate: As ``load_delegate`` returned it; None = the CPU alone.
        attest: Returns the placement.

    Raises:
        BackendError: The interpreter refuses the model.
    """
    from .engines import make_engine

    delegates = [] if delegate is None else [delegate]
    try:
        interpreter = interpreter_module().Interpreter(
            model_content=model, num_threads=threads, experimental_delegates=delegates
        )
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as exc:
        raise BackendError(f"the interpreter refuses the model: {short(exc)}") from exc
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    lock = threading.Lock()  # the tensors are the interpreter's

    def call(arrays: Arrays) -> Arrays:
        with lock:
            for each, array in zip(inputs, arrays, strict=True):
                interpreter.set_tensor(each["index"], array)
            interpreter.invoke()
            return [interpreter.get_tensor(each["index"]) for each in outputs]

    return make_engine(
        backend,
        version,
        tuple(_port(each) for each in inputs),
        tuple(_port(each) for each in outputs),
        call,
        attest=attest,
    )


def _port(found: Any) -> Port:
    name = found["dtype"].__name__
    if name not in _TYPES:
        raise BackendError(f"{found['name']!r} is of type {name}, which cannot be offered")
    return found["name"], _TYPES[name], tuple(int(each) for each in found["shape"])
