"""A command group that loads a command's module when the command is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from ... import ShoalError
from .failure import Failure


class LazyGroup(click.Group):
    """Commands by name: (module beside this one, help); the command is named as its module."""

    def __init__(
        self, *args: Any, commands_lazy: Mapping[str, tuple[str, str]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = commands_lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order in which they were given."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in self._lazy:
            return None
        module = importlib.import_module(f".{self._lazy[cmd_name][0]}", __package__)
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error that the product raised on purpose is told, not traced."""
        try:
            return super().invoke(ctx)
        except ShoalError as exc:
            raise Failure(exc) from exc
