"""Vectors, comparing with them, and timing, with callers whose answers and times are known."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.hw.trial import (
    CALLS_MAX,
    EnergyCounter,
    TrialError,
    make_vectors,
    measure,
    ports,
    quantile,
)
from shoal.hw.vectors import (
    Comparison,
    Vectors,
    VectorsError,
    compare,
    generate,
    read_vectors,
    top1,
    write_vectors,
)

Array = NDArray[Any]


def f32(*values: float) -> Array:
    """Return an array of float32."""
    return np.array(values, np.float32)


def npz(**arrays: Any) -> io.BytesIO:
    """Return a .npz file; a name's first underscore stands for the dot."""
    file = io.BytesIO()
    np.savez(file, **{name.replace("_", ".", 1): each for name, each in arrays.items()})
    file.seek(0)
    return file


class Clock:
    """A clock that a fake model moves on, in ns."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        """Return the time."""
        return self.now


class Fake:
    """A model: y = answer(x), each call takes `took_ns`."""

    def __init__(self, answer: Callable[[Array], Array], clock: Clock, took_ns: int = 1000) -> None:
        self.answer, self.clock, self.took_ns = answer, clock, took_ns
        self.calls = 0

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        self.calls += 1
        self.clock.now += self.took_ns
        return {"y": self.answer(inputs["x"])}

    def time_ns(self, inputs: Mapping[str, Array], repeats: int) -> list[int]:
        """Run several times; every tenth call takes ten times as long."""
        took = []
        for _ in range(repeats):
            start = self.clock.now
            self.infer(inputs)
            if self.calls % 10 == 0:
                self.clock.now += 9 * self.took_ns
            took.append(self.clock.now - start)
        return took


# --- vectors ---------------------------------------------------------------------------------


def test_vectors_come_back_as_they_were_written() -> None:
    """Scalars, text and order survive the file: children hand vectors on by it."""
    texts = np.array([["a", "é" * 9], ["", "z"]], dtype=object)
    vectors = Vectors({"x": np.arange(4.0).reshape(2, 2), "n": np.array([3, 4])}, {"y": texts})
    file = io.BytesIO()
    write_vectors(file, vectors)
    file.seek(0)
    found = read_vectors(file)
    assert found.count == 2
    assert found.outputs["y"].tolist() == texts.tolist()
    assert found.call(1)["n"].shape == ()  # an array still, not a number
    assert found.call(1)["x"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    "file",
    [
        io.BytesIO(b""),
        io.BytesIO(b"PK\x03\x04 garbage"),
        io.BytesIO(b"\x93NUMPY garbage"),
        npz(in_x=np.array([object()], dtype=object), out_y=f32(1)),
        npz(in_x=f32(1)),
        npz(x=f32(1), out_y=f32(1)),
        npz(in_x=f32(1, 2), out_y=f32(1)),
        npz(in_x=np.float32(1), out_y=f32(1, 2)),
        npz(in_x=np.zeros((0, 3)), out_y=np.zeros((0, 1))),
    ],
    ids=["empty", "zip", "npy", "pickle", "no out", "name", "axes", "scalar", "none"],
)
def test_a_file_that_is_no_vectors_is_refused(file: io.BytesIO) -> None:
    """A golden file comes from outside; above all it is never unpickled."""
    file.seek(0)
    with pytest.raises(VectorsError):
        read_vectors(file)


def test_a_broken_member_of_a_zip_is_refused() -> None:
    """Bits rot in the middle, too."""
    data = bytearray(npz(in_x=np.arange(99.0), out_y=np.arange(99.0)).getvalue())
    data[300] ^= 255
    with pytest.raises(VectorsError):
        read_vectors(io.BytesIO(bytes(data)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.x.npy", b"\x93NUMPY\x01\x00\x05\x00abcde")
    file.seek(0)
    with pytest.raises(VectorsError):
        read_vectors(file)


def test_generated_inputs_depend_on_the_seed_alone() -> None:
    """A trial that is made again compares the same."""
    inputs = [("x", np.dtype("float32"), (-1, 3)), ("t", np.dtype(object), (2,))]
    one, two, other = (generate(inputs, seed=seed) for seed in (1, 1, 2))
    assert one["x"].tolist() == two["x"].tolist() != other["x"].tolist()
    assert one["t"].tolist() == two["t"].tolist() != other["t"].tolist()
    assert one["x"].shape == (16, 1, 3)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "int64", "uint64"])
def test_generated_integers_are_of_the_full_range_or_small(name: str) -> None:
    """Quantised inputs take the full range, indices take none of it."""
    inputs = [("x", np.dtype(name), (500,))]
    full, small = (generate(inputs, small=small)["x"] for small in (False, True))
    limits = np.iinfo(name)
    assert full.dtype == small.dtype == name
    margin = (int(limits.max) - int(limits.min)) // 20
    assert int(full.max()) >= int(limits.max) - margin
    assert int(full.min()) <= int(limits.min) + margin
    assert set(small.ravel().tolist()) == {0, 1}


# --- comparing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("want", "got", "expected"),
    [
        (f32(1, -4), f32(1, -4), (0.0, 0.0)),
        (f32(1, -4), f32(1.5, -4), (0.5, 0.125)),
        (f32(0, 0), f32(0, 0), (0.0, 0.0)),
        (f32(np.nan, np.inf, 2), f32(np.nan, np.inf, 1), (1.0, 0.5)),
        (np.array([2**60]), np.array([2**60 + 1]), (1.0, 2.0**-60)),
        (np.array([250], np.uint8), np.array([5], np.uint8), (245.0, 0.98)),
        (np.array([True, False]), np.array([True, True]), (1.0, 1.0)),
        (np.array(["ab"]), np.array([b"ab"]), (0.0, 0.0)),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), (0.0, 0.0)),
    ],
)
def test_the_error_is_the_largest_difference(
    want: Array, got: Array, expected: tuple[float, float]
) -> None:
    """And relative to the output's largest magnitude, so that a value near 0 is no catastrophe."""
    error = compare("y", want, got)
    assert (error.abs_max, error.rel_max) == pytest.approx(expected, rel=1e-12)
    assert not error.note


@pytest.mark.parametrize(
    ("want", "got"),
    [
        (f32(1), None),
        (f32(1), f32(1, 1)),
        (f32(1), f32(np.nan)),
        (f32(np.nan), f32(1)),
        (f32(np.inf), f32(-np.inf)),
        (f32(np.inf), f32(np.nan)),
        (f32(0, 0), f32(0, 1e-9)),
        (np.array(["a"], dtype=object), np.array(["b"], dtype=object)),
        (np.array(["1"]), f32(1)),
    ],
)
def test_what_cannot_be_compared_has_no_number_but_a_note(want: Array, got: Array | None) -> None:
    """A NaN must never compare as small."""
    error = compare("y", want, got)
    assert error.rel_max is None and error.abs_max is None and error.note


def test_top1_counts_rows_and_takes_a_tie_for_right() -> None:
    """Two classes that the reference holds equal are both right."""
    want = np.array([[1, 5, 5], [9, 1, 0], [0, 0, 3]], np.float32)
    got = np.array([[0, 4, 6], [1, 2, 0], [0, 0, 3]], np.float32)
    assert top1(want, got) == (2, 3)
    assert top1(want, np.full_like(want, np.nan)) == (0, 3)


def test_a_comparison_keeps_the_worst_of_each_output() -> None:
    """One bad vector among many is a bad backend."""
    found = Comparison()
    for got in (f32(1, 2), f32(1, 2.5), f32(1, 2.1)):
        found.add({"y": f32(1, 2), "z": f32(3)}, {"y": got, "z": f32(3)})
    assert [each.rel_max for each in found.errors.values()] == [0.25, 0.0]
    assert found.top1 == 1.0
    found.add({"y": f32(1, 2), "z": f32(3)}, {"y": f32(2, 1), "z": f32(np.nan)})
    assert [each.rel_max for each in found.errors.values()] == [0.5, None]
    assert found.top1 == 0.75
    found.add({"y": f32(1, 2), "z": f32(3)}, {"z": f32(3)})
    assert found.errors["y"].rel_max is None
    assert found.top1 == 0.6


# --- making vectors --------------------------------------------------------------------------

X = [("x", np.dtype(np.int64), (2,))]


def test_reference_vectors_are_what_the_reference_answers() -> None:
    """They are the golden vectors where there are none."""
    clock = Clock()
    vectors, text = make_vectors(
        lambda: (Fake(lambda x: x * 2, clock), X), seconds=1, clock_ns=clock
    )
    assert vectors.count == 16
    assert vectors.outputs["y"].tolist() == (vectors.inputs["x"] * 2).tolist()
    assert "full range" in text


def test_a_model_that_takes_no_large_integers_is_given_small_ones_in_a_fresh_session() -> None:
    """Indices out of range are refused; and a session that failed may be broken for good."""
    clock, loaded = Clock(), []

    def answer(x: Array) -> Array:
        if np.abs(x).max() > 10:
            raise RuntimeError("index out of range")
        return x

    def load() -> tuple[Fake, Any]:
        loaded.append(Fake(answer, clock))
        return loaded[-1], X

    vectors, text = make_vectors(load, seconds=1, clock_ns=clock)
    assert set(vectors.inputs["x"].ravel().tolist()) == {0, 1}
    assert "0 and 1" in text
    assert len(loaded) == 2


def test_a_model_that_runs_on_nothing_is_refused_with_what_to_do() -> None:
    """Without an answer there is nothing to compare the others with."""

    def answer(x: Array) -> Array:
        raise RuntimeError("bad kernel")

    with pytest.raises(TrialError, match="bad kernel") as caught:
        make_vectors(lambda: (Fake(answer, Clock()), X), seconds=1)
    assert "--golden" in caught.value.hint


def test_a_model_that_wants_too_much_memory_says_so() -> None:
    """An engine has no class for it, only words; the parent's table needs the fact."""

    def answer(x: Array) -> Array:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 274877906944")

    with pytest.raises(MemoryError):
        make_vectors(lambda: (Fake(answer, Clock()), X), seconds=1)


def test_slow_references_give_fewer_vectors_but_one() -> None:
    """The clock rules; an answer there must be."""
    clock = Clock()
    fast, _ = make_vectors(
        lambda: (Fake(lambda x: x, clock, 300_000_000), X), seconds=1, clock_ns=clock
    )
    assert fast.count == 4
    slow, _ = make_vectors(lambda: (Fake(lambda x: x, clock, 10**10), X), seconds=1, clock_ns=clock)
    assert slow.count == 1
    assert len(slow.inputs["x"]) == 1


def test_outputs_whose_shape_depends_on_the_values_end_the_vectors() -> None:
    """An array has one shape; what is alike so far is compared."""
    clock = Clock()

    def answer(x: Array) -> Array:
        return np.zeros(1 if fake.calls < 4 else 2)

    fake = Fake(answer, clock)
    vectors, _ = make_vectors(lambda: (fake, X), seconds=1, clock_ns=clock)
    assert vectors.count == 3


def test_a_type_nothing_can_be_made_up_for_is_refused() -> None:
    """E.g. bfloat16, which numpy does not have."""
    assert ports([("x", 1, (-1, 4))]) == [("x", np.dtype("float32"), (-1, 4))]
    with pytest.raises(TrialError, match="number 16"):
        ports([("x", 16, (1,))])


# --- measuring -------------------------------------------------------------------------------


def vectors_of(count: int) -> Vectors:
    """Return vectors of y = x."""
    x__vd = np.arange(1.0, count * 2 + 1).reshape(count, 2)
    return Vectors({"x": x__vd}, {"y": x__vd.copy()})


def test_a_model_is_compared_and_timed(tmp_path: Path) -> None:
    """The whole of it, on a clock that only the model moves."""
    clock = Clock()
    fake = Fake(lambda x: x * 1.5, clock, 100_000)
    found = measure(fake, vectors_of(5), compare_s=1, time_s=0.5, powercap=tmp_path, clock_ns=clock)
    assert found.compared == 5
    assert found.errors[0].rel_max == 0.5
    assert found.top1 == 1.0
    assert (found.p50_us, found.p99_us) == (100.0, 1000.0)
    assert 0.4e9 < found.calls * 190_000 < 0.6e9
    assert found.energy_uj is None


def test_timing_ends_after_the_most_calls(tmp_path: Path) -> None:
    """More calls would not make the p99 better."""
    clock = Clock()
    found = measure(
        Fake(lambda x: x, clock), vectors_of(1), compare_s=1, time_s=99, powercap=tmp_path,
        clock_ns=clock,
    )  # fmt: skip
    assert found.calls == CALLS_MAX


def test_a_slow_model_is_compared_once_and_timed_once(tmp_path: Path) -> None:
    """Whatever it takes; the parent's clock is what stops it."""
    clock = Clock()
    found = measure(
        Fake(lambda x: x, clock, 10**10), vectors_of(9), compare_s=1, time_s=1,
        powercap=tmp_path, clock_ns=clock,
    )  # fmt: skip
    assert (found.compared, found.calls) == (1, 1)


def test_the_quantile_is_the_nearest_rank() -> None:
    """As in the textbook: of 100 values the p99 is the 99th."""
    values = list(range(1, 101))
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert quantile([7], 0.99) == 7


def powercap(folder: Path, *uj: int, size: int = 999) -> Path:
    """Make the kernel's energy counters: packages, and a part that is not to be added."""
    for index, value in enumerate(uj):
        for zone in (f"intel-rapl:{index}", f"intel-rapl:{index}:0"):
            (folder / zone).mkdir(parents=True, exist_ok=True)
            (folder / zone / "energy_uj").write_text(f"{value}\n")
            (folder / zone / "max_energy_range_uj").write_text(f"{size}\n")
    return folder


def test_energy_is_added_over_packages_and_may_wrap(tmp_path: Path) -> None:
    """A counter of 262 J wraps every few seconds of a busy server."""
    counter = EnergyCounter(powercap(tmp_path, 100, 990))
    before = counter.read()
    powercap(tmp_path, 150, 5)
    assert counter.since(before) == 50 + 15


def test_energy_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    """It needs root on most machines, and is not there on most boards."""
    assert EnergyCounter(tmp_path / "nothing").read() is None
    (powercap(tmp_path, 1) / "intel-rapl:0" / "energy_uj").write_text("gone")
    assert EnergyCounter(tmp_path).read() is None
    counter = EnergyCounter(powercap(tmp_path, 1))
    before = counter.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert counter.since(before) is None


def test_energy_is_told_for_one_call(tmp_path: Path) -> None:
    """What a battery knows is energy per inference."""
    clock = Clock()
    powercap(tmp_path, 0, size=10**12)

    def answer(x: Array) -> Array:
        powercap(tmp_path, clock.now // 1000, size=10**12)  # 1 W
        return x

    fake = Fake(answer, clock, 10_000_000)
    found = measure(fake, vectors_of(1), compare_s=1, time_s=0.5, powercap=tmp_path, clock_ns=clock)
    assert found.energy_uj == pytest.approx(19_000, rel=0.4)  # 10 ms, each tenth 100 ms, at 1 W
