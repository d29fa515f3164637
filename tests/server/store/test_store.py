"""The store: one schema, whole transactions, an audit log that shows tampering."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, select, text

from shoal.server.errors import StoreError
from shoal.server.store import Base, Store, audit
from shoal.server.store.tables import Audit, Device


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A migrated store in a file."""
    store = Store(f"sqlite:///{tmp_path}/fleet.db")
    store.migrate()
    yield store
    store.close()


def test_migrations_make_the_tables(store: Store) -> None:
    """The migrations and the tables never drift apart; migrating twice changes nothing."""
    store.migrate()
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_transaction_is_whole_or_nothing(store: Store) -> None:
    """An error rolls everything back."""
    with pytest.raises(RuntimeError), store.begin() as session:
        session.add(Device(name="a", created_ms=1))
        session.flush()
        raise RuntimeError
    with pytest.raises(StoreError), store.begin() as session:
        session.add_all([Device(name="b", created_ms=1), Device(name="b", created_ms=1)])
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(Device)) == 0


def test_a_damaged_file_is_a_clear_error(tmp_path: Path) -> None:
    """A file that is no database stops the server with a hint, and is left alone."""
    (tmp_path / "fleet.db").write_bytes(b"this is not a database" * 100)
    store = Store(f"sqlite:///{tmp_path}/fleet.db")
    with pytest.raises(StoreError, match="could not be opened") as caught:
        store.migrate()
    store.close()
    assert "backup" in caught.value.hint
    assert (tmp_path / "fleet.db").read_bytes().startswith(b"this is not")


def fill(store: Store) -> None:
    """Write three entries."""
    for i in range(3):
        with store.begin() as session:
            audit.append(
                session, now_ms=i, actor="operator", action="model.approved", subject=str(i)
            )


def test_the_audit_chain_holds(store: Store) -> None:
    """An untouched log verifies; an empty one too."""
    with store.read() as session:
        assert audit.verify(session) == (0, audit.GENESIS)
    fill(store)
    with store.read() as session:
        assert audit.verify(session)[0] == 3


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE audit SET actor = 'nobody' WHERE id = 2",
        "DELETE FROM audit WHERE id = 2",
        "DELETE FROM audit WHERE id = 1",
        "UPDATE audit SET id = 9 WHERE id = 3",
    ],
)
def test_the_audit_chain_shows_tampering(store: Store, damage: str) -> None:
    """Whoever changes, removes or renumbers an entry is found out."""
    fill(store)
    with store.begin() as session:
        session.execute(text(damage))
    with store.read() as session, pytest.raises(StoreError, match="broken at entry"):
        audit.verify(session)


def test_entries_count_without_a_hole(store: Store) -> None:
    """Ids are 1, 2, 3."""
    fill(store)
    with store.read() as session:
        assert session.scalars(select(Audit.id).order_by(Audit.id)).all() == [1, 2, 3]
