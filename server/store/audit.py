"""The hash-chained log of everything that changes what devices run or who may join.

    sha256(entry) = SHA-256(canonical JSON of (id, time_ms, actor, action, subject, detail,
                            previous sha256))

An entry is written in the same transaction as the change it tells of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..errors import StoreError
from .tables import Audit

GENESIS = "0" * 64


def _hash(entry: Audit) -> str:
    chained = [
        entry.id, entry.time_ms, entry.actor, entry.action, entry.subject, entry.detail,
        entry.previous_sha256,
    ]  # fmt: skip
    return hashlib.sha256(
        json.dumps(chained, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def append(
    session: Session,
    *,
    now_ms: int,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any] | None = None,
) -> Audit:
    """Add an entry to the log within the caller's write transaction.

    Args:
        session: An open write transaction.
        now_ms: Unix ms.
        actor: Who did it: ``operator``, ``device:<id>``, ``server``.
        action: Past fact, e.g. ``model.approved``.
        subject: What it was done to: an id or digest.
        detail: JSON-serialisable facts; never a secret.
    """
    last = session.scalars(select(Audit).order_by(Audit.id.desc()).limit(1)).first()
    entry = Audit(
        id=last.id + 1 if last else 1,
        time_ms=now_ms,
        actor=actor,
        action=action,
        subject=subject,
        detail=dict(detail or {}),
        previous_sha256=last.sha256 if last else GENESIS,
        sha256="",
    )
    entry.sha256 = _hash(entry)
    session.add(entry)
    session.flush()
    return entry


def verify(session: Session) -> tuple[int, str]:
    """Return (number of entries, hash of the last) after checking the whole chain.

    Raises:
        StoreError: An entry was changed, removed or inserted; the message names it.
    """
    previous, count = GENESIS, 0
    for entry in session.scalars(select(Audit).order_by(Audit.id)).yield_per(1000):
        count += 1
        if entry.id != count or entry.previous_sha256 != previous or entry.sha256 != _hash(entry):
            raise StoreError(
                f"the audit log is broken at entry {count}",
                hint="the database was changed by hand; compare with a backup",
            )
        previous = entry.sha256
    return count, previous
