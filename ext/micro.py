"""Run sensor networks in compiled kernels of our own, where ONNX Runtime's overhead dominates.

    model bytes --recognise--> Recognised | NotRecognised --compile--> MicroEngine

Nothing here decides whether the engine is used: a trial on the device does. ``onnx_graph.py``
reads the model, ``micro_plan.py`` makes the program, ``_micro_kernels.h`` runs it.

Guarantees, against onnxruntime at graph optimisation level 99 on the same inputs:
  float   |own - ort| <= 1e-6 * max |ort| for one layer of a few hundred products and for the
          networks that shoal trains; both sides round sums in their own order, so that a chain of
          layers that amplifies (large logits into a Softmax or Tanh) may reach 2e-6
  int8    the same bits, wherever onnxruntime's own kernel does not saturate: on x86 without VNNI
          it adds two products of uint8 x int8 in 16 bits (docs/adr/0005), here nothing saturates.
          Sums are integers, scales are rounded as there. The order of the sums of a group
          normalisation and of a quantized Add's roundings is that of x86 with FMA. Where a float
          convolution, Gemm, Tanh or Sigmoid stands in front of a QuantizeLinear, its last bit may
          differ, and a value that lies that near to the middle of two steps takes the other one:
          the bound there is one quantization step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from . import _micro
from ._micro import MicroEngine
from .errors import KernelError
from .micro_plan import plan
from .micro_program import NotAChainError, Program
from .onnx_graph import OnnxFormatError, ReadLimits, read_model

VERSION: Final = "1"
_LIMITS: Final = ReadLimits(bytes_max=64 << 20, fields_max=200_000)  # a sensor network is below

__all__ = [
    "MicroEngine",
    "MicroError",
    "NotRecognised",
    "Recognised",
    "compile",
    "recognise",
    "variants",
]


class MicroError(KernelError, ValueError):
    """The kernel path cannot take this model or variant; no engine was made."""

    code = "ext.micro"


@dataclass(frozen=True, slots=True)
class Recognised:
    """The kernel path takes the model."""

    steps: int
    """Steps of its program."""
    quantized: bool
    """Whether a layer computes in int8."""


@dataclass(frozen=True, slots=True)
class NotRecognised:
    """The kernel path does not take the model."""

    reason: str
    """One line, such as "op LSTM is not in the kernel path"."""


def recognise(model: bytes) -> Recognised | NotRecognised:
    """Say whether the kernel path takes a model, and if not, why.

    Args:
        model: A serialized ONNX ModelProto; any bytes do no harm.
    """
    try:
        program = _plan(model)
    except (NotAChainError, OnnxFormatError) as exc:
        return NotRecognised(str(exc))
    return Recognised(len(program.steps), program.quantized)


def variants() -> tuple[str, ...]:
    """Return the variants of the kernels that this machine runs, the best last.

    "generic" (16-byte vectors: x86-64, NEON on aarch64), "v3" (AVX2 and FMA), "v4" (AVX-512),
    "v4vnni" (AVX-512 with VNNI).
    """
    return tuple(name for name, _, runs in _micro.variants() if runs)


def compile(model: bytes, *, variant: str | None = None) -> MicroEngine:
    """Return an engine that runs a model.

    Args:
        model: A serialized ONNX ModelProto.
        variant: One of ``variants()``; None takes the best.

    Raises:
        MicroError: The model is not recognised, or this machine does not run the variant.
    """
    chosen = variant or variants()[-1]
    known = {name: (index, lanes) for index, (name, lanes, runs) in _rows() if runs}
    if chosen not in known:
        raise MicroError(
            f"this machine does not run the kernels {chosen!r}",
            hint=f"it runs {', '.join(known)}",
        )
    index, lanes = known[chosen]
    try:
        program = _plan(model)
        rows, scratch_bytes, zero_bytes = program.lay_out(lanes, _micro.pack)
    except (NotAChainError, OnnxFormatError) as exc:
        raise MicroError(f"the kernel path does not take this model: {exc}") from exc
    return MicroEngine(
        VERSION, index, program.inputs, program.outputs, rows, scratch_bytes, zero_bytes
    )


def _rows() -> enumerate[tuple[str, int, bool]]:
    return enumerate(_micro.variants())


def _plan(model: bytes) -> Program:
    return plan(read_model(model, _LIMITS))
