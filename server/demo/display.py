"""Show the demo's progress: a live list of steps on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

STEPS = (
    ("start", "Start server, broker and devices"),
    ("train", "Train a first model on the people it may see, quantize, sign"),
    ("deploy", "Roll it out to every device"),
    ("watch", "Watch: which devices drift, which lose accuracy"),
    ("learn", "Federated rounds on the devices' own labels"),
    ("gate", "Candidate against champion on held-out windows"),
    ("rollout", "Better model: canary wave of two, then all"),
    ("settle", "Drain, count, report"),
)


class Display(Protocol):
    """What the scenario tells the person who watches."""

    def begin(self, step: str) -> None:
        """Say that a step has begun; the one before is done."""

    def detail(self, text: str) -> None:
        """Replace the detail of the present step."""

    def note(self, text: str) -> None:
        """Say something once, such as that a process was started again."""

    def end(self, *, ok: bool) -> None:
        """Say that all is done, or that the present step failed."""


class Lines:
    """Plain lines, each with the seconds since the start; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start_s = time.monotonic()
        self._said = ""
        self._said_s = 0.0

    def begin(self, step: str) -> None:
        """Print the step."""
        number = [name for name, _ in STEPS].index(step) + 1
        self._print(f"[{number}/{len(STEPS)}] {dict(STEPS)[step]}")

    def detail(self, text: str) -> None:
        """Print the detail, at most every five seconds."""
        if text != self._said and time.monotonic() - self._said_s >= 5:
            self._print(f"      {text}")
            self._said = text
            self._said_s = time.monotonic()

    def note(self, text: str) -> None:
        """Print the note."""
        self._print(f"    ! {text}")

    def end(self, *, ok: bool) -> None:
        """Print the end."""
        self._print("loop closed" if ok else "loop did not close")

    def _print(self, text: str) -> None:
        took_s = time.monotonic() - self._start_s
        self._console.print(
            f"{took_s:6.1f}s  {text}", highlight=False, markup=False, soft_wrap=True
        )


@dataclass(slots=True)
class _Row:
    state: str = "waiting"
    detail: str = ""
    start_s: float = 0.0
    took_s: float = 0.0


class Steps:
    """A live list on a terminal: what is done, what runs, what is to come."""

    def __init__(self, console: Console) -> None:
        self._rows = {name: _Row() for name, _ in STEPS}
        self._now = ""
        self._notes: list[str] = []
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._render)
        self._live.start()

    def begin(self, step: str) -> None:
        """Mark the step before as done and this one as running."""
        self._finish("done")
        self._now = step
        self._rows[step].state = "running"
        self._rows[step].start_s = time.monotonic()

    def detail(self, text: str) -> None:
        """Show the detail behind the step."""
        if self._now:
            self._rows[self._now].detail = text

    def note(self, text: str) -> None:
        """Show the note below the list; the last three stay."""
        self._notes = [*self._notes, text][-3:]

    def end(self, *, ok: bool) -> None:
        """Leave the list as it is on the screen."""
        self._finish("done" if ok else "failed")
        self._live.stop()

    def _finish(self, state: str) -> None:
        if self._now and self._rows[self._now].state == "running":
            row = self._rows[self._now]
            row.state, row.took_s = state, time.monotonic() - row.start_s

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", width=7)
        for name, title in STEPS:
            row = self._rows[name]
            running = row.state == "running"
            mark = {
                "waiting": Text("·", style="dim"),
                "done": Text("✓", style="green"),
                "failed": Text("✗", style="red"),
            }
            took_s = time.monotonic() - row.start_s if running else row.took_s
            table.add_row(
                self._spinner if running else mark[row.state],
                Text(title, style="bold" if running else "dim" if row.state == "waiting" else ""),
                Text(f"{took_s:.1f} s" if took_s else "", style="dim"),
            )
            if row.detail and row.state != "waiting":
                table.add_row("", Text(row.detail, style="cyan" if running else "dim"), "")
        notes = [Text(f"! {note}", style="yellow") for note in self._notes]
        return Group(Text(""), table, *notes)
