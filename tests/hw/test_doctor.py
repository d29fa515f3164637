"""Each piece of advice comes when it should, and only then. Kind: vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shoal.hw.board import Board
from shoal.hw.cgroup import Limits
from shoal.hw.doctor import WIDTH, advice, cpu_span, render, size
from shoal.hw.sensors import Clock, Readings, Sensors, Temperature
from shoal.hw.tree import Unknown
from tests.hw.board_files import NAMES, laid_out

WELL = "raspberry-pi-5"


@dataclass(frozen=True)
class Row:
    """A backend's finding."""

    name: str
    state: str
    detail: str
    devices: tuple[str, ...] = ()


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A board on which all is well."""
    return Board.read(laid_out(WELL, tmp_path / "board"))


@pytest.fixture
def readings(tmp_path: Path) -> Readings:
    """Its readings, with what happened before forgotten."""
    return replace(Sensors.read(laid_out(WELL, tmp_path / "readings")), throttles=())


def test_a_board_that_is_well_gets_no_advice(board: Board, readings: Readings) -> None:
    """Advice that always comes is not read."""
    assert advice(board, readings) == ()
    assert render(board, readings).endswith("advice\n  nothing to do")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"limits": Limits(cpu_quota=0.5)}, "cgroup allows 0.5 CPU: use threads=1"),
        ({"limits": Limits(cpu_quota=2.5)}, "cgroup allows 2.5 CPU: use threads=2"),
        ({"limits": Limits(cpus=(1, 2))}, "only CPU 1-2 of 4 is allowed: use threads=2"),
        ({"limits": Limits(memory_bytes_max=1 << 30)}, "cgroup allows 1.0 GiB of memory"),
        ({"user_bits": 32}, "this Python is 32-bit on a 64-bit kernel"),
        ({"isa": ("asimd",)}, "no dotprod instructions"),
        ({"x86_level": 2, "isa": ()}, "no AVX2 (x86-64-v2)"),
    ],
)
def test_what_the_board_lacks_is_told(
    changes: dict[str, object], words: str, board: Board, readings: Readings
) -> None:
    """One fact changed, one line more."""
    (told,) = advice(replace(board, **changes), readings)  # type: ignore[arg-type]
    assert told.startswith(words)


def test_a_quota_that_does_not_bind_is_not_told(board: Board, readings: Readings) -> None:
    """Four CPUs and a quota of four."""
    assert advice(replace(board, limits=Limits(cpu_quota=4.0)), readings) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_bytes_available": 100 << 20}, "only 100 MiB of memory are available"),
        ({"disk_bytes_free": 1 << 20}, "only 1 MiB are free at /"),
        (
            {"temperatures": (Temperature(name="cpu-thermal", temp_c=81.0, limit_c=85.0),)},
            "cpu-thermal is at 81 °C, its limit is 85 °C",
        ),
        (
            {
                "clocks": (
                    Clock(
                        cpus=(0, 1),
                        freq_mhz=600,
                        freq_mhz_limit=2400,
                        freq_mhz_max=2400,
                        governor="powersave",
                    ),
                )
            },
            "governor powersave keeps CPU 0-1 at its slowest",
        ),
        (
            {"unknown": (Unknown("/sys/class/powercap/intel-rapl:0/energy_uj", "denied"),)},
            "energy counters cannot be read",
        ),
    ],
)
def test_what_the_sensors_show_is_told(
    changes: dict[str, object], words: str, board: Board, readings: Readings
) -> None:
    """One reading changed, one line more."""
    (told,) = advice(board, replace(readings, **changes))  # type: ignore[arg-type]
    assert told.startswith(words)


def test_only_fast_cores_are_advised(tmp_path: Path) -> None:
    """On big.LITTLE; if the fast ones are not ours, there is nothing to advise."""
    root = laid_out("orange-pi-5", tmp_path)
    board, readings = Board.read(root), Sensors.read(root)
    told = [text for text in advice(board, readings) if "faster" in text]
    assert told[0].startswith("CPU 4-7 is faster than the others: use threads=4 at most")
    little = replace(board, limits=Limits(cpus=(0, 1, 2, 3)))
    assert not [text for text in advice(little, readings) if "faster" in text]


def test_backends_are_shown_and_broken_ones_advised(board: Board, readings: Readings) -> None:
    """A missing backend is no trouble: nobody has all."""
    rows = [
        Row("cpu", "ready", "onnxruntime 1.23.0"),
        Row("openvino", "broken", "libopenvino.so.2520: cannot open shared object file"),
        Row("qnn", "missing", "needs onnxruntime-qnn"),
        Row("hailo", "ready", "4.20", ("hailo0", "hailo1")),
    ]
    page = render(board, readings, rows)
    assert "  cpu           ready: onnxruntime 1.23.0\n" in page
    assert "  hailo         ready: 4.20 (hailo0, hailo1)\n" in page
    assert "  qnn           missing: needs onnxruntime-qnn\n" in page
    (told,) = advice(board, readings, rows)
    assert told.startswith("backend openvino is broken: libopenvino.so.2520")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_its_columns_and_holds_its_advice(name: str, tmp_path: Path) -> None:
    """On a serial console too."""
    root = laid_out(name, tmp_path)
    board, readings = Board.read(root), Sensors.read(root)
    page = render(board, readings)
    assert max(len(line) for line in page.split("\n")) <= WIDTH
    joined = " ".join(page.split())
    for text in advice(board, readings):
        assert text in joined


def test_makers_names_cannot_command_a_terminal(board: Board, readings: Readings) -> None:
    """A device tree or a USB label may hold an escape sequence."""
    page = render(replace(board, model="Pi\x1b]0;owned\x07\nadvice"), readings)
    assert "\x1b" not in page
    assert "Pi?]0;owned? advice" in page


def test_sizes_and_lists_are_short() -> None:
    """As people write them."""
    assert [size(7 << 30), size(512 << 20), size(0)] == ["7.0 GiB", "512 MiB", "0 MiB"]
    assert [cpu_span(()), cpu_span((3,)), cpu_span((0, 1, 3, 4))] == ["", "3", "0-1,3-4"]
