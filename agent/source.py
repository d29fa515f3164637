"""Where windows come from. In this release: a recording that is replayed at a steady rate.

A recording is an ``.npz`` of ``x__nct`` float32 (N windows, C channels, T samples), ``y__n``
int64 and ``split__n`` uint8 (0 train, 1 validation, 2 test), in streaming order. Labels are what
a person would enter later: the application hands them to the monitor after a delay, and the
trainer sees a window only when its label has arrived. Another array of N whole numbers or texts
may tag each window with its slice, e.g. the group of people it is from.

N windows, C channels, T samples.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..proto.records import SLICE_CHARS_MAX
from .errors import SourceError

FILE_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A checked recording in memory."""

    x__nct: NDArray[np.float32]
    y__n: NDArray[np.int64]
    split__n: NDArray[np.uint8]
    slice__n: tuple[str, ...] | None = None
    """Tag of each window; None: none has."""

    def __len__(self) -> int:
        return len(self.y__n)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One window as the source delivers it."""

    number: int
    """Counts from 0 over all passes."""
    x__1ct: NDArray[np.float32]
    label: int
    split: int
    row: int
    """Row in the recording."""
    slice: str | None = None
    """Its tag."""


def read(path: Path, *, slices: str = "") -> Recording:
    """Return the recording in a file.

    Args:
        path: The file.
        slices: Name of the array of tags; "" = windows have none.

    Raises:
        SourceError: Missing, damaged, or not what the module head says; nothing was used.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise SourceError(f"recording {path} is larger than {FILE_BYTES_MAX} bytes")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = {"x__nct", "y__n", "split__n", *([slices] if slices else [])}
            missing -= set(archive.files)
            if missing:
                raise SourceError(
                    f"recording {path} holds {sorted(archive.files)}, it lacks {sorted(missing)}"
                )
            x, y, split = archive["x__nct"], archive["y__n"], archive["split__n"]
            tags = archive[slices] if slices else None
    except OSError as exc:
        raise SourceError(
            f"cannot read the recording {path}: {exc.strerror or exc}", hint="check [source] path"
        ) from exc
    except (ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise SourceError(
            f"recording {path} is damaged: {exc!s:.200}",
            hint="copy it again from where it was made; shoal changed nothing",
        ) from exc
    if x.ndim != 3 or x.dtype != np.float32 or not len(x):
        raise SourceError(
            f"recording {path}: x__nct must be float32 (N, C, T), not {x.dtype} {x.shape}"
        )
    if (
        y.shape != x.shape[:1]
        or y.dtype != np.int64
        or split.shape != y.shape
        or split.dtype != np.uint8
    ):
        raise SourceError(
            f"recording {path}: y__n int64 and split__n uint8 must have {len(x)} rows"
        )
    if y.min() < 0 or split.max() > 2 or not np.isfinite(x).all():
        raise SourceError(f"recording {path} holds a negative label, an unknown split or NaN")
    return Recording(
        np.ascontiguousarray(x), y, split, None if tags is None else _tags(tags, path, x)
    )


def _tags(tags: NDArray[Any], path: Path, x: NDArray[np.float32]) -> tuple[str, ...]:
    if tags.shape != x.shape[:1] or tags.dtype.kind not in "iuU":
        raise SourceError(
            f"recording {path}: slices must be {len(x)} whole numbers or texts, "
            f"not {tags.dtype} {tags.shape}"
        )
    found = tuple(str(each) for each in tags)
    if max(len(each) for each in found) > SLICE_CHARS_MAX:
        raise SourceError(f"recording {path}: a slice has more than {SLICE_CHARS_MAX} characters")
    return found


def replay(recording: Recording) -> Iterator[Sample]:
    """Yield the windows of a recording in order, for ever."""
    number = 0
    while True:
        for row in range(len(recording)):
            yield Sample(
                number=number,
                x__1ct=recording.x__nct[row : row + 1],
                label=int(recording.y__n[row]),
                split=int(recording.split__n[row]),
                row=row,
                slice=recording.slice__n[row] if recording.slice__n else None,
            )
            number += 1
