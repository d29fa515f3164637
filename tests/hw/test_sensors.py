"""Readings of recorded boards, and of files that lie. Kinds: vectors, properties, faults."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.hw import recording
from shoal.hw.doctor import WIDTH, render
from shoal.hw.sensors import Energy, Readings, Sensors, decode_throttled, mean_power_w
from shoal.hw.tree import TEXT_BYTES_MAX, Tree
from tests.hw.board_files import NAMES, laid_out, written

# board: hottest sensor, its temperature and limit in °C, board's power in W, throttled now,
# throttled since boot, files that cannot be read
FACTS: dict[
    str, tuple[tuple[str, float, float | None] | None, float | None, list[str], list[str], int]
] = {
    "container": (None, None, [], [], 0),
    "imx8m-plus": (
        ("cpu-thermal", 86.0, 85.0),
        None,
        ["too hot: cpufreq-cpu0 at step 1 of 2", "CPU 0-3 capped at 1200 of 1800 MHz"],
        [],
        0,
    ),
    "jetson-orin-nano": (
        ("cpu-thermal", 47.718, 99.0),
        5.008 * 1.144,
        [],
        ["overcurrent oc3 2 times"],
        3,
    ),
    "orange-pi-5": (("bigcore0-thermal", 45.307, None), None, [], [], 0),
    "raspberry-pi-4": (
        ("cpu-thermal", 62.322, 110.0),
        None,
        ["undervoltage", "throttled"],
        [],
        0,
    ),
    "raspberry-pi-5": (("cpu-thermal", 58.4, 110.0), None, [], ["soft temperature limit"], 0),
    "x86-gateway": (
        ("coretemp Core 2", 61.0, 105.0),
        None,
        [],
        ["core too hot 3 times", "package too hot 12 times"],
        1,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_board_measures_what_it_measured(name: str, tmp_path: Path) -> None:
    """A new file needs a row here."""
    readings = Sensors.read(laid_out(name, tmp_path))
    hottest, power_w, now, past, unknown_count = FACTS[name]
    if hottest is None:
        assert readings.temperatures == ()
        assert readings.temp_c_max is None
    else:
        first = readings.temperatures[0]
        assert (first.name, first.temp_c, first.limit_c) == hottest
        assert readings.temp_c_max == hottest[1]
    assert readings.power_w == (None if power_w is None else pytest.approx(power_w))
    assert list(readings.throttled_now) == now
    assert [one.reason for one in readings.throttles if not one.now] == past
    assert len(readings.unknown) == unknown_count
    assert readings.disk_bytes_free is not None
    assert readings.load_1min is not None


def test_a_group_limit_bounds_the_memory_that_is_left(tmp_path: Path) -> None:
    """27 GB are free on the host, 171 MiB in the group: caches that are idle count as free."""
    readings = Sensors.read(laid_out("container", tmp_path))
    assert readings.memory_bytes_available == 268435456 - (141557760 - 52428800)


def test_a_mirrored_zone_is_one_sensor(tmp_path: Path) -> None:
    """The kernel shows thermal zones in hwmon a second time."""
    readings = Sensors.read(laid_out("orange-pi-5", tmp_path))
    assert len(readings.temperatures) == 7


def test_a_fan_at_work_is_no_throttling(tmp_path: Path) -> None:
    """Nor is the offset of x86's thermal control; only what slows a processor counts."""
    root = laid_out("raspberry-pi-5", tmp_path)
    assert (root / "sys/class/thermal/cooling_device0/cur_state").read_text() == "1\n"
    assert Sensors.read(root).throttled_now == ()


@settings(deadline=None)
@given(st.integers(0, (1 << 20) - 1))
def test_every_firmware_bit_is_told_once(word: int) -> None:
    """Now wins over since boot; a word of zero says nothing."""
    found = decode_throttled(word)
    low, high = word & 0xF, word >> 16 & 0xF
    assert len(found) == (low | high).bit_count()
    assert sum(one.now for one in found) == low.bit_count()


def _counters(at_s: float, energy_j: float, wrap_j: float = 1000.0) -> Readings:
    blank = Sensors.read(Path("/nonexistent"))
    energy = Energy(name="package-0", energy_j=energy_j, energy_j_wrap=wrap_j)
    return replace(blank, at_s=at_s, energies=(energy,))


def test_two_readings_of_a_counter_make_a_power() -> None:
    """With one wrap set right, and nonsense left out."""
    assert mean_power_w(_counters(0, 100), _counters(2, 130)) == {"package-0": 15.0}
    assert mean_power_w(_counters(0, 990), _counters(2, 10)) == {"package-0": 10.0}
    assert mean_power_w(_counters(0, 990, 0), _counters(2, 10, 0)) == {}
    assert mean_power_w(_counters(2, 100), _counters(2, 130)) == {}
    assert mean_power_w(_counters(0, 0, 1e9), _counters(1, 1e8, 1e9)) == {}


def test_rails_batteries_and_counters_are_read_in_watts(tmp_path: Path) -> None:
    """Each driver has units of its own."""
    hwmon, battery = "/sys/class/hwmon/hwmon0", "/sys/class/power_supply/BAT0"
    rapl = "/sys/class/powercap/intel-rapl:0"
    mouse = "/sys/class/power_supply/hid-aa:bb:cc:dd:ee:ff-battery"
    files: dict[str, str | bytes] = {
        f"{hwmon}/name": "ucd9000\n",
        f"{hwmon}/power1_input": "2500000\n",
        f"{hwmon}/power1_label": "pout1\n",
        f"{battery}/type": "Battery\n",
        f"{battery}/status": "Discharging\n",
        f"{battery}/current_now": "-500000\n",
        f"{battery}/voltage_now": "12000000\n",
        f"{mouse}/type": "Battery\n",
        f"{mouse}/scope": "Device\n",
        f"{mouse}/status": "Discharging\n",
        f"{mouse}/power_now": "1000000\n",
        f"{rapl}/energy_uj": "1500000\n",
        f"{rapl}/max_energy_range_uj": "262143328850\n",
        f"{rapl}/name": "package-0\n",
    }
    readings = Sensors.read(written(tmp_path, files))
    found = [(one.name, one.power_w) for one in readings.powers]
    assert found == [("ucd9000 pout1", 2.5), ("battery discharge", 6.0)]
    assert readings.power_w == 6.0
    assert readings.energies == (
        Energy(name="intel-rapl:0 package-0", energy_j=1.5, energy_j_wrap=262143.32885),
    )


ZONE = "/sys/class/thermal/thermal_zone0"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a number: ''"),
        (b"N/A\n", "not a number: 'N/A'"),
        (b"\xff\xfe\n", "not a number"),
        (b"4_2\n", "not a number: '4_2'"),
        ("٤٢\n".encode(), "not a number"),
        (b"-273150\n", "implausible: -273150 m"),
        (b"9" * 30, "not a number"),
        (b"1" * (TEXT_BYTES_MAX + 1), "longer than"),
    ],
)
def test_a_sensor_that_lies_is_unknown(content: bytes, reason: str, tmp_path: Path) -> None:
    """With its reason, and the others are read."""
    other = "/sys/class/thermal/thermal_zone1/temp"
    files: dict[str, str | bytes] = {f"{ZONE}/temp": content, other: "42000\n"}
    readings = Sensors.read(written(tmp_path, files))
    assert [one.temp_c for one in readings.temperatures] == [42.0]
    assert [one.path for one in readings.unknown] == [f"{ZONE}/temp"]
    assert readings.unknown[0].reason.startswith(reason)


@pytest.mark.parametrize("what", ["pipe", "folder", "zero", "loop", "nowhere"])
def test_what_is_no_file_cannot_stop_a_reading(what: str, tmp_path: Path) -> None:
    """A pipe without a writer would be waited for for ever, /dev/zero never ends."""
    place = tmp_path / f"{ZONE}/temp".lstrip("/")
    place.parent.mkdir(parents=True)
    if what == "pipe":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    else:
        targets = {"zero": "/dev/zero", "loop": "temp", "nowhere": "/nonexistent/x"}
        place.symlink_to(targets[what])
    readings = Sensors.read(tmp_path)
    assert readings.temperatures == ()
    # A link to nowhere is an absent file, which is normal.
    reasons = {"loop": ["too many levels of symbolic links"], "nowhere": []}
    found = [one.reason for one in readings.unknown]
    assert found == reasons.get(what, ["not a regular file"])


def test_the_disk_that_is_asked_for_is_measured(tmp_path: Path) -> None:
    """On this machine; a path that is not there is unknown."""
    assert (Sensors.read(disk=tmp_path).disk_bytes_free or 0) > 0
    readings = Sensors.read(disk=tmp_path / "none")
    assert readings.disk_bytes_free is None
    assert str(tmp_path / "none") in [one.path for one in readings.unknown]


CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"-1", b"0", b"max", b"9223372036854775807", b"99999999999999999999", b"0-9"]),
    st.text("0123456789 -:,/\n\x1bkBmax", max_size=60).map(str.encode),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_the_files_hold_a_board_is_read_and_told(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No content raises, and the page fits a terminal and cannot command it."""
    root = laid_out(data.draw(st.sampled_from(NAMES)), tmp_path_factory.mktemp("board"))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for path in data.draw(st.lists(st.sampled_from(files), max_size=12)):
        path.write_bytes(data.draw(CONTENTS))
    tree = Tree(root)
    board, readings = recording.read(tree)
    page = render(board, readings)
    assert max(len(line) for line in page.split("\n")) <= WIDTH
    assert page.replace("\n", "").isprintable()
    assert len(board.digest) == 16
    recording.record(tree, board, readings)
