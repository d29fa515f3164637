"""Turn stored windows and labels of the database into rows of the lake.

A window whose sketch cannot be read, or was binned between other edges than those of its model's
profile, has a row in ``windows`` that says so (``refused``) and none in ``features``: what it
predicted is known all the same. A window that counts impossible numbers has no row at all.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from ...ext.sketch import SketchBank, SketchRecordError
from ...ext.sketch_record import edges_digest
from ..drift.errors import ProfileError
from ..drift.profile import ReferenceProfile
from ..store.tables import Device, Labels, Model, Stream, Window
from .config import ClockConfig
from .rules import align, day_name
from .schema import COUNT_MAX, DATASETS, FEATURES, LABELS, WINDOWS, Dataset

log = logging.getLogger(__name__)


Key = tuple[str, str, str]
"""Dataset, model, day."""


@dataclass(frozen=True, slots=True)
class Binning:
    """What the sketches of a model's windows must be like."""

    features: Sequence[str]
    """Their names."""
    digest: bytes
    """Of their edges, as records carry it: as many bins may lie between other edges."""
    doubles: Sequence[bool]
    """Which keep doubles: their sketches do not merge with those of floats."""


SPLITS: Final = 3  # of labels: training, validation, test
Made = tuple[dict[str, Any], list[dict[str, Any]]]
"""Rows of ``windows`` and ``features`` that a window was turned into."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the database as rows of the lake."""

    windows: tuple[int, ...]
    """Ids of the windows that were read, those without a row too."""
    labels: tuple[int, ...]
    """Ids of the label records."""
    oldest_ms: int | None
    """When the first of them was received."""
    parts: Mapping[Key, Sequence[Mapping[str, Any]]]

    def tables(self) -> dict[Key, pa.Table]:
        """Return the rows by (dataset, model, day), in no order."""
        return {
            key: pa.Table.from_pylist(part, DATASETS[key[0]].schema)
            for key, part in self.parts.items()
        }


class Memo:
    """What the newest windows were turned into: reading a sketch takes milliseconds. Thread-safe.

    A window is asked for by every question and by its export, and never changes.
    """

    def __init__(self, *, windows_max: int) -> None:
        """Keep the rows of at most so many windows; some 40 kB each."""
        self._found: OrderedDict[int, Made | None] = OrderedDict()
        self._windows_max = windows_max
        self._lock = threading.Lock()

    def rows(self, window: Window, make: Callable[[], Made | None]) -> Made | None:
        """Return the rows of a window, made once; None if it has none."""
        with self._lock:
            if window.id in self._found:
                return self._found[window.id]
        found = make()
        with self._lock:
            self._found[window.id] = found
            while len(self._found) > self._windows_max:
                self._found.popitem(last=False)
        return found

    def forget(self, windows: Iterable[int]) -> None:
        """Let windows go that are in the lake now: nobody asks for them here any more."""
        with self._lock:
            for each in windows:
                self._found.pop(each, None)


def waiting(
    session: Session,
    memo: Memo,
    *,
    limit: int,
    clock: ClockConfig,
    model: str = "",
    datasets: Iterable[str],
) -> Rows:
    """Return rows that are not in the lake yet, the oldest first.

    Args:
        session: Of the database.
        memo: What was read before.
        limit: Most windows, and most label records, that are read.
        clock: When a device's clock is believed.
        model: Digest of the only model wanted; "" = all.
        datasets: Names of those wanted.
    """
    wanted = set(datasets)
    windows: Sequence[Any] = ()
    labels: Sequence[Any] = ()
    if wanted & {WINDOWS.name, FEATURES.name}:
        windows = session.execute(
            select(Window, Device.name, Device.site, Device.hardware, Stream.stream)
            .join(Device, Device.id == Window.device_id)
            .join(Stream, Stream.id == Window.stream_id)
            .where(Window.lake_done.is_(False), *([Window.model_sha256 == model] if model else []))
            .order_by(Window.id)
            .limit(limit)
        ).all()
    if LABELS.name in wanted:
        labels = session.execute(
            select(Labels, Device.name, Device.site, Device.hardware, Stream.stream, Window)
            .join(Device, Device.id == Labels.device_id)
            .join(Stream, Stream.id == Labels.stream_id)
            .outerjoin(
                Window,
                (Window.stream_id == Labels.stream_id)
                & (Window.model_sha256 == Labels.model_sha256)
                & (Window.slice == Labels.slice)
                & (Window.number == Labels.number),
            )
            .where(Labels.lake_done.is_(False), *([Labels.model_sha256 == model] if model else []))
            .order_by(Labels.id)
            .limit(limit)
        ).all()
    known = {key: _binning(session, key) for key in {row[0].model_sha256 for row in windows}}
    parts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for window, *who in windows:
        make = partial(_window, window, who, known[window.model_sha256], clock)
        made = memo.rows(window, make)
        if made is None:
            continue
        row, features = made
        day = day_name(row["time_ms"])
        _add(parts, WINDOWS.name, window.model_sha256, day, [row], wanted)
        _add(parts, FEATURES.name, window.model_sha256, day, features, wanted)
    for label, *who, window in labels:
        row = _labels(label, who, window, clock)
        if not _is_possible(row, LABELS) or not 0 <= label.split < SPLITS:
            log.warning("labels %d count impossible numbers and are left out", label.id)
            continue
        _add(parts, LABELS.name, label.model_sha256, day_name(row["time_ms"]), [row], wanted)
    return Rows(
        tuple(row[0].id for row in windows),
        tuple(row[0].id for row in labels),
        min((row[0].received_ms for row in (*windows, *labels)), default=None),
        parts,
    )


def _is_possible(row: Mapping[str, Any], dataset: Dataset) -> bool:
    """Tell whether no counter of a row is beyond what one window can count."""
    singles = [row.get(name) or 0 for name in dataset.sums]
    lists = [max(row[name], default=0) for name in dataset.lists]
    return max(singles) <= COUNT_MAX and max(lists) <= COUNT_MAX


def _add(
    parts: dict[tuple[str, str, str], list[dict[str, Any]]],
    dataset: str,
    model: str,
    day: str,
    rows: list[dict[str, Any]],
    wanted: set[str],
) -> None:
    if rows and dataset in wanted:
        parts.setdefault((dataset, model, day), []).extend(rows)


def _binning(session: Session, model: str) -> Binning | None:
    """Return the bins of a model's profile; None if nobody knows them."""
    raw = session.scalars(select(Model.profile).where(Model.sha256 == model)).first()
    try:
        profile = ReferenceProfile.from_dict(raw) if raw is not None else None
    except ProfileError:
        profile = None
    if profile is None:
        return None
    edges = [np.array(each.edges, np.float32) + np.float32(0.0) for each in profile.features]
    sizes__d = np.array([len(each) for each in edges], np.int64)
    return Binning(
        [each.name for each in profile.features],
        edges_digest(sizes__d, np.concatenate(edges)),
        [each.kind == "double" for each in profile.features],
    )


def _who(row: Any, who: Sequence[Any], time_ms: int, clock_off: bool) -> dict[str, Any]:
    device, site, hardware, stream = who
    return {
        "model_sha256": row.model_sha256,
        "device": device,
        "site": site,
        "hardware": hardware,
        "slice": row.slice,
        "time_ms": time_ms,
        "stream": stream.hex(),
        "number": row.number,
        "windows": 1,
        "clock_off": int(clock_off),
    }


def _window(
    window: Window, who: Sequence[Any], binning: Binning | None, clock: ClockConfig
) -> Made | None:
    at = align(window.device_start_ms, window.device_end_ms, window.received_ms, config=clock)
    base = _who(window, who, at.time_ms, at.clock_off)
    extra = window.extra
    quality = extra.get("quality", {})
    rate = quality.get("rate", [])
    projection = np.frombuffer(window.projection, "<f4").astype(np.float64)
    row = base | {
        "device_start_ms": window.device_start_ms,
        "device_end_ms": window.device_end_ms,
        "received_ms": window.received_ms,
        "predictions": window.predictions,
        "errors": window.errors,
        "shed": extra.get("shed", 0),
        "expected": rate[0] if rate else None,
        "schema_errors": sum(quality.get("schema", [])),
        "refused": 0,
        "classes": window.classes,
        "latency_us": window.latency_us,
        "scores": extra.get("scores", []),
        "projected": extra.get("projected", 0),
        "projection": projection.tolist() if np.isfinite(projection).all() else [],
    }
    try:
        features = _features(window, base, quality, binning)
    except (SketchRecordError, ProfileError) as exc:
        log.warning("the sketch of window %d is left out: %s", window.id, exc)
        features, row["refused"] = [], 1
    if not _is_possible(row, WINDOWS) or not all(_is_possible(f, FEATURES) for f in features):
        log.warning("window %d counts impossible numbers and is left out", window.id)
        return None
    return row, features


def _features(
    window: Window,
    base: dict[str, Any],
    quality: Mapping[str, Any],
    binning: Binning | None,
) -> list[dict[str, Any]]:
    bank = SketchBank.from_bytes(window.sketch)
    if binning is None:
        names = [str(i) for i in range(bank.features)]
    else:
        names = list(binning.features)
        if len(names) != bank.features:
            raise ProfileError(f"it has {bank.features} features, the profile {len(names)}")
        if bank.edges_digest != binning.digest:
            raise ProfileError("its bins lie between other edges than those of the profile")
        if [kind == "double" for kind in bank.kinds] != binning.doubles:
            raise ProfileError("it keeps doubles where the profile has floats, or the reverse")
    kinds = bank.kinds
    bins_only = bank.bins_only or bool(window.extra.get("bins_only", False))
    rows = []
    for i, name in enumerate(names):
        counts = bank.counts(i)
        moments = bank.moments(i)
        n = int(moments.count)
        shown = n > 0 and not bins_only
        row = base | {
            "feature": name,
            "position": i,
            "n": n,
            "nulls": int(bank.nulls(i)),
            "sketched": n if shown else 0,
            "mean": moments.mean if shown else None,
            "variance": moments.variance if shown else None,
            "minimum": moments.minimum if shown else None,
            "maximum": moments.maximum if shown else None,
            "bins": counts,
            "below": _at(quality, "below", i),
            "above": _at(quality, "above", i),
            "stuck": _at(quality, "stuck", i),
        }
        rows.append(row | (_sketches(bank, i, kinds[i]) if shown else {}))
    return rows


def _sketches(bank: SketchBank, i: int, kind: str) -> dict[str, Any]:
    """Return the bytes of the sketches that a bank keeps of a feature."""
    found: dict[str, Any] = {}
    if kind != "category":
        found["kll"], found["kll_variance"] = bank.kll_bytes(i), bank.variance_certificate(i)
    if kind in ("integer", "category"):
        found["hll"], found["frequent"] = bank.hll_bytes(i), bank.frequent_bytes(i)
    return found


def _at(quality: Mapping[str, Any], name: str, i: int) -> int:
    counts = quality.get(name, [])
    return int(counts[i]) if i < len(counts) else 0


def _labels(
    label: Labels, who: Sequence[Any], window: Window | None, clock: ClockConfig
) -> dict[str, Any]:
    if window is None:  # the window was lost: its time is not known
        time_ms, clock_off = label.received_ms, True
    else:
        at = align(window.device_start_ms, window.device_end_ms, window.received_ms, config=clock)
        time_ms, clock_off = at.time_ms, at.clock_off
    return _who(label, who, time_ms, clock_off) | {
        "split": label.split,
        "received_ms": label.received_ms,
        "labelled": label.labelled,
        "correct": label.correct,
        "confusion": label.confusion,
        "calibration": label.extra.get("calibration", []),
    }
