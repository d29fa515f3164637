"""Open the metadata database and hand out transactions.

SQLite by default: WAL for readers beside one writer, ``synchronous=FULL`` because a record is
acknowledged to the device on commit and the device then forgets it. Writers of this process queue
for one lock, so that none of them fails in the middle on a snapshot that went stale.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from ..errors import StoreError

BUSY_MS = 10_000  # a writer waits this long for another one; a transaction takes milliseconds


class Store:
    """The database of one server. Thread-safe: each transaction has a session of its own."""

    def __init__(self, url: str) -> None:
        """Open the database; call :meth:`migrate` before the first use.

        Args:
            url: SQLAlchemy URL, e.g. ``sqlite:////var/lib/shoal/fleet.db``.
        """
        self.url = url
        self._engine = _engine(url)
        self._write = sessionmaker(self._engine, expire_on_commit=False)
        self._writer = threading.Lock()  # SQLite has one writer: queue here, not in its lock

    @property
    def engine(self) -> Engine:
        """The engine, for migrations and tests."""
        return self._engine

    def migrate(self) -> None:
        """Bring the schema to the newest version; a fresh file gets all of it.

        Raises:
            StoreError: The database is damaged, or newer than this server.
        """
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self._engine.connect() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
        except Exception as exc:  # alembic raises classes of its own beside SQLAlchemy's
            raise StoreError(
                f"the database could not be opened or migrated: {exc!s:.300}",
                hint="restore the last backup, or start this version's server on its own data",
            ) from exc

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """Yield a session in a write transaction: commit at the end, roll back on an error.

        Raises:
            StoreError: The database refused; nothing of the transaction is stored.
        """
        with self._writer:
            try:
                with self._write.begin() as session:
                    yield session
            except SQLAlchemyError as exc:
                raise StoreError(f"the database refused a transaction: {exc!s:.300}") from exc

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session for reading; what is changed in it is thrown away."""
        with self._write() as session:
            yield session

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def _engine(url: str) -> Engine:
    engine = create_engine(url, pool_pre_ping=False)
    if engine.dialect.name != "sqlite":
        return engine

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # this file sends BEGIN itself
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine
