"""Models for the backends that `make test-npu` has packages for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.npu.cnn import SHAPE, Noise, make_cnn

OKAY_NABU = Path(__file__).parents[2] / ".models" / "okay_nabu.tflite"


@pytest.fixture(scope="session")
def cnn() -> bytes:
    """The float CNN."""
    return make_cnn()


@pytest.fixture(scope="session")
def cnn_int8(cnn: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The CNN in QDQ form: uint8 activations, int8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            random = np.random.default_rng(1)
            rows = [random.standard_normal(SHAPE).astype(np.float32) for _ in range(16)]
            self.rows: Iterator[NDArray[np.float32]] = iter(rows)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            row = next(self.rows, None)
            return None if row is None else {"x": row}

    folder = tmp_path_factory.mktemp("int8")
    (folder / "float.onnx").write_bytes(cnn)
    with contextlib.redirect_stdout(io.StringIO()):
        quantize(
            folder / "float.onnx",
            folder / "int8.onnx",
            Rows(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return (folder / "int8.onnx").read_bytes()


@pytest.fixture(scope="session")
def okay_nabu() -> bytes:
    """A real streaming model of a wake word: int8, with variables."""
    if not OKAY_NABU.exists():
        pytest.skip("needs .models/okay_nabu.tflite: `make models` fetches it")
    return OKAY_NABU.read_bytes()


@pytest.fixture
def noise() -> Noise:
    """Eight inputs that calibration has not seen."""
    random = np.random.default_rng(2)
    return [random.standard_normal(SHAPE).astype(np.float32) for _ in range(8)]
