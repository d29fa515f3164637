"""Smartwatch recordings of ten people doing seven shoulder exercises: the demo's real data.

    load() -> Watch -> windows(watch, subject) -> windows with labels, splits and an order

Every recording is split by time: its first part trains, the next validates, the last tests. A
window never crosses a border, so no sample of a test window was ever in a training window.
Sources and licence: PROVENANCE.md.

R recordings, T samples of one, N windows, C = D = 6 channels.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .. import ShoalError

CHANNELS: Final = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")
EXERCISES: Final = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
RATE_HZ: Final = 50.0
SHA256: Final = "f608cc9373bf3d0c5f32863e8d60878093ffaf439b5796091a633f80d26beae3"
TRAIN, VALIDATION, TEST = 0, 1, 2
SHARES: Final = (0.6, 0.15)  # of each recording's time: training, validation; the rest is test
SIZE: Final = 100  # samples per window: two seconds, one repetition of the quicker exercises
STRIDE: Final = 40
BOUT: Final = 5  # windows of one exercise in a row in the streaming order


class DataError(ShoalError):
    """The recordings in this installation are damaged; nothing was loaded."""

    code = "examples.data"


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One person doing one exercise with one arm."""

    subject: int
    exercise: int
    """Index into EXERCISES."""
    side: int
    """0 or 1: which arm."""
    samples__td: NDArray[np.float32]
    """(T, 6), acceleration in g, angular rate in rad/s."""


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """All recordings."""

    recordings: tuple[Recording, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The windows of one person."""

    x__nct: NDArray[np.float32]
    """(N, 6, SIZE), raw units, C-contiguous."""
    y__n: NDArray[np.int64]
    """Exercise."""
    split__n: NDArray[np.uint8]
    """0 train, 1 validation, 2 test."""
    order: NDArray[np.int64]
    """(N,), a permutation: streaming order, short bouts of exercises in turn."""


def load() -> Watch:
    """Return the recordings that are installed with this package.

    Raises:
        DataError: The file is missing or is not the one that was released.
    """
    try:
        data = (files(__package__) / "watch.npz").read_bytes()
    except OSError as exc:
        raise DataError(f"the recordings are missing: {exc}", hint="reinstall shoal") from exc
    return parse(data)


def parse(data: bytes) -> Watch:
    """Return the recordings in the bytes of watch.npz.

    Raises:
        DataError: The bytes are not those that were released.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise DataError(
            f"watch.npz is damaged: SHA-256 {found[:12]}…, expected {SHA256[:12]}…",
            hint="reinstall shoal; the file is examples/watch.npz in a checkout",
        )
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = dict(archive)
    except (ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise DataError(f"watch.npz cannot be read: {exc}") from exc
    samples = (arrays["samples__nd"] * arrays["scale__d"]).astype(np.float32)
    ends = arrays["length__r"].cumsum()
    pieces = np.split(samples, ends[:-1])
    facts = (arrays["subject__r"], arrays["exercise__r"], arrays["side__r"])
    return Watch(
        tuple(
            Recording(int(subject), int(exercise), int(side), piece)
            for subject, exercise, side, piece in zip(*facts, pieces, strict=True)
        )
    )


def windows(
    watch: Watch, subject: int, *, size: int = SIZE, stride: int = STRIDE, seed: int = 0
) -> Windows:
    """Cut the recordings of one person into windows.

    Args:
        watch: The recordings.
        subject: Person, 1 to 10.
        size: Samples per window, at least 1.
        stride: Samples from one window to the next, at least 1. Windows of one split may share
            samples; windows of different splits never do.
        seed: Draws the streaming order.

    Raises:
        ValueError: No such person, a size or stride below 1, or no split of a recording is as
            long as ``size``.
    """
    if size < 1 or stride < 1:
        raise ValueError(f"size and stride must be at least 1, not {size} and {stride}")
    mine = [each for each in watch.recordings if each.subject == subject]
    if not mine:
        raise ValueError(f"there is no person {subject} in the recordings")
    found: list[NDArray[np.float32]] = []
    labels: list[int] = []
    splits: list[int] = []
    bouts: list[list[int]] = []
    for recording in mine:
        length = len(recording.samples__td)
        first = int(length * SHARES[0])
        borders = (0, first, first + int(length * SHARES[1]), length)
        rows: list[int] = []
        for split in (TRAIN, VALIDATION, TEST):
            for start in range(borders[split], borders[split + 1] - size + 1, stride):
                rows.append(len(found))
                found.append(recording.samples__td[start : start + size].T)
                labels.append(recording.exercise)
                splits.append(split)
        bouts += [rows[at : at + BOUT] for at in range(0, len(rows), BOUT)]
    if not found:
        raise ValueError(f"no split of a recording of person {subject} has {size} samples")
    turn = np.random.default_rng((seed, subject)).permutation(len(bouts))
    return Windows(
        x__nct=np.ascontiguousarray(np.stack(found)),
        y__n=np.array(labels, np.int64),
        split__n=np.array(splits, np.uint8),
        order=np.array([row for at in turn for row in bouts[at]], np.int64),
    )
