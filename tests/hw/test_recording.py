"""A recording is complete, says nothing of its owner, and cannot write where it likes."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.agent import doctor
from shoal.hw import recording
from shoal.hw.board import Board
from shoal.hw.errors import RecordingError
from shoal.hw.sensors import Sensors
from shoal.hw.tree import Tree
from tests.hw.board_files import BOARDS, NAMES, laid_out, written


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_of_a_board_is_that_board(name: str, tmp_path: Path) -> None:
    """Recorded again from its folder, laid out again, read again: the same facts."""
    tree = Tree(laid_out(name, tmp_path / "a"))
    board, readings = recording.read(tree)
    file = tmp_path / "again.json"
    recording.write(recording.record(tree, board, readings), file)
    root = recording.unpack(file, tmp_path / "b")
    assert Board.read(root) == board
    assert replace(Sensors.read(root), at_s=readings.at_s) == readings


def test_this_machine_can_be_recorded(tmp_path: Path) -> None:
    """All of it but what names it; limits, instructions and the digest survive."""
    tree = Tree(Path("/"))
    board, readings = recording.read(tree)
    file = tmp_path / "this.json"
    recording.write(recording.record(tree, board, readings), file)
    again = Board.read(recording.unpack(file, tmp_path / "root"))
    assert again.digest == board.digest
    assert replace(again, unknown=()) == replace(board, unknown=())


def test_nothing_in_a_recording_names_the_machine_or_its_owner(tmp_path: Path) -> None:
    """Serial number, MAC addresses, container and user names; other process data."""
    group = "/sys/fs/cgroup/user.slice/alice-secret"
    mouse = "/sys/class/power_supply/hid-aa:bb:cc:dd:ee:ff-battery"
    cpu = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\n"
    files: dict[str, str | bytes] = {
        "/proc/cpuinfo": cpu + "Serial\t\t: 100000000fe69593\nModel\t\t: Pi\n",
        "/proc/self/cgroup": "0::/user.slice/alice-secret\n",
        "/proc/self/status": "Name:\talice-agent\nPid:\t77\nCpus_allowed_list:\t0-3\n",
        "/sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        f"{group}/memory.max": "1073741824\n",
        f"{group}/cpu.max": "50000 100000\n",
        f"{mouse}/type": "Battery\n",
        f"{mouse}/scope": "System\n",
        f"{mouse}/status": "Discharging\n",
        f"{mouse}/power_now": "1000000\n",
    }
    tree = Tree(written(tmp_path / "a", files))
    board, readings = recording.read(tree)
    found = recording.record(tree, board, readings)
    text = json.dumps(found)
    for secret in ("fe69593", "alice", "aa:bb", "Pid"):
        assert secret not in text
    recording.write(found, tmp_path / "b.json")
    again = Board.read(recording.unpack(tmp_path / "b.json", tmp_path / "b"))
    assert again.limits == board.limits
    assert (again.limits.cpu_quota, again.limits.memory_bytes_max) == (0.5, 1 << 30)
    assert again.limits.cpus == (0, 1, 2, 3)


def _changed(tmp_path: Path, **changes: Any) -> Path:
    found = json.loads((BOARDS / "container.json").read_text())
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(found | changes))
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"/../escaped": "x"}},
        {"files": {"escaped": "x"}},
        {"files": {"/a/../../escaped": "x"}},
        {"files": {"/a\0b": "x"}},
        {"files": {"/a": 1}},
        {"files": {"/a": "x", "/a/b": "y"}},
        {"files": []},
        {"folders": ["/../escaped"]},
        {"nodes": {"/../escaped": {}}},
        {"format": "shoal board 0"},
        {"files": {f"/{number}": "" for number in range(recording.FILES_MAX + 1)}},
    ],
)
def test_a_hostile_recording_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """Users send boards to us: nothing is written outside the target."""
    target = tmp_path / "deep" / "target"
    with pytest.raises(RecordingError):
        recording.unpack(_changed(tmp_path, **changes), target)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 200_000, "\ud800"])
def test_what_is_no_recording_is_refused(text: str, tmp_path: Path) -> None:
    """Nor does deep nesting end the process."""
    file = tmp_path / "x.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecordingError):
        recording.unpack(file, tmp_path / "target")


def _run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["doctor", *argv])
    status: int = arguments.call(arguments)
    return status


def test_doctor_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page for people, the facts for programs, the file for us."""
    root = laid_out("raspberry-pi-4", tmp_path / "pi")
    file = tmp_path / "pi.json"
    assert _run("--root", str(root), "--record", str(file)) == 0
    page = capsys.readouterr().out
    for line in (
        "throttled now: undervoltage, throttled",
        "user is not in group plugdev: cannot open /dev/bus/usb/002/003",
        "4 × Cortex-A72, up to 1800 MHz",
    ):
        assert line in page
    assert Board.read(recording.unpack(file, tmp_path / "again")) == Board.read(root)

    assert _run("--root", str(root), "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["board"]["digest"] == Board.read(root).digest
    assert found["readings"]["throttled_now"] == ["undervoltage", "throttled"]
    assert found["board"]["accelerators"][0]["node"] == "/dev/bus/usb/002/003"


def test_a_recording_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the page, with a hint."""
    root = laid_out("container", tmp_path / "root")
    with pytest.raises(RecordingError) as caught:
        _run("--root", str(root), "--record", str(tmp_path / "none" / "x.json"))
    assert caught.value.hint
    assert "cgroup allows 0.5 CPU: use threads=1" in capsys.readouterr().out
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "folder", tmp_path / "file" / "x.json", Path("/")):
        with pytest.raises(RecordingError):
            _run("--root", str(root), "--record", str(place))
    assert not list(tmp_path.glob("*.part"))
