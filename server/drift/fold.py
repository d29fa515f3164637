"""Fold new windows and labels into the states of their devices.

A row is folded once: it is marked in the same transaction that stores the state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...ext.sketch import SketchBank, SketchRecordError
from ..store.tables import DriftState, Labels, Window
from . import quality, scores, streams
from .config import DriftWorkerConfig
from .detectors import DeviceState
from .errors import ProfileError
from .profile import ReferenceProfile
from .profile_cache import Profiles
from .quality import QualityState
from .scores import ScoreState
from .streams import Counted, Layout, Streams
from .windows import window_codes, window_counts, window_ms

log = logging.getLogger(__name__)

TRAIN_SPLIT: Final = 0
QUALITY: Final = "quality"
TRACE: Final = "trace"
STREAMS: Final = "streams"
SCORES: Final = "scores"
"""Keys of a stored state beside those of the detectors."""

Key = tuple[int, str]
"""Device id, model digest."""


class Folder:
    """Reads and writes ``drift_state``; the rules are those of the detectors."""

    def __init__(
        self, profiles: Profiles, *, clock: Callable[[], int], config: DriftWorkerConfig
    ) -> None:
        self._profiles, self._clock, self._config = profiles, clock, config

    def fold(
        self, session: Session, windows: Sequence[Window], labels: Sequence[Labels]
    ) -> dict[Key, DriftState]:
        """Fold rows into the states of their devices, and mark them.

        Returns:
            The states that took something, stored with the transaction.
        """
        rules = self._config.rules
        kept: dict[Key, DriftState] = {}
        states: dict[Key, DeviceState] = {}
        qualities: dict[Key, QualityState] = {}
        queues: dict[Key, list[Counted]] = {}
        followed: dict[Key, ScoreState] = {}
        known = self._known(session, [*windows, *labels])

        def state_of(device_id: int, model: str) -> DeviceState:
            key = (device_id, model)
            if key not in states:
                row = known.get(key)
                if row is None:
                    row = DriftState(
                        device_id=device_id, model_sha256=model, state={}, changed_ms=0
                    )
                    session.add(row)
                kept[key], states[key] = row, DeviceState.from_dict(row.state or {})
                qualities[key] = QualityState.from_dict((row.state or {}).get(QUALITY, {}))
                followed[key] = ScoreState.from_dict((row.state or {}).get(SCORES, {}))
            return states[key]

        for window in windows:
            window.drift_done = True
            profile = self._profiles.of(session, window.model_sha256)
            if profile is None:
                continue
            try:
                bank = SketchBank.from_bytes(window.sketch)
                counts, nulls, sure = window_counts(bank, profile)
            except (SketchRecordError, ProfileError) as exc:
                log.warning("window %d is not folded: %s", window.id, exc)
                continue
            aligned = window.extra.get("aligned_ms")
            state = state_of(window.device_id, window.model_sha256)
            before, sliced = state.blocks[-1:], state.slices not in ([], [""])
            folded = state.windows
            state.fold(
                counts,
                config=rules,
                slice_=window.slice,
                aligned_ms=aligned if type(aligned) is int else 0,
            )
            score = followed[window.device_id, window.model_sha256]
            score.score(scores.CONFIDENCE, *sure, config=self._config.scores)
            if profile.confidence is not None:
                score.answers(
                    window.extra.get("scores"),
                    profile.confidence.classes,
                    config=self._config.scores,
                )
            queue = queues.setdefault((window.device_id, window.model_sha256), [])
            # A window that comes in slices is whole once the next one begins.
            if sliced and state.windows > folded:
                queue += [(block, window_ms(window)) for block in before]
            if not window.slice:
                queue.append((counts, window_ms(window)))
            told = window.extra.get("quality")
            qualities[window.device_id, window.model_sha256].fold(
                quality.counters(
                    told if isinstance(told, dict) else {},
                    [sum(row) for row in counts],
                    nulls,
                    window_codes(bank, counts, profile),
                ),
                [feature.name for feature in profile.features],
                config=self._config.quality,
            )
        for label in labels:
            label.drift_done = True
            profile = self._profiles.of(session, label.model_sha256)
            # What a model may have been trained on says nothing about what it will meet.
            if profile is not None and label.split != TRAIN_SPLIT:
                state_of(label.device_id, label.model_sha256).label(
                    label.labelled, label.correct, profile=profile, config=rules
                )
                followed[label.device_id, label.model_sha256].score(
                    scores.ACCURACY, label.correct, label.labelled, config=self._config.scores
                )
        watched = self._watch(session, kept, queues)
        now_ms = self._clock()
        for key, row in kept.items():
            old = row.state or {}
            row.state = {
                **states[key].to_dict(),
                QUALITY: qualities[key].to_dict(),
                TRACE: old.get(TRACE, {}),
                SCORES: followed[key].to_dict(),
                STREAMS: watched[key].to_dict() if key in watched else old.get(STREAMS, {}),
            }
            row.windows, row.changed_ms = states[key].windows, now_ms
        session.flush()
        return kept

    def _known(self, session: Session, told: Sequence[Window | Labels]) -> dict[Key, DriftState]:
        """Return the states that rows are folded into, as far as there are any yet."""
        found = session.scalars(
            select(DriftState).where(
                DriftState.device_id.in_({each.device_id for each in told}),
                DriftState.model_sha256.in_({each.model_sha256 for each in told}),
            )
        )
        return {(row.device_id, row.model_sha256): row for row in found}

    def _watch(
        self,
        session: Session,
        kept: Mapping[Key, DriftState],
        queues: Mapping[Key, list[Counted]],
    ) -> dict[Key, Streams]:
        """Fold new windows into the streams of their devices, all devices of a model at once."""
        found: dict[Key, Streams] = {}
        for model in dict.fromkeys(model for _, model in queues):
            profile = self._profiles.of(session, model)
            if profile is None:
                continue
            keys = [key for key in queues if key[1] == model]
            devices = [self.streams(kept[key], profile) for key in keys]
            streams.fold(
                devices, [queues[key] for key in keys], profile, config=self._config.streams
            )
            found |= dict(zip(keys, devices, strict=True))
        return found

    def streams(self, row: DriftState, profile: ReferenceProfile) -> Streams:
        """Return what is followed of a device since its first windows."""
        bins = [len(each.counts) for each in profile.features]
        layout = Layout.of(bins, self._config.streams)
        return Streams.from_dict((row.state or {}).get(STREAMS, {}), layout)
