"""The child process of a probe: ask one vendor's library, answer in JSON, end.

    python -P -m shoal.hw.backends.child NAME  ->  standard output: {...} | {"error": text}

Libraries print to standard output as they like, so it is theirs as standard error is, and the
answer goes to a copy of it that they do not know.
"""

from __future__ import annotations

import json
import os
import sys

from . import BACKENDS
from .base import short


def main(name: str) -> None:
    """Answer for one backend and end without the libraries' own farewell, which may crash."""
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        try:
            found = BACKENDS[name].ask()
        except Exception as exc:  # each library has its own classes
            found = {"error": short(f"{type(exc).__name__}: {exc}")}
        json.dump(found, answer)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
