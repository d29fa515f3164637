"""Choose devices by a short text, the same in CLI and console.

    wrist-0                     ids that begin so
    status:online model:alexa   every term must hold

Terms: ``status`` (online, offline, revoked), ``model`` (name or digest prefix), ``version``,
``agent`` (prefix), ``drift`` (yes, no, unknown), ``rollout`` (state of the device in its newest
rollout), ``alerts`` and ``warnings`` (yes, no), ``site``, ``hardware``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..errors import InvalidError

Row = Mapping[str, Any]
CHARS_MAX: Final = 1000


def _status(row: Row) -> str:
    if row["revoked"]:
        return "revoked"
    return "online" if row["online"] else "offline"


def _model(row: Row, value: str) -> bool:
    model = row["model"] or {}
    return model.get("name") == value or (
        len(value) >= 6 and str(model.get("sha256", "")).startswith(value)
    )


def _drift(row: Row) -> str:
    if row["drift"] is None:
        return "unknown"
    return "yes" if row["drift"].get("drifting") else "no"


TERMS: Final[Mapping[str, Callable[[Row, str], bool]]] = {
    "status": lambda row, value: _status(row) == value,
    "model": _model,
    "version": lambda row, value: str((row["model"] or {}).get("version")) == value,
    "agent": lambda row, value: str(row["agent"]).startswith(value),
    "drift": lambda row, value: _drift(row) == value,
    "rollout": lambda row, value: (row["rollout"] or {}).get("state") == value,
    "alerts": lambda row, value: ("yes" if row["alerts_open"] else "no") == value,
    "warnings": lambda row, value: ("yes" if row["warnings"] else "no") == value,
    "site": lambda row, value: row["site"] == value,
    "hardware": lambda row, value: row["hardware"] == value,
}


def choose(rows: Sequence[Row], selector: str) -> list[Row]:
    """Return the rows of the fleet's table that a selector names, in their order.

    Args:
        rows: ``fleet(...)["devices"]`` of shoal.server.api.summary.
        selector: The text; "" names all.

    Raises:
        InvalidError: A term has an unknown key, or the text is too long.
    """
    if len(selector) > CHARS_MAX:
        raise InvalidError(f"the selector exceeds {CHARS_MAX} characters")
    found = list(rows)
    for term in selector.split():
        key, colon, value = term.partition(":")
        if not colon:
            found = [row for row in found if str(row["id"]).startswith(term)]
        elif key in TERMS:
            found = [row for row in found if TERMS[key](row, value)]
        else:
            raise InvalidError(
                f"the selector has an unknown key {key!r:.40}",
                hint=f"use an id prefix, or {', '.join(f'{name}:…' for name in TERMS)}",
            )
    return found
