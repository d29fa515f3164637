"""Print what a trial found: a table that fits 100 columns, JSON, and progress on a terminal."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, Self, TextIO

from ..hw.choice import MIB, Outcome, Result, Verdict
from .trial import Report

WIDTH: Final = 100
NAME_CHARS_MAX: Final = 10
NONE: Final = "-"

_HEAD: Final = (
    *("backend", "variant", "thr", "p50 µs", "p99 µs", "RAM MiB", "µJ", "error", "top-1"),
    *("fallback", "verdict"),
)
_TEXT: Final = (0, 1, len(_HEAD) - 1)  # columns that are words; the others are figures


def to_text(report: Report, *, kept: str = "") -> str:
    """Return the table, the choice with its why, and why the others are not chosen.

    Args:
        report: What was found.
        kept: File the choice is kept in; "" = it is not.
    """
    pairs = sorted(zip(report.rows, report.decision.verdicts, strict=True), key=_order)
    cells = [_HEAD, *(_cells(result, verdict) for result, verdict in pairs)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    lines = [
        *_wrapped("", f"{report.model}  {_bytes(report.size)}  sha256 {report.sha256[:16]}"),
        *_wrapped("compared with ", report.compared_with),
        "",
    ]
    for row in cells:
        line = "  ".join(
            text.ljust(width) if column in _TEXT else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(line.rstrip())
    lines.append("")
    choice = report.decision.choice
    for result, verdict in pairs:
        if verdict.word == "chosen":
            lines += _wrapped("chosen    ", f"{result.candidate}: {verdict.why}")
    if choice is None:
        lines.append("chosen    nothing")
    for verdict, results in _alike(pairs).items():
        if verdict.word != "chosen":
            names = ", ".join(str(each.candidate) for each in results)
            lines += _wrapped(f"{verdict.word:9} ", f"{names}: {verdict.why}")
    lines += _wrapped("kept      ", kept or "not kept")
    lines.append(
        f"took      {report.took_s:.1f} s; RAM is the peak on top of a bare interpreter, error is "
        "of the largest value"
    )
    return "\n".join(lines)


def to_json(report: Report) -> dict[str, Any]:
    """Return all figures in JSON's types; what is not known is null."""
    choice = report.decision.choice
    rows = [
        {**asdict(result), "error_rel": result.error_rel, "verdict": asdict(verdict)}
        for result, verdict in zip(report.rows, report.decision.verdicts, strict=True)
    ]
    return {
        "model": report.model,
        "sha256": report.sha256,
        "size_bytes": report.size,
        "board": report.board,
        "versions": dict(report.versions),
        "compared_with": report.compared_with,
        "rows": rows,
        "choice": choice.to_json() if choice else None,
        "took_s": round(report.took_s, 3),
    }


class Progress:
    """One line on a terminal that says what is being done; silent elsewhere. A context manager."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream.isatty() else None
        self._clock = clock
        self._start = clock()

    def say(self, text: str) -> None:
        """Replace the line."""
        if self._stream:
            line = plain(f"{self._clock() - self._start:4.1f} s  {text}")[: WIDTH - 1]
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def plain(text: str) -> str:
    """Return a text without what could steer a terminal: names come out of the model."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _cells(result: Result, verdict: Verdict) -> tuple[str, ...]:
    ram = None if result.ram_bytes is None else result.ram_bytes / MIB
    measured = bool(result.errors)
    error = _share(result.error_rel) if result.error_rel is not None else "differs"
    return (
        plain(result.candidate.backend)[:NAME_CHARS_MAX],
        plain(result.candidate.variant or NONE)[:NAME_CHARS_MAX],
        NONE if result.outcome is Outcome.ABSENT else str(result.candidate.threads),
        _figure(result.p50_us),
        _figure(result.p99_us),
        NONE if ram is None else f"{ram:.1f}",
        _figure(result.energy_uj),
        error if measured else NONE,
        NONE if result.top1 is None else f"{result.top1:.0%}",
        NONE if result.fallback is None else f"{result.fallback:.0%}",
        verdict.word,
    )


def _figure(value: float | None) -> str:
    if value is None:
        return NONE
    if value >= 1e6:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-3 else f"{value:.1%}"


def _bytes(size: int) -> str:
    return f"{size} B" if size < 10_000 else f"{size / 1024:.0f} KiB"


def _order(pair: tuple[Result, Verdict]) -> tuple[bool, float, str]:
    result, _ = pair
    return result.p99_us is None, result.p99_us or 0.0, str(result.candidate)


def _alike(pairs: list[tuple[Result, Verdict]]) -> dict[Verdict, list[Result]]:
    """Group the results that have the very same verdict."""
    found: dict[Verdict, list[Result]] = {}
    for result, verdict in pairs:
        found.setdefault(verdict, []).append(result)
    return found


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        plain(text), WIDTH, initial_indent=label, subsequent_indent=" " * len(label)
    )
