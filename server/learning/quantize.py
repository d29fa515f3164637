"""Static int8 quantization: uint8 activations, int8 weights per channel, QDQ form.

Weights use 7 of their 8 bits. An x86 without VNNI adds two products of uint8 × int8 in 16 bits and
saturates without a word: with 8 bits and wide ranges the smartwatch network falls from .94 to .64
(measured), with 7 it stays, and the answers are the same on every processor.

Convolutions and linear layers become int8; normalisations stay in float, where they cost little
and would lose much. Ranges are the 0.01 and 99.99 percentiles of the calibration windows, so that
one spike of a sensor does not coarsen every window. Dynamic int8 is never used: on convolutions it
is an order slower than float. The quantizer is onnxruntime's own; this file gives it calibration
windows, keeps it quiet and reproducible, and puts the softmax behind it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from .autodiff import IR_VERSION
from .errors import DatasetError
from .networks import INPUT, with_probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """How to calibrate."""

    windows_max: int = 300
    """Calibration windows; more do not help (accuracy within 0.1 points from 200 on)."""
    batch_size: int = 30
    """Windows per calibration call; bounds memory."""
    weight_bits: int = 7
    """7, or 8 for a fleet whose processors all have VNNI or are ARM: see the module head."""
    percentile: float = 99.99
    """Share of each activation's values inside its range, percent."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.windows_max <= 100_000 or not 1 <= self.batch_size <= 100_000:
            raise ValueError("windows_max and batch_size must be 1 to 100000")
        if self.weight_bits not in (7, 8):
            raise ValueError("weight_bits must be 7 or 8")
        if not 90 <= self.percentile <= 100:
            raise ValueError("percentile must be 90 to 100")


def quantize_int8(
    model: onnx.ModelProto,
    calibration__nct: NDArray[np.float32],
    *,
    config: QuantizeConfig | None = None,
    probabilities: bool = True,
) -> onnx.ModelProto:
    """Return the int8 form of a float model.

    Args:
        model: Float graph with input ``x`` and logits.
        calibration__nct: Typical windows, float32 (N, C, T), N >= 1; an even choice of at most
            ``windows_max`` of them is used.
        config: How to calibrate.
        probabilities: Put a Softmax behind the logits, in float: it costs nothing and keeps the
            confidence finer than 1/256.

    Returns:
        A QDQ graph; the same model and windows give the same bytes.

    Raises:
        DatasetError: There is no calibration window.
    """
    config = config or QuantizeConfig()
    if not len(calibration__nct):
        raise DatasetError("quantization needs calibration windows")
    count = min(len(calibration__nct), config.windows_max)
    if count > config.batch_size:
        count -= count % config.batch_size  # the calibrator takes batches of one size only
    chosen = calibration__nct[np.linspace(0, len(calibration__nct) - 1, count).astype(int)]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantizer logs its advice on the root logger
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-quantize-") as folder:
            plain, ready, done = (Path(folder) / f"{name}.onnx" for name in ("in", "pre", "out"))
            onnx.save(model, plain)
            quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
                quantize_static(
                    str(ready),
                    str(done),
                    _Reader(chosen, config.batch_size),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    reduce_range=config.weight_bits == 7,
                    op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                    calibrate_method=CalibrationMethod.Percentile,
                    extra_options={"CalibPercentile": config.percentile},
                )
            found = onnx.load(done)
    finally:
        root.setLevel(level)
    if probabilities:
        found = with_probabilities(found)
    found.ir_version = IR_VERSION
    found.producer_name, found.producer_version = "shoal", ""
    del found.metadata_props[:]
    onnx.checker.check_model(found)
    return found


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands calibration windows to the quantizer."""

    def __init__(self, windows__nct: NDArray[np.float32], batch_size: int) -> None:
        self._batches: Iterator[dict[str, Any]] = iter(
            [
                {INPUT: windows__nct[start : start + batch_size]}
                for start in range(0, len(windows__nct), batch_size)
            ]
        )

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None after the last."""
        return next(self._batches, None)
