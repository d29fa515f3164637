"""Fresh databases for tests, quickly: the migrations run once per process, then a file is copied.

A migration of an empty file takes a quarter of a second of computing and as much of fsync. That
migrations work is the business of tests/server/store.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from shoal.server.store import Store


@cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/fleet.db")
        store.migrate()
        store.close()
        return Path(folder, "fleet.db").read_bytes()


def fresh_url(path: Path) -> str:
    """Write a migrated database without a row to this path, and return its URL."""
    path.write_bytes(_empty())
    return f"sqlite:///{path}"


def fresh_store(path: Path) -> Store:
    """Return a store over a migrated database without a row at this path; the caller closes it."""
    return Store(fresh_url(path))
