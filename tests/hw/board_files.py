"""Recorded boards as folders: what the tests of this part read instead of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shoal.hw import recording

BOARDS = Path(__file__).parent / "boards"
NAMES = sorted(path.stem for path in BOARDS.glob("*.json"))


def laid_out(name: str, target: Path) -> Path:
    """Return a root folder with the files of a recorded board."""
    return recording.unpack(BOARDS / f"{name}.json", target)


def written(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files below a root; keys are paths with a leading slash."""
    for path, text in files.items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text.encode() if isinstance(text, str) else text)
    return root
