"""Random features: vectors, the stated error, and that no row is lost or counted twice.

Vectors (pinned), properties against NumPy, faults (rows and arguments that cannot be taken).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext import _projection
from shoal.ext.projection import RandomFeatures

Floats = NDArray[np.float32]

# Sums of two rows by NumPy in float64 with the exact cosine; never edited.
GOLDEN_ROWS = np.array([[0.5, -1.25, 3.0], [100.0, 0.0, -2.5]], np.float32)
GOLDEN = [-1.6781933803, -1.8137348252, -1.9110101197, -1.9674741165, -1.981818724]


@pytest.fixture(params=_projection.variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant that this machine can run, in turn."""
    _projection.use_variant(request.param)
    yield request.param
    _projection.use_variant(_projection.variants()[-1])


def drawn(
    seed: int, features: int, columns: int, *, weight: float = 0.3
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return weights, phases, mean, scale."""
    rng = np.random.default_rng(seed)
    return (
        np.clip(rng.normal(0, weight, (features, columns)), -16, 16).astype(np.float32),
        rng.uniform(0, 2 * np.pi, features).astype(np.float32),
        rng.normal(0, 5, columns).astype(np.float32),
        rng.uniform(0.01, 3, columns).astype(np.float32),
    )


def exact(parts: tuple[Floats, ...], x__nd: Floats) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (features, stated error) of each row, shape (N, F), in float64."""
    weights, phases, mean, scale = (each.astype(np.float64) for each in parts)
    z = np.clip((x__nd.astype(np.float64) - mean) / scale, -32, 32)
    error = 2e-7 + 2.0**-23 * (len(mean) + 4) * (np.abs(z) @ np.abs(weights.T) + phases)
    return np.cos(z @ weights.T + phases), error


def one_by_one(parts: tuple[Floats, ...], x__nd: Floats) -> NDArray[np.float64]:
    """Return the features of each row, shape (N, F)."""
    kernel = RandomFeatures(*parts)
    found = []
    for row in x__nd:
        kernel.reset()
        kernel.add(row[None])
        found.append(kernel.read()[0])
    return np.array(found)


def test_golden(variant: str) -> None:
    """Sums of an old device must be comparable with those of a new one."""
    weights = np.linspace(-1.5, 2, 15, dtype=np.float32).reshape(5, 3)
    mean, scale = np.array([1, 0, -1], np.float32), np.array([2, 0.5, 4], np.float32)
    kernel = RandomFeatures(weights, np.linspace(0, 6, 5, dtype=np.float32), mean, scale)
    kernel.add(GOLDEN_ROWS)
    sums, rows = kernel.read()
    assert rows == 2 and sums == pytest.approx(GOLDEN, abs=2e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 100]),
    st.sampled_from([1, 2, 3, 7, 20, 129]),
    st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    st.sampled_from([0.1, 1.0, 100.0]),
)
def test_within_the_stated_error(
    seed: int, features: int, columns: int, weight: float, spread: float
) -> None:
    """Any size, small and clipped weights, values inside and far outside: error as documented."""
    parts = drawn(seed, features, columns, weight=weight)
    rng = np.random.default_rng(seed)
    x = (parts[2] + rng.normal(0, spread, (8, columns))).astype(np.float32)
    wanted, error = exact(parts, x)
    found = []
    for name in _projection.variants():
        _projection.use_variant(name)
        found.append(one_by_one(parts, x))
        assert (np.abs(found[-1] - wanted) <= error).all(), name
    # No fused multiply-add on x86-64, the same order of sums: the same bits.
    assert all((each == found[0]).all() for each in found)


def test_the_cosine_is_within_1e_6(variant: str) -> None:
    """No column takes part: what is left is range reduction and polynomial, over two turns."""
    phases = np.linspace(-2 * np.pi, 2 * np.pi, 4096).astype(np.float32)
    nothing = np.zeros(1, np.float32)
    kernel = RandomFeatures(np.zeros((4096, 1), np.float32), phases, nothing, nothing + 1)
    kernel.add(np.zeros((1, 1), np.float32))
    error = np.abs(kernel.read()[0] - np.cos(phases.astype(np.float64)))
    assert error.max() < 1e-6


def test_usual_rows_are_much_closer(variant: str) -> None:
    """As the docstring says: 20 standard normal columns, median bandwidth, F = 64."""
    parts = drawn(5, 64, 20, weight=1 / np.sqrt(40))
    x = np.random.default_rng(6).normal(parts[2], parts[3], (300, 20)).astype(np.float32)
    assert np.abs(one_by_one(parts, x) - exact(parts, x)[0]).max() < 1e-6


def test_rows_add_up(variant: str) -> None:
    """At once, in pieces, one by one: the same sums, to the bit; none of no rows."""
    parts = drawn(1, 33, 5)
    x = np.random.default_rng(2).normal(0, 5, (57, 5)).astype(np.float32)
    whole, pieces = RandomFeatures(*parts), RandomFeatures(*parts)
    whole.add(x)
    for piece in (x[:1], x[1:1], x[1:40], x[40:]):
        pieces.add(np.ascontiguousarray(piece))
    assert whole.read()[1] == pieces.read()[1] == 57
    assert (whole.read()[0] == pieces.read()[0]).all()
    assert whole.read()[0] == pytest.approx(exact(parts, x)[0].sum(0), abs=1e-4)
    assert (whole.features, whole.columns) == (33, 5)
    whole.reset()
    sums, rows = whole.read()
    assert rows == whole.skipped == 0 and not sums.any()


@pytest.mark.parametrize("stride", [1, 2, 7, 10, 11, 2**63 - 1])
def test_windows_are_rows_of_samples(stride: int) -> None:
    """Every stride-th sample of all channels is a row; the first is always one."""
    parts = drawn(3, 20, 3)
    x = np.random.default_rng(4).normal(0, 5, (6, 3, 10)).astype(np.float32)
    x[4, 1, 0] = np.nan
    windows, rows = RandomFeatures(*parts), RandomFeatures(*parts)
    windows.add_channels(x, stride=stride)
    rows.add(np.ascontiguousarray(x[:, :, ::stride].transpose(0, 2, 1).reshape(-1, 3)))
    assert windows.read()[1] == rows.read()[1] == 6 * len(range(0, 10, stride)) - 1
    assert windows.skipped == rows.skipped == 1
    assert (windows.read()[0] == rows.read()[0]).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_rows_that_are_not_finite_are_skipped(bad: float, at: int, variant: str) -> None:
    """They are counted, and change no sum."""
    kernel = RandomFeatures(*drawn(1, 40, 3))
    x = np.random.default_rng(0).normal(0, 1, (5, 3)).astype(np.float32)
    kernel.add(x)
    before = kernel.read()[0]
    x[1:4, at] = bad
    kernel.add(np.ascontiguousarray(x[1:4]))
    assert kernel.read()[1] == 5 and kernel.skipped == 3
    assert (kernel.read()[0] == before).all()


@pytest.mark.parametrize("value", [3e38, -3e38, 1e-45, -0.0, 1e10])
def test_extreme_values_count_as_32_scales(value: float, variant: str) -> None:
    """A broken sensor moves its feature so far and no further, and makes no NaN."""
    parts = drawn(2, 8, 1, weight=1.0)
    x = np.array([[value]], np.float32)
    wanted, error = exact(parts, x)
    assert (np.abs(one_by_one(parts, x) - wanted) <= error).all()


def test_a_gaussian_kernel_is_what_they_are_features_of() -> None:
    """2/F times the product of two rows' features is exp(-distance^2 / 2), up to 5 sigma."""
    rng = np.random.default_rng(9)
    count, columns = 4096, 3
    parts = (
        rng.standard_normal((count, columns)).astype(np.float32),
        rng.uniform(0, 2 * np.pi, count).astype(np.float32),
        np.zeros(columns, np.float32),
        np.ones(columns, np.float32),
    )
    x = rng.normal(0, 0.7, (12, columns)).astype(np.float32)
    features = one_by_one(parts, x)
    distance = np.square(x[:, None] - x[None]).sum(2)
    assert 2 / count * features @ features.T == pytest.approx(np.exp(-distance / 2), abs=0.08)


def test_threads_lose_nothing() -> None:
    """Four threads add to one projection: all rows are in it."""
    kernel = RandomFeatures(*drawn(1, 33, 5))
    x = np.random.default_rng(2).normal(0, 1, (500, 5)).astype(np.float32)

    def work() -> None:
        for _ in range(20):
            kernel.add(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    sums, rows = kernel.read()
    assert rows == 4 * 20 * 500
    kernel.reset()
    kernel.add(x)
    assert sums == pytest.approx(80 * kernel.read()[0], rel=1e-9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: np.zeros((2, 3))}, "weights__fd must be a float32"),
        ({0: np.zeros(3, np.float32)}, "of 2 axes"),
        ({0: np.zeros((0, 3), np.float32)}, "weights__fd must be 1 to"),
        ({0: np.zeros((2, 1025), np.float32)}, "weights__fd must be 1 to"),
        ({0: np.zeros((4097, 3), np.float32)}, "weights__fd must be 1 to"),
        ({0: np.full((2, 3), 16.5, np.float32)}, "weight is above"),
        ({0: np.full((2, 3), np.nan, np.float32)}, "finite"),
        ({1: np.zeros(3, np.float32)}, "do not fit"),
        ({1: np.full(2, 7, np.float32)}, "phase above"),
        ({1: None}, "phases__f must be"),
        ({2: np.zeros(2, np.float32)}, "do not fit"),
        ({2: np.full(3, np.inf, np.float32)}, "finite"),
        ({3: np.zeros(3, np.float32)}, "scale__d must be above"),
        ({3: -np.ones(3, np.float32)}, "scale__d must be above"),
    ],
)
def test_what_is_no_projection_is_refused(change: dict[int, Any], says: str) -> None:
    """Each argument is checked before it is copied."""
    parts: list[Any] = [*drawn(0, 2, 3)]
    for i, value in change.items():
        parts[i] = value
    with pytest.raises(ValueError, match=says):
        RandomFeatures(*parts)


def test_what_are_no_rows_is_refused() -> None:
    """Another width, dtype or layout: an error, and nothing is added."""
    kernel: Any = RandomFeatures(*drawn(0, 2, 3))
    good = np.zeros((4, 3), np.float32)
    bad = (good[:, :2].copy(), good.astype(np.float64), good[::2], good.T.copy(), good[0])
    for rows in bad:
        with pytest.raises(ValueError, match=r"columns|contiguous|dtype|dimensions"):
            kernel.add(rows)
    for nothing in (None, [[1.0, 2.0, 3.0]], 5):
        with pytest.raises(TypeError):
            kernel.add(nothing)
    window = np.zeros((1, 3, 4), np.float32)
    with pytest.raises(ValueError, match="channels"):
        kernel.add_channels(window[:, :2].copy(), stride=1)
    with pytest.raises(ValueError, match="stride"):
        kernel.add_channels(window, stride=0)
    with pytest.raises(ValueError, match="sample"):
        kernel.add_channels(window[:, :, :0].copy(), stride=1)
    with pytest.raises(ValueError, match="sums"):
        kernel.read_into(np.zeros(3))
    with pytest.raises(RuntimeError, match="once"):
        kernel.__init__(*drawn(0, 2, 3))
    assert kernel.read()[1] == kernel.skipped == 0


def test_without_init_nothing_is_added() -> None:
    """A projection that was never made is no projection of no columns."""
    empty = RandomFeatures.__new__(RandomFeatures)
    with pytest.raises(ValueError, match="columns"):
        empty.add(np.zeros((3, 0), np.float32))
    with pytest.raises(ValueError, match="channels"):
        empty.add_channels(np.zeros((3, 0, 2), np.float32), stride=1)
    empty.reset()
    assert empty.read()[1] == 0


def test_an_unknown_variant_is_refused() -> None:
    """The message names those there are."""
    with pytest.raises(ValueError, match="generic"):
        _projection.use_variant("sse9")
