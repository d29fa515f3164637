"""Recordings: what is read, and what a damaged file says."""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from shoal.agent.errors import SourceError
from shoal.agent.source import read, replay


def write(path: Path, **changed: object) -> Path:
    """Write a recording of three windows, with some arrays replaced."""
    arrays = {
        "x__nct": np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4),
        "y__n": np.array([0, 1, 0]),
        "split__n": np.array([0, 1, 2], np.uint8),
    } | changed
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})  # type: ignore[arg-type]
    return path


def test_replays_in_order_for_ever(tmp_path: Path) -> None:
    """Windows come in order, and again from the start."""
    recording = read(write(tmp_path / "r.npz"))
    samples = list(islice(replay(recording), 7))
    assert [each.number for each in samples] == list(range(7))
    assert [each.row for each in samples] == [0, 1, 2, 0, 1, 2, 0]
    assert [each.label for each in samples[:3]] == [0, 1, 0]
    assert samples[1].x__1ct.shape == (1, 2, 4)


def test_an_array_of_the_recording_tags_its_windows(tmp_path: Path) -> None:
    """Numbers and texts; without being asked for there are no tags."""
    path = write(tmp_path / "r.npz", group=np.array([7, 7, 9]), place=np.array(["a", "", "grüß"]))
    assert [each.slice for each in islice(replay(read(path, slices="group")), 4)] == list("7797")
    assert read(path, slices="place").slice__n == ("a", "", "grüß")
    assert next(replay(read(path))).slice is None


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (None, "lacks"),
        (np.array([1.0, 2.0, 3.0]), "whole numbers or texts"),
        (np.array([1, 2]), "3 whole numbers"),
        (np.array(["a", "b", "x" * 41]), "more than 40 characters"),
    ],
)
def test_what_is_no_slice_is_refused(tmp_path: Path, tags: object, said: str) -> None:
    """The message says what the array should be."""
    with pytest.raises(SourceError, match=said):
        read(write(tmp_path / "r.npz", group=tags), slices="group")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"y__n": None}, r"lacks \['y__n'\]"),
        ({"x__nct": np.zeros((3, 2), np.float32)}, r"must be float32 \(N, C, T\)"),
        ({"x__nct": np.zeros((3, 2, 4))}, "float64"),
        ({"x__nct": np.full((3, 2, 4), np.nan, np.float32)}, "NaN"),
        ({"y__n": np.array([0, 1])}, "must have 3 rows"),
        ({"y__n": np.array([0, 1, -1])}, "negative label"),
        ({"split__n": np.array([0, 1, 3], np.uint8)}, "unknown split"),
        ({"y__n": np.array(["a", {}, None], object)}, "damaged"),
    ],
)
def test_refuses_what_is_no_recording(
    changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    """Each way to be wrong is named; pickled content is never loaded."""
    path = write(tmp_path / "r.npz", **changed)
    with pytest.raises(SourceError, match=said):
        read(path)


def test_refuses_damaged_bytes(tmp_path: Path) -> None:
    """A missing, cut or scrambled file is a clear error."""
    path = write(tmp_path / "r.npz")
    data = path.read_bytes()
    with pytest.raises(SourceError, match="cannot read"):
        read(tmp_path / "missing.npz")
    for wrong in (b"", b"text", data[: len(data) // 2]):
        path.write_bytes(wrong)
        with pytest.raises(SourceError, match="damaged"):
            read(path)
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with contextlib.suppress(SourceError):
            assert len(read(path)) == 3  # a flip in unused header bytes may go unnoticed
