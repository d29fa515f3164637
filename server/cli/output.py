"""Print rows for people or for programs.

``table``  on a terminal with lines and colour, else aligned columns; ``json`` the server's own
document; ``name`` one id per line, for the next command of a pipe.

Texts of devices come this way (sites, features, warnings): no character of them moves a cursor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import click

P_LEAST: Final = 1e-9
LAST_MIN: Final = 30  # columns that the last cell of a row needs on a terminal

F = TypeVar("F", bound=Callable[..., Any])
Row = Mapping[str, Any]
Column = tuple[str, Callable[[Any], str]]
"""Heading, and the text of a row's cell."""


def output_option(*formats: str) -> Callable[[F], F]:
    """Return the option ``-o``; the first format is the default."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="What to print.",
    )


def rows(found: Sequence[Row], columns: Sequence[Column], *, empty: str) -> None:
    """Print rows as a table; with none, say so on stderr."""
    if not found:
        say(empty)
        return
    cells = [[_line(text(row)) for _, text in columns] for row in found]
    headings = [heading for heading, _ in columns]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        # Long texts stand in the last column, which is folded; no number or time is cut short.
        if sum(widths[:-1]) + 2 * len(widths) + min(widths[-1], LAST_MIN) <= console.width:
            table = Table(box=None, header_style="bold", pad_edge=False)
            for heading in headings:
                table.add_column(heading, no_wrap=heading != headings[-1])
            for line in cells:
                table.add_row(*(Text(cell) for cell in line))
            console.print(table)
            return
    for line in [[heading.upper() for heading in headings], *cells]:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def document(found: Any) -> None:
    """Print a document as JSON."""
    click.echo(json.dumps(found, indent=2))


def names(found: Sequence[str]) -> None:
    """Print one name per line."""
    for name in found:
        click.echo(_line(name))


def say(text: str) -> None:
    """Tell a person something that is not data, in one line."""
    click.echo(_line(text), err=True)


def moment(unix_ms: int | None) -> str:
    """Return a time in UTC, or "never"."""
    if unix_ms is None:
        return "never"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def percent(share: float | None) -> str:
    """Return a share in percent; "–" when it is not known."""
    return "–" if share is None else f"{100 * share:.1f} %"


def chance(p_value: float) -> str:
    """Return a p-value; what is less likely than 1e-9 is told as no more than that."""
    return f"{p_value:.2g}" if p_value >= P_LEAST else f"below {P_LEAST:g}"


def _line(text: str) -> str:
    """Return text as one line without what steers a terminal or turns a line round."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text.replace("\n", " "))
