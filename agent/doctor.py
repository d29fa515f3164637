"""The command `shoal-agent doctor`: what this machine is, and what holds it back."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from ..hw.doctor import Backend

_BACKENDS = "..hw.backends"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    text = "Say what this machine is, what it can run, and what holds it back."
    made = commands.add_parser("doctor", help=text, description=text)
    made.add_argument("-o", "--output", choices=("text", "json"), default="text")
    made.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write this board to FILE as well, without serial numbers, addresses or names",
    )
    made.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        help="read a recorded board that was laid out in this folder",
    )
    made.add_argument(
        "--disk", type=Path, default=Path("/"), help="say how much is free on this file system"
    )
    made.set_defaults(call=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    """Read the machine, print the page, and record the board if asked.

    Raises:
        RecordingError: The recording could not be written; the page was printed.
    """
    from ..hw import recording
    from ..hw.doctor import advice, render
    from ..hw.tree import Tree

    tree = Tree(arguments.root)
    board, readings = recording.read(tree, disk=arguments.disk)
    backends = _probe() if tree.live else ()
    if arguments.output == "json":
        page: dict[str, Any] = {
            "shoal": __version__,
            "board": board.to_dict(),
            "readings": readings.to_dict(),
            "backends": [
                {
                    "name": one.name,
                    "state": one.state,
                    "detail": one.detail,
                    "devices": list(one.devices),
                }
                for one in backends
            ],
            "advice": advice(board, readings, backends),
        }
        print(json.dumps(page, indent=1))
    else:
        print(render(board, readings, backends))
    if arguments.record is not None:
        recording.write(recording.record(tree, board, readings), arguments.record)
    return 0


def _probe() -> Sequence[Backend]:
    if importlib.util.find_spec(_BACKENDS, __package__) is None:
        return ()
    found: Sequence[Backend] = importlib.import_module(_BACKENDS, __package__).probe_all()
    return found
