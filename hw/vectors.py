"""Hold what goes into a model and what should come out, and say how far off an answer is.

    .npz file --read_vectors--> Vectors --(a backend runs them)--> Comparison: errors, top-1

A file has for each input an array ``in.<name>`` and for each output ``out.<name>``, both with a
leading axis of V vectors in front of the tensor's own shape; text as U or S arrays. Vectors run
one by one and in order, so a model with a state is given a stream. ``generate`` makes inputs where
nobody has given any.

V vectors, K classes.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from .choice import OutputError
from .errors import HwError

GENERATED: Final = 16  # vectors made when there are none
TIE_REL: Final = 1e-6  # classes whose expected scores are this near are equally the best
ALPHABET: Final = "abcde 0123"

Arrays = dict[str, NDArray[Any]]

_NOT_NPZ: Final = (
    AttributeError,  # a lone .npy is an array, and has no names
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class VectorsError(HwError):
    """A file does not hold golden vectors; the text says why."""

    code = "hw.vectors"


@dataclass(frozen=True, slots=True)
class Vectors:
    """What goes in and what should come out. Arrays have a leading axis V."""

    inputs: Arrays
    outputs: Arrays

    @property
    def count(self) -> int:
        """V."""
        return len(next(iter(self.inputs.values()))) if self.inputs else 1

    def call(self, index: int) -> Arrays:
        """Return the inputs of one call."""
        return {name: values[index, ...] for name, values in self.inputs.items()}  # 0-d stays one


def read_vectors(file: BinaryIO) -> Vectors:
    """Read a .npz file of vectors.

    Raises:
        VectorsError: It is not one: not a .npz, pickled, names of another form, no output, or
            leading axes that differ.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: np.ascontiguousarray(found[name]) for name in found.files}
    except _NOT_NPZ as exc:
        raise VectorsError(f"not a .npz file of golden vectors: {exc!s:.200}") from exc
    inputs = {name[3:]: each for name, each in arrays.items() if name.startswith("in.")}
    outputs = {name[4:]: each for name, each in arrays.items() if name.startswith("out.")}
    if len(inputs) + len(outputs) != len(arrays) or not outputs:
        raise VectorsError(
            f"golden vectors are named {sorted(arrays)[:8]}",
            hint="name the arrays in.<input> and out.<output>, at least one of them an output",
        )
    counts = {len(each) for each in arrays.values()}
    if len(counts) != 1 or counts == {0}:
        raise VectorsError(
            f"golden vectors have leading axes of {sorted(counts)}, not one size >= 1"
        )
    return Vectors(inputs, outputs)


def write_vectors(file: BinaryIO, vectors: Vectors) -> None:
    """Write what :func:`read_vectors` reads."""
    arrays = {f"in.{name}": each for name, each in vectors.inputs.items()}
    arrays |= {f"out.{name}": each for name, each in vectors.outputs.items()}
    for name, each in arrays.items():
        if each.dtype == object:  # text; a .npz holds it without pickling as U
            arrays[name] = each.astype(str)
    np.savez(file, allow_pickle=False, **arrays)


def generate(
    inputs: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]],
    *,
    count: int = GENERATED,
    seed: int = 0,
    small: bool = False,
) -> Arrays:
    """Make inputs for a model nobody has given any for.

    Args:
        inputs: (name, dtype, shape) each; a free axis (-1) becomes 1.
        count: V.
        seed: The same inputs for the same seed.
        small: Integers are 0 or 1, not of the full range: most models that look something up, or
            count by an input, take no others.

    Returns:
        Arrays of shape (V, *shape): floats are normal (0, 1), truth values even, texts 0 to 8
        letters.
    """
    random = np.random.default_rng(seed)
    made: Arrays = {}
    for name, dtype, shape in inputs:
        size = (count, *(1 if axis < 0 else axis for axis in shape))
        if dtype.kind == "b" or (small and dtype.kind in "iu"):
            made[name] = random.integers(0, 2, size).astype(dtype)
        elif dtype.kind in "iu":
            limits = np.iinfo(dtype)
            made[name] = random.integers(limits.min, limits.max, size, dtype, endpoint=True)
        elif dtype.kind in "OUS":
            texts = np.empty(size, dtype=object)
            for place in np.ndindex(size):
                length = int(random.integers(0, 9))
                texts[place] = "".join(random.choice(list(ALPHABET), length))
            made[name] = texts
        else:
            made[name] = random.standard_normal(size, np.float32).astype(dtype)
    return made


def compare(name: str, want: NDArray[Any], got: NDArray[Any] | None) -> OutputError:
    """Say how far an output is from what it should be.

    Args:
        name: Of the output.
        want: Expected, any shape.
        got: What came out; None = nothing.

    Returns:
        The largest absolute difference, and it as a share of the largest finite magnitude in
        ``want``. NaN equals NaN and infinity equals itself; where only one side has it, where
        shapes differ, and where texts differ there is no number but a note.
    """

    def incomparable(note: str) -> OutputError:
        return OutputError(name=name, abs_max=None, rel_max=None, note=note)

    if got is None:
        return incomparable("this output is missing")
    if want.shape != got.shape:
        return incomparable(f"shape {got.shape} instead of {want.shape}")
    if want.dtype.kind in "OUS" or got.dtype.kind in "OUS":
        wrong = int(np.sum(_text(want) != _text(got)))
        if wrong:
            return incomparable(f"{wrong} of {want.size} texts differ")
        return OutputError(name=name, abs_max=0.0, rel_max=0.0)
    a, b = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return incomparable("NaN or infinity where the other has none")
    difference = np.abs(a[finite] - b[finite])
    # Beyond 2**53 two integers may be one float64.
    difference[(difference == 0) & (want[finite] != got[finite])] = 1.0
    worst = float(difference.max(initial=0.0))
    scale = float(np.abs(a[finite]).max(initial=0.0))
    if worst and not scale:
        return incomparable(f"up to {worst:.3g} instead of zeros")
    return OutputError(name=name, abs_max=worst, rel_max=worst / scale if worst else 0.0)


def top1(want: NDArray[Any], got: NDArray[Any]) -> tuple[int, int]:
    """Count the rows whose largest value stands where it should.

    Args:
        want: Expected, shape (..., K).
        got: Of the same shape.

    Returns:
        Rows that agree, rows. A class is right if its expected score is within 1e-6 of the best
        expected one: what is a tie there is a tie here.
    """
    a = want.reshape(-1, want.shape[-1]).astype(np.float64)
    b = got.reshape(a.shape).astype(np.float64)
    if not len(a) or np.isnan(b).any() or np.isnan(a).any():
        return 0, len(a)
    chosen = np.take_along_axis(a, b.argmax(axis=1)[:, None], axis=1)[:, 0]
    best = a.max(axis=1)
    scale = np.abs(a).max(axis=1)
    return int(np.sum(chosen >= best - TIE_REL * scale)), len(a)


def _has_classes(output: NDArray[Any]) -> bool:
    """Whether an output of one call looks like scores of classes: (K,) or (rows, K), K >= 2."""
    return output.dtype.kind in "fiu" and 1 <= output.ndim <= 2 and output.shape[-1] >= 2


def _text(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    if values.dtype == object:
        return np.array(
            [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values.flat],
            dtype=str,
        ).reshape(values.shape)
    return values


class Comparison:
    """The worst of many calls."""

    def __init__(self) -> None:
        self.errors: dict[str, OutputError] = {}
        self.calls = 0
        self._right = self._rows = 0

    def add(self, want: Mapping[str, NDArray[Any]], got: Mapping[str, NDArray[Any]]) -> None:
        """Compare the outputs of one call."""
        self.calls += 1
        for name, expected in want.items():
            error = compare(name, expected, got.get(name))
            before = self.errors.get(name)
            if before is None or _badness(error) > _badness(before):
                self.errors[name] = error
        classes = next((name for name, each in want.items() if _has_classes(each)), None)
        if classes is not None:
            found = got.get(classes)
            fits = found is not None and found.shape == want[classes].shape
            rows = math.prod(want[classes].shape[:-1])
            right, rows = top1(want[classes], found) if fits and found is not None else (0, rows)
            self._right += right
            self._rows += rows

    @property
    def top1(self) -> float | None:
        """Share of rows whose best class is right; None if no output has classes."""
        return self._right / self._rows if self._rows else None


def _badness(error: OutputError) -> float:
    return math.inf if error.rel_max is None else error.rel_max
