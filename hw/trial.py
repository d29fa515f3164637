"""Time one backend on one model and compare its numbers, in this process.

    load -> compare with the vectors, in order -> time the calls -> figures

A model may do anything, so nobody calls this in a process that matters: see ``trial_child``.
Not here: what is right and which candidate wins (``choice``), inputs and expected outputs
(``vectors``).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .choice import OutputError
from .errors import HwError
from .vectors import GENERATED, Arrays, Comparison, Vectors, generate

CALLS_MAX: Final = 3000  # timed; the p99 of 3000 calls rests on 30 of them
BATCH_NS: Final = 20_000_000  # calls between two looks at the clock
ENERGY_NS_MIN: Final = 50_000_000  # RAPL counts in steps of 1 ms
REASON_CHARS_MAX: Final = 400  # engines write where in their source it was
POWERCAP: Final = Path("/sys/class/powercap")

Input = tuple[str, "np.dtype[Any]", tuple[int, ...]]


_DTYPES: Final[Mapping[int, str]] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "object",  # text
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
}  # by onnx.TensorProto.DataType


class TrialError(HwError):
    """A trial cannot be made of this model with these vectors; the text says why."""

    code = "hw.trial"


class Caller(Protocol):
    """A loaded model that can be called from Python."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once."""

    def time_ns(self, inputs: Mapping[str, NDArray[Any]], repeats: int) -> list[int]:
        """Run several times and return how long each call took, in ns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured of one loaded model."""

    p50_us: float
    p99_us: float
    calls: int
    """Calls that were timed."""
    energy_uj: float | None
    """Of one call, in µJ, whole package; None = not known."""
    compared: int
    """Vectors that were compared; less than there are if the time was up."""
    errors: tuple[OutputError, ...]
    top1: float | None


def ports(found: Sequence[tuple[str, int, tuple[int, ...]]]) -> list[Input]:
    """Return inputs as numpy has them, of an engine's (name, type number, shape) each.

    Raises:
        TrialError: numpy has no such type.
    """
    for name, number, _ in found:
        if number not in _DTYPES:
            raise TrialError(
                f"input {name} has a type that no values can be made up for (number {number})",
                hint="give it values: --golden golden.npz",
            )
    return [(name, np.dtype(_DTYPES[number]), shape) for name, number, shape in found]


def make_vectors(
    load: Callable[[], tuple[Caller, Sequence[Input]]],
    *,
    seconds: float,
    seed: int = 0,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> tuple[Vectors, str]:
    """Make vectors of what a reference answers to generated inputs.

    Integers are of the full range; a model that refuses those is given 0 and 1.

    Args:
        load: Loads the reference; says its inputs as (name, dtype, shape) each. Called for each
            kind of inputs: ONNX Runtime 1.32 fails for good once a size overflowed its arena.
        seconds: Stop after this time, but not before the first vector.
        seed: Of the inputs.
        clock_ns: For tests.

    Returns:
        The vectors, and in words what the inputs are.

    Raises:
        TrialError: The model runs on neither kind of inputs.
        MemoryError: It wants more memory than there is.
    """
    refusal: Exception | None = None
    for small in (False, True):
        caller, inputs = load()
        try:
            arrays = generate(inputs, count=GENERATED, seed=seed, small=small)
            outputs = _answers(caller, arrays, clock_ns() + int(seconds * 1e9), clock_ns)
        except Exception as exc:  # each engine has its own classes
            refusal = exc  # an integer of the full range may be a size, so memory too is no end
            continue
        count = len(next(iter(outputs.values()), ()))
        found = Vectors({name: each[:count] for name, each in arrays.items()}, outputs)
        return found, f"{count} generated inputs ({_describe(inputs, small)})"
    if is_memory(refusal):
        raise MemoryError(str(refusal)[:REASON_CHARS_MAX]) from refusal
    raise TrialError(
        f"the model does not run on generated inputs: {str(refusal)[:REASON_CHARS_MAX]}",
        hint="give it inputs it is made for: --golden golden.npz",
    ) from refusal


def _describe(inputs: Sequence[Input], small: bool) -> str:
    kinds = {dtype.kind for _, dtype, _ in inputs}
    facts = {
        "normal floats": "f" in kinds,
        "integers 0 and 1": small and kinds & set("iu"),
        "integers of the full range": not small and kinds & set("iu"),
        "short texts": "O" in kinds,
        "free axes 1": any(axis < 0 for _, _, shape in inputs for axis in shape),
    }
    return ", ".join(fact for fact, is_so in facts.items() if is_so) or "none to vary"


def is_memory(error: BaseException | None) -> bool:
    """Whether an engine's error means that memory is out; none has a class or code for it."""
    text = str(error).lower()
    words = ("bad_alloc", "failed to allocate", "out of memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def measure(
    caller: Caller,
    vectors: Vectors,
    *,
    compare_s: float,
    time_s: float,
    powercap: Path = POWERCAP,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Figures:
    """Compare a loaded model with vectors and time it.

    Args:
        caller: The model.
        vectors: Compared in order; then timed in turns, so that data-dependent times show.
        compare_s: Stop comparing after this time, but not before the first vector.
        time_s: Stop timing after this time, but not before the first call.
        powercap: Where the kernel's energy counters are.
        clock_ns: For tests.

    Returns:
        Latencies by nearest rank; with less than 100 calls the p99 is the slowest.
    """
    comparison = Comparison()
    until = clock_ns() + int(compare_s * 1e9)
    for index in range(vectors.count):
        if index and clock_ns() > until:
            break
        want = {name: each[index] for name, each in vectors.outputs.items()}
        comparison.add(want, caller.infer(vectors.call(index)))
    counter = EnergyCounter(powercap)
    before, start = counter.read(), clock_ns()
    took = _times(caller, vectors, comparison.calls, start + int(time_s * 1e9), clock_ns)
    spent_ns, used = clock_ns() - start, counter.since(before)
    took.sort()
    return Figures(
        p50_us=quantile(took, 0.5) / 1000,
        p99_us=quantile(took, 0.99) / 1000,
        calls=len(took),
        energy_uj=used / len(took) if used and spent_ns >= ENERGY_NS_MIN else None,
        compared=comparison.calls,
        errors=tuple(comparison.errors.values()),
        top1=comparison.top1,
    )


def quantile(ordered: Sequence[int], share: float) -> int:
    """Return the value that `share` of the values do not exceed, by nearest rank."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class EnergyCounter:
    """The processor packages' energy counters, where this user may read them."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._zones: list[tuple[Path, int]] = []
        # intel-rapl:0 is a package (AMD's too), intel-rapl:0:1 a part of it.
        for zone in sorted(powercap.glob("*-rapl:*")):
            if zone.name.count(":") == 1:
                with contextlib.suppress(OSError, ValueError):
                    size = int((zone / "max_energy_range_uj").read_text())
                    int((zone / "energy_uj").read_text())
                    self._zones.append((zone / "energy_uj", size))

    def read(self) -> list[int] | None:
        """Return the counters in µJ; None if there are none."""
        try:
            return [int(path.read_text()) for path, _ in self._zones] or None
        except (OSError, ValueError):
            return None

    def since(self, before: list[int] | None) -> int | None:
        """Return the µJ used since `before`; a counter that wrapped once is understood."""
        now = self.read()
        if before is None or now is None:
            return None
        used = zip(now, before, self._zones, strict=True)
        return sum((late - early) % (size + 1) for late, early, (_, size) in used)


def _answers(caller: Caller, inputs: Arrays, until: int, clock_ns: Callable[[], int]) -> Arrays:
    """Run the inputs one by one until the time is up; return the outputs, stacked."""
    vectors = Vectors(inputs, {})
    found: list[dict[str, NDArray[Any]]] = []
    for index in range(vectors.count):
        if index and clock_ns() > until:
            break
        answer = caller.infer(vectors.call(index))
        if found and any(each.shape != found[0][name].shape for name, each in answer.items()):
            break  # the shape depends on the values; what is alike so far is enough
        found.append(answer)
    return {name: np.stack([each[name] for each in found]) for name in found[0]}


def _times(
    caller: Caller, vectors: Vectors, count: int, until: int, clock_ns: Callable[[], int]
) -> list[int]:
    took = caller.time_ns(vectors.call(0), 1)  # comparing has warmed it up
    repeats, index = max(1, min(100, BATCH_NS // max(1, took[0]))), 1
    while len(took) < CALLS_MAX and clock_ns() < until:
        took += caller.time_ns(vectors.call(index % count), min(repeats, CALLS_MAX - len(took)))
        index += 1
    return took
