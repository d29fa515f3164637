"""Fresh databases for tests, quickly: the migrations run once per process, then a file is copied.

Also what fills them: a device that is enrolled, ingest's writer with no broker before it. And what
is asked of them.

A migration of an empty file takes a quarter of a second of computing and as much of fsync. That
migrations work is the business of tests/server/store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from sqlalchemy import event

from shoal.server.ingest.writer import Writer
from shoal.server.store import Store
from shoal.server.store.tables import Device


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


def enrolled_store(path: Path) -> Store:
    """Return a fresh store with one enrolled device, d-1; the caller closes it."""
    found = fresh_store(path)
    with found.begin() as session:
        session.add(Device(name="d-1", created_ms=1))
    return found


def writer_of(store: Store, *, clock: Callable[[], int]) -> Writer:
    """Return the writer of ingest without owners' hooks."""
    return Writer(
        store, clock=clock, on_update=lambda *_: None, on_reported=lambda *_: None,
        quarantine_rows_max=100,
    )  # fmt: skip


@contextmanager
def statements(store: Store) -> Iterator[list[str]]:
    """Note the SQL that a database executes meanwhile."""
    found: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        found.append(statement)

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(store.engine, "before_cursor_execute", note)
