"""The manifest of the lake in the database: which files there are, and which windows they hold.

Rule 1: files come and go in one transaction with the flags of the windows they hold, so that a
reader of one snapshot finds each window in a file or in the database, never in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import delete, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from ..errors import StoreError
from ..store import Store
from ..store.tables import Labels, LakeFile, Window
from .rules import FileFacts, Grain, Tier

IDS_PER_STATEMENT = 10_000  # SQLite takes 32,766 variables


@contextmanager
def snapshot(store: Store) -> Iterator[Session]:
    """Yield a session whose statements all see the same moment."""
    with store.read() as session:
        if store.engine.dialect.name == "postgresql":  # SQLite's reads are snapshots anyway
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        yield session


def live(
    session: Session,
    *,
    dataset: str = "",
    grain: Grain | None = None,
    model: str = "",
    since_ms: int | None = None,
    until_ms: int | None = None,
) -> list[FileFacts]:
    """Return files that are not retired, the oldest first; what is left out selects all."""
    query = select(LakeFile).where(LakeFile.retired_ms.is_(None)).order_by(LakeFile.id)
    if dataset:
        query = query.where(LakeFile.dataset == dataset)
    if grain is not None:
        query = query.where(LakeFile.grain == str(grain))
    if model:
        query = query.where(LakeFile.model_sha256 == model)
    if since_ms is not None:
        query = query.where(LakeFile.last_ms >= since_ms)
    if until_ms is not None:
        query = query.where(LakeFile.first_ms < until_ms)
    return [_facts(row) for row in session.scalars(query)]


def paths(session: Session) -> set[str]:
    """Return the paths of all files, retired ones too."""
    return set(session.scalars(select(LakeFile.path)))


def add(session: Session, files: Iterable[FileFacts]) -> None:
    """Enter files; their ids are given by the database."""
    session.add_all(
        LakeFile(
            dataset=each.dataset,
            grain=str(each.grain),
            tier=str(each.tier),
            model_sha256=each.model,
            day=each.day,
            path=each.path,
            rows=each.rows,
            bytes=each.bytes,
            windows=each.windows,
            first_ms=each.first_ms,
            last_ms=each.last_ms,
            folded=each.folded,
            created_ms=each.created_ms,
        )
        for each in files
    )
    session.flush()


def retire(session: Session, files: Sequence[FileFacts], *, now_ms: int) -> None:
    """Say that no reader should begin with these files any more.

    Raises:
        StoreError: One of them is retired already: another server works on this lake.
    """
    changed = 0
    for part in _parts([each.id for each in files]):
        changed += _count(
            session,
            update(LakeFile)
            .where(LakeFile.id.in_(part), LakeFile.retired_ms.is_(None))
            .values(retired_ms=now_ms),
        )
    if changed != len(files):
        raise StoreError("files of the lake were retired by someone else; nothing was changed")


def mark(session: Session, *, windows: Sequence[int], labels: Sequence[int]) -> None:
    """Say that rows of the database are in the lake.

    Raises:
        StoreError: One of them is already: another server exports this database.
    """
    changed = 0
    for table, ids in ((Window, windows), (Labels, labels)):
        for part in _parts(ids):
            changed += _count(
                session,
                update(table)
                .where(table.id.in_(part), table.lake_done.is_(False))
                .values(lake_done=True)
                .execution_options(synchronize_session=False),
            )
    if changed != len(windows) + len(labels):
        raise StoreError("windows were exported by someone else; nothing was changed")


def gone(session: Session, *, before_ms: int, limit: int) -> list[tuple[int, str]]:
    """Return (id, path) of files that were retired before a time."""
    rows = session.execute(
        select(LakeFile.id, LakeFile.path).where(LakeFile.retired_ms < before_ms).limit(limit)
    )
    return [(number, path) for number, path in rows]


def forget(session: Session, ids: Sequence[int]) -> None:
    """Remove the entries of files that are no more."""
    for part in _parts(ids):
        session.execute(delete(LakeFile).where(LakeFile.id.in_(part)))


def prune(session: Session, *, before_ms: int, limit: int) -> int:
    """Remove windows and labels from the database that are in the lake and judged; say how many."""
    count = 0
    for table in (Window, Labels):
        ids = session.scalars(
            select(table.id)
            .where(
                table.lake_done.is_(True), table.drift_done.is_(True), table.received_ms < before_ms
            )
            .order_by(table.id)
            .limit(limit)
        ).all()
        for part in _parts(ids):
            count += _count(session, delete(table).where(table.id.in_(part)))
    return count


def _count(session: Session, statement: object) -> int:
    result = session.execute(statement)  # type: ignore[call-overload]  # any update or delete
    assert isinstance(result, CursorResult)
    return result.rowcount


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), IDS_PER_STATEMENT):
        yield ids[start : start + IDS_PER_STATEMENT]


def _facts(row: LakeFile) -> FileFacts:
    return FileFacts(
        id=row.id,
        dataset=row.dataset,
        grain=Grain(row.grain),
        tier=Tier(row.tier),
        model=row.model_sha256,
        day=row.day,
        path=row.path,
        rows=row.rows,
        bytes=row.bytes,
        windows=row.windows,
        first_ms=row.first_ms,
        last_ms=row.last_ms,
        created_ms=row.created_ms,
        folded=row.folded,
    )
