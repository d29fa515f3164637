"""Keep a board as one file, and lay it out again as a folder that ``Board.read`` takes for a root.

    machine --record--> JSON {path: text} --unpack--> folder

The file holds exactly what a reading of the board and its sensors looked at, so it is complete and
small. It leaves out what names the machine or its owner: serial numbers, MAC addresses, UUIDs, and
the names of control groups (containers and users have their names there). Host name, network and
files of the user are never read.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .board import Board
from .cgroup import MOUNT
from .errors import RecordingError
from .sensors import Readings, Sensors
from .tree import RECORDING, Tree

FORMAT = "shoal board 1"
BYTES_MAX = 8 << 20  # a recording of a server with 256 CPUs has 1 MB
FILES_MAX = 20_000

_MOUNTS = ("cpu", "cpu,cpuacct", "memory", "cpuset", "unified")
_SERIAL = re.compile(r"(?im)^(Serial\s*:).*$")
_MAC = re.compile(r"(?i)\b[0-9a-f]{2}([:-][0-9a-f]{2}){5}\b")
_UUID = re.compile(r"(?i)\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_ID = re.compile(r"(?i)\b[0-9a-f]{24,}\b")


def read(tree: Tree, *, disk: Path = Path("/")) -> tuple[Board, Readings]:
    """Read a board and its sensors through one tree, which can be recorded then."""
    return Board.from_tree(tree), Sensors.from_tree(tree, disk=disk)


def record(tree: Tree, board: Board, readings: Readings) -> dict[str, Any]:
    """Return the recording of a board that was just read through a tree.

    Returns:
        ``{"format", "process", "nodes", "errors", "folders", "files"}``: ``files`` maps a path to
        its text, as a list of lines if it has several; ``folders`` are paths that were found to
        exist and hold none of the files.
    """
    groups = _group_names(tree.seen.get("/proc/self/cgroup", ""))
    files = {}
    for path, text in tree.seen.items():
        # Of the process's own files, what a reading needs: the rest has its name and parents.
        if path == "/proc/self/status":
            text = "".join(re.findall(r"(?m)^Cpus_allowed_list:.*\n?", text))
        if path == "/proc/self/cgroup":
            text = _rename(text, groups)
        files[_scrub(_rename_path(path, groups))] = _lines(_scrub(text))
    nodes = {
        path: {"open": node.may_open, "group": node.group}
        for path, node in sorted(tree.nodes_seen.items())
    }
    errors = {
        _scrub(_rename_path(one.path, groups)): one.reason
        for one in tree.unknown
        if one.path not in tree.seen and one.path.startswith(("/proc/", "/sys/"))
    }
    held = {*files, *nodes, *errors}
    held |= {str(parent) for path in held for parent in PurePosixPath(path).parents}
    folders = {_scrub(_rename_path(path, groups)) for path in tree.found} - held
    return {
        "format": FORMAT,
        "process": {
            "machine": board.machine,
            "user_bits": board.user_bits,
            "libc": board.libc,
            "disk_bytes_free": readings.disk_bytes_free,
        },
        "nodes": nodes,
        "errors": errors,
        "folders": sorted(folders),
        "files": dict(sorted(files.items())),
    }


def write(recording: Mapping[str, Any], path: Path) -> None:
    """Write a recording as JSON, whole or not at all.

    Raises:
        RecordingError: The file cannot be written.
    """
    part = path.parent / f"{path.name}.part"
    try:
        part.write_text(json.dumps(recording, indent=1) + "\n", "utf-8")
        part.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            part.unlink()
        raise RecordingError(
            f"the recording cannot be written to {path}: {exc.strerror}",
            hint="name a file in a folder that this user may write to",
        ) from exc


def unpack(source: Path, target: Path) -> Path:
    """Lay a recording out as a folder.

    Args:
        source: File that ``write`` made; it may come from anybody.
        target: Folder that gets the files; nothing outside it is written.

    Returns:
        The target, to be given to ``Board.read`` and ``Sensors.read``.

    Raises:
        RecordingError: The file is not a recording, is too large, or names a path that leaves the
            target; the target may then hold a part of it.
    """
    try:
        if source.stat().st_size > BYTES_MAX:
            raise RecordingError(f"{source} is larger than {BYTES_MAX} bytes")
        found = json.loads(source.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise RecordingError(f"{source} cannot be read as a recording: {exc}") from exc
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RecordingError(f"{source} is not a recording: its format is not {FORMAT!r}")
    files, nodes, folders = found.get("files"), found.get("nodes", {}), found.get("folders", [])
    if not isinstance(files, dict) or not isinstance(nodes, dict) or not isinstance(folders, list):
        raise RecordingError(f"{source} is not a recording: it lacks its tables")
    if len(files) + len(nodes) + len(folders) > FILES_MAX:
        raise RecordingError(f"{source} holds more than {FILES_MAX} files")
    texts = {path: _text(source, path, lines) for path, lines in files.items()}
    head = {name: found.get(name, {}) for name in ("process", "nodes", "errors")}
    texts |= dict.fromkeys(nodes, "")
    texts["/" + RECORDING] = json.dumps(head)
    for path, text in texts.items():
        place = target / _inside(source, path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(text.encode("utf-8", "surrogateescape"))
        except (OSError, ValueError) as exc:
            raise RecordingError(f"{source}: {path!r} cannot be laid out: {exc}") from exc
    for path in folders:
        try:
            (target / _inside(source, str(path))).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise RecordingError(f"{source}: {path!r} cannot be laid out: {exc}") from exc
    return target


def _inside(source: Path, path: str) -> PurePosixPath:
    found = PurePosixPath(path)
    if not path.startswith("/") or ".." in found.parts or "\0" in path:
        raise RecordingError(f"{source}: {path[:80]!r} is not a path below a root")
    return found.relative_to("/")


def _lines(text: str) -> str | list[str]:
    lines = text.split("\n")
    return lines if len(lines) > 2 else text


def _text(source: Path, path: str, lines: object) -> str:
    if isinstance(lines, str):
        return lines
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        return "\n".join(lines)
    raise RecordingError(f"{source}: {path[:80]!r} is neither text nor lines")


def _scrub(text: str) -> str:
    text = _SERIAL.sub(r"\1 0", text)
    text = _MAC.sub("00:00:00:00:00:00", text)
    return _ID.sub("0", _UUID.sub("0", text))


def _group_names(text: str) -> dict[str, str]:
    """New names of the parts of control groups, in the order in which they stand."""
    parts = [part for line in text.splitlines() for part in line.split(":", 2)[-1].split("/")]
    kept = {"", ".", ".."}
    names = [part for part in dict.fromkeys(parts) if part not in kept]
    return {name: f"group{index}" for index, name in enumerate(names)}


def _rename(text: str, groups: Mapping[str, str]) -> str:
    found = []
    for line in text.split("\n"):
        *head, path = line.split(":", 2)  # a group's own name may hold a colon
        found.append(
            ":".join([*head, "/".join(groups.get(part, part) for part in path.split("/"))])
        )
    return "\n".join(found)


def _rename_path(path: str, groups: Mapping[str, str]) -> str:
    if not path.startswith(MOUNT + "/"):
        return path
    parts = path.removeprefix(MOUNT + "/").split("/")
    # The first part may be a controller's mount, and a group may have a controller's name.
    first = parts[0] if parts[0] in _MOUNTS else groups.get(parts[0], parts[0])
    return "/".join([MOUNT, first, *(groups.get(part, part) for part in parts[1:])])
