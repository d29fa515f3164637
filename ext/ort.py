"""Find ONNX Runtime's library and make engines of ONNX models, without its Python module.

    load(model) -> OrtEngine    through the C interface: 1.20 or newer, no GIL, no NumPy
                -> PyEngine     through the Python module, where the library cannot be used

The second answers the same but slower; its ``backend`` is "ort-python", and whoever shows the
health of a device should say so.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import onnx_graph
from ._ort import OrtEngine, OrtFailure, open_library
from .errors import KernelError

if TYPE_CHECKING:
    from ._engine import Engine

ARENA_BYTES_MIN: Final = 256 << 10
"""Models of fewer bytes run without ORT's arena: 5 % faster, and two threads scale (1.85x against
0.64x of one); larger ones keep theirs, or each call would map and unmap its activations."""

_SETTINGS: Final[Mapping[str, str]] = {"session.intra_op.allow_spinning": "0"}
_TYPES: Final[Mapping[str, int]] = {
    "tensor(float)": 1,
    "tensor(uint8)": 2,
    "tensor(int8)": 3,
    "tensor(uint16)": 4,
    "tensor(int16)": 5,
    "tensor(int32)": 6,
    "tensor(int64)": 7,
    "tensor(bool)": 9,
    "tensor(float16)": 10,
    "tensor(double)": 11,
    "tensor(uint32)": 12,
    "tensor(uint64)": 13,
}

_lock = threading.Lock()


class OrtError(KernelError):
    """ONNX Runtime cannot make a session of a model; nothing was loaded."""

    code = "ext.ort"


class OrtMissingError(OrtError):
    """ONNX Runtime is not installed, or too old, or its library cannot be loaded."""

    code = "ext.ort.missing"


def library() -> str:
    """Load ONNX Runtime's library, once per process, and return its version.

    Raises:
        OrtMissingError: The package onnxruntime is missing, older than 1.20, or broken.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise OrtMissingError("the package onnxruntime is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "capi"
    found = sorted(folder.glob("libonnxruntime.so*"))
    if not found:
        raise OrtMissingError("the package onnxruntime ships no libonnxruntime.so")
    try:
        with _lock:
            version: str = open_library(str(found[-1]).encode())
    except OrtFailure as exc:
        raise OrtMissingError(f"cannot use {found[-1].name}: {exc}") from exc
    return version


def load(
    model: bytes,
    *,
    threads: int = 1,
    arena: bool | None = None,
    settings: Mapping[str, str] | None = None,
) -> Engine:
    """Make an engine of an ONNX model.

    Args:
        model: A serialized ONNX model. Weights in other files are refused: a model is one file
            that was verified as a whole.
        threads: Threads inside one call, 1 to 1024.
        arena: Whether the session keeps its memory between calls; None: by ARENA_BYTES_MIN.
        settings: Entries of ORT's session configuration, beside ours.

    Raises:
        OnnxFormatError: The bytes are no ONNX model.
        OrtError: ORT refuses the model, or it has inputs or outputs that are not dense tensors.
        OrtMissingError: Neither the library nor the Python module can be used.
        ValueError: ``threads`` is out of range.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads must be 1 to 1024, not {threads}")
    read = onnx_graph.read_model(model)
    elsewhere = read.external
    for each in read.graph.inputs:
        if each.shape is None and each.type and each.name not in read.graph.initializers:
            raise OrtError(
                f"the input {each.name} has no shape, not even a number of axes",
                hint="export it with one; axes may be free",
            )
    if elsewhere:
        raise OrtError(
            f"the model keeps weights in other files ({', '.join(elsewhere)[:200]})",
            hint="save it as one file; what is not inside was not verified",
        )
    entries = {**_SETTINGS, **(settings or {})}
    keep = len(model) >= ARENA_BYTES_MIN if arena is None else arena
    try:
        library()
    except OrtMissingError as missing:
        return _through_python(model, threads, keep, entries, missing)
    try:
        unknown = [each.name for each in read.graph.outputs if each.shape is None]
        return OrtEngine(model, threads=threads, arena=keep, config=entries, unknown=unknown)
    except OrtFailure as exc:
        raise OrtError(f"onnxruntime refuses the model: {exc!s:.500}") from exc


def _through_python(
    model: bytes, threads: int, arena: bool, entries: Mapping[str, str], missing: OrtMissingError
) -> Engine:
    try:
        import onnxruntime as ort
    except ImportError:
        raise missing from None
    from ._pyengine import PyEngine

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = arena
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # the module raises classes of its own, rooted in Exception
        raise OrtError(f"onnxruntime refuses the model: {exc!s:.500}") from exc
    names = [each.name for each in session.get_outputs()]
    inputs = tuple(_port(each) for each in session.get_inputs())

    def call(arrays: list[Any]) -> list[Any]:
        feed = {name: array for (name, _, _), array in zip(inputs, arrays, strict=True)}
        found: list[Any] = session.run(names, feed)
        return found

    outputs = tuple(_port(each) for each in session.get_outputs())
    return PyEngine("ort-python", ort.__version__, inputs, outputs, call)


def _port(argument: Any) -> tuple[str, int, tuple[int, ...]]:
    if argument.type not in _TYPES:
        raise OrtError(
            f"{argument.name} is {argument.type}, which needs the library's C interface",
            hint="install onnxruntime 1.20 or newer",
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in argument.shape)
    return argument.name, _TYPES[argument.type], shape
