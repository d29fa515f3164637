"""Spans and moments as people write them: ``7d``, ``12h``, ``30m``, ``2026-03-01``."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final

import click

UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
SPAN: Final = re.compile(r"(\d{1,10}[smhdw])+")
SPAN_S_MAX: Final = 100 * 365 * 86_400  # beyond it a number is a slip of the finger


def span_s(text: str) -> int:
    """Return a span in s.

    Args:
        text: A whole number above 0 and one of s, m, h, d, w; units may follow each other.

    Raises:
        ValueError: It is none, or longer than a century.

    >>> span_s("7d"), span_s("1h30m")
    (604800, 5400)
    """
    if not SPAN.fullmatch(text):
        raise ValueError(f"{text!r:.40} is no span such as 7d, 12h or 30m")
    total = sum(int(n) * UNITS_S[unit] for n, unit in re.findall(r"(\d+)([smhdw])", text))
    if not 0 < total <= SPAN_S_MAX:
        raise ValueError(f"{text!r:.40} is no span of time: more than none, at most a century")
    return total


def moment_ms(text: str, *, now_ms: int) -> int:
    """Return a moment as Unix ms.

    Args:
        text: A span before now, ``now``, or a date or time of ISO 8601; in UTC unless it says.
        now_ms: Unix ms.

    Raises:
        ValueError: It is none of these, or before 1970.

    >>> moment_ms("2026-03-01T12:00", now_ms=0)
    1772366400000
    """
    if text == "now":
        return now_ms
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        if not SPAN.fullmatch(text):
            raise ValueError(
                f"{text!r:.40} is no span such as 7d, and no time such as 2026-03-01T12:00"
            ) from None
        return max(0, now_ms - 1000 * span_s(text))
    zoned = found if found.tzinfo else found.replace(tzinfo=UTC)
    unix_ms = int(zoned.timestamp() * 1000)
    if unix_ms < 0:
        raise ValueError(f"{text!r:.40} is before 1970")
    return unix_ms


class Span(click.ParamType[int]):
    """A span, in s."""

    name = "span"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return it, or say that it is a usage error."""
        if isinstance(value, int):
            return value
        try:
            return span_s(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


class Moment(click.ParamType[str]):
    """A moment: a checked text that :func:`moment_ms` takes when the command runs."""

    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return it, or say that it is a usage error."""
        try:
            moment_ms(str(value), now_ms=0)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        return str(value)
