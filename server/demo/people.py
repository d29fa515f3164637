"""Who wears the demo's devices, and which of them the first model has never seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...examples import watch
from ..errors import InvalidError

UNSEEN_SHARE = 0.3  # three of ten people


@dataclass(frozen=True, slots=True)
class Wearer:
    """One device and the person whose recordings it replays."""

    device: str
    subject: int
    unseen: bool
    """The first model was not trained on this person."""


def draw(data: watch.Watch, *, devices: int, seed: int) -> tuple[Wearer, ...]:
    """Return who wears what; the seed draws who is unseen.

    Args:
        data: The recordings.
        devices: Number of devices, 2 to 64; beyond ten, people wear more than one.
        seed: Any non-negative integer.

    Raises:
        InvalidError: ``devices`` is out of range.
    """
    if not 2 <= devices <= 64:
        raise InvalidError(f"the demo runs 2 to 64 devices, not {devices}")
    subjects = sorted({each.subject for each in data.recordings})
    worn = [subjects[i % len(subjects)] for i in range(devices)]
    people = sorted(set(worn))
    count = max(1, round(UNSEEN_SHARE * len(people)))
    unseen = set(np.random.default_rng(seed).choice(people, count, replace=False).tolist())
    return tuple(
        Wearer(f"wrist-{i + 1:02d}", subject, subject in unseen) for i, subject in enumerate(worn)
    )


def write_recording(path: Path, data: watch.Watch, wearer: Wearer, *, seed: int) -> None:
    """Write what one device replays: the windows of one person, in streaming order."""
    found = watch.windows(data, wearer.subject, seed=seed)
    order = found.order
    np.savez(
        path, x__nct=found.x__nct[order], y__n=found.y__n[order], split__n=found.split__n[order]
    )


def write_dataset(path: Path, data: watch.Watch, wearers: tuple[Wearer, ...]) -> None:
    """Write the server's training data: the people that the first model may see."""
    subjects = sorted({each.subject for each in wearers if not each.unseen})
    parts = [watch.windows(data, subject, seed=0) for subject in subjects]
    groups = [
        np.full(len(part.y__n), subject) for part, subject in zip(parts, subjects, strict=True)
    ]
    np.savez(
        path,
        x__nct=np.concatenate([part.x__nct for part in parts]),
        y__n=np.concatenate([part.y__n for part in parts]),
        split__n=np.concatenate([part.split__n for part in parts]),
        group__n=np.concatenate(groups).astype(np.int64),
        channels=np.array(json.dumps(list(watch.CHANNELS))),
        classes=np.array(json.dumps(list(watch.EXERCISES))),
    )
