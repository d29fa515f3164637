"""Read what changes on a machine: heat, power, throttling, clocks, memory, load, disk.

One reading costs some hundred small files, milliseconds on a board; a sensor that sleeps, hangs on
its bus or reports nonsense is listed as unknown and never raises.

Source: kernel documentation, hwmon/sysfs-interface.rst, driver-api/thermal/sysfs-api.rst,
power/powercap/powercap.rst, admin-guide/pm/cpufreq.rst; Raspberry Pi documentation, vcgencmd
get_throttled.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .board import meminfo_bytes
from .cgroup import memory_bytes_left
from .tree import Tree, Unknown

TEMP_C_MIN, TEMP_C_MAX = -60.0, 200.0  # beyond, a sensor that is off or not connected
POWER_W_MAX = 10_000.0

# Bits of the firmware's word: the low half is now, the same bit 16 higher is since boot.
THROTTLED_BITS = {
    0: "undervoltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
# Rails that carry the whole board, by board generation.
RAILS_TOTAL = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0")
# Cooling devices that slow a processor down; a fan or a charger's limit does not.
COOLING_SLOWS = ("cpufreq", "thermal-cpufreq", "thermal-devfreq", "devfreq", "processor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """One sensor's temperature."""

    name: str
    temp_c: float
    limit_c: float | None
    """From here on the kernel slows the machine down, or stops it if it has no slower step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Power of one rail or device."""

    name: str
    power_w: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """A counter of energy; two readings make a power, see :func:`mean_power_w`."""

    name: str
    energy_j: float
    energy_j_wrap: float
    """The counter starts again at 0 after this; 0 if it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    """One way in which the machine is, or was, slower than it could be."""

    source: str
    """Who says so: "firmware", "cpu", "cpufreq", a cooling device's name."""
    reason: str
    """E.g. "undervoltage"."""
    now: bool
    """It holds now; else it happened since boot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Clock of CPUs that share one."""

    cpus: tuple[int, ...]
    freq_mhz: int | None
    """Now; a CPU that has nothing to do is slow, which is not throttling."""
    freq_mhz_limit: int | None
    """Allowed now, by policy or heat."""
    freq_mhz_max: int | None
    """What the hardware can."""
    governor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """One reading of everything; what a machine does not measure is empty or None."""

    at_s: float
    """When, on the monotonic clock, in seconds."""
    temperatures: tuple[Temperature, ...]
    """The hottest first."""
    powers: tuple[Power, ...]
    energies: tuple[Energy, ...]
    throttles: tuple[Throttle, ...]
    """What holds now first."""
    clocks: tuple[Clock, ...]
    memory_bytes_available: int | None
    """What can be had without swapping and within the group's limit, in bytes."""
    swap_bytes_free: int | None
    load_1min: float | None
    """Tasks that run or wait, mean of a minute."""
    disk_path: str
    disk_bytes_free: int | None
    """For this user on the file system that holds disk_path, in bytes."""
    unknown: tuple[Unknown, ...]

    @property
    def temp_c_max(self) -> float | None:
        """The hottest sensor."""
        return self.temperatures[0].temp_c if self.temperatures else None

    @property
    def power_w(self) -> float | None:
        """Power of the whole board, where a rail or the battery carries all of it."""
        for power in self.powers:
            if power.name.rpartition(" ")[2] in (*RAILS_TOTAL, "discharge"):
                return power.power_w
        return None

    @property
    def throttled_now(self) -> tuple[str, ...]:
        """Reasons that hold now."""
        return tuple(dict.fromkeys(one.reason for one in self.throttles if one.now))

    def to_dict(self) -> dict[str, Any]:
        """Return every reading in JSON's types."""
        facts = {
            **asdict(self),
            "temp_c_max": self.temp_c_max,
            "power_w": self.power_w,
            "throttled_now": self.throttled_now,
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain


class Sensors:
    """The sensors of a machine."""

    @staticmethod
    def read(root: Path = Path("/"), *, disk: Path = Path("/")) -> Readings:
        """Read everything once.

        Args:
            root: Where /proc and /sys are; another folder is a recorded board.
            disk: A path on the file system whose free space is asked for; on this machine.

        Returns:
            The readings; nothing is raised.
        """
        return Sensors.from_tree(Tree(root), disk=disk)

    @staticmethod
    def from_tree(tree: Tree, *, disk: Path = Path("/")) -> Readings:
        """Read everything once below an open tree."""
        clocks = _clocks(tree)
        available = meminfo_bytes(tree).get("MemAvailable")
        left = memory_bytes_left(tree)
        throttles = [
            *_firmware(tree),
            *_cooling(tree),
            *_capped(clocks),
            *_counted(tree),
        ]
        return Readings(
            at_s=time.monotonic(),
            temperatures=tuple(
                sorted(_temperatures(tree), key=lambda one: (-one.temp_c, one.name))
            ),
            powers=tuple(_powers(tree)),
            energies=tuple(_energies(tree)),
            throttles=tuple(sorted(throttles, key=lambda one: not one.now)),
            clocks=clocks,
            memory_bytes_available=min(
                (value for value in (available, left) if value is not None), default=None
            ),
            swap_bytes_free=meminfo_bytes(tree).get("SwapFree"),
            load_1min=_load(tree),
            disk_path=str(disk),
            disk_bytes_free=_disk_bytes_free(tree, disk),
            unknown=tree.unknown,
        )


def mean_power_w(before: Readings, after: Readings) -> dict[str, float]:
    """Return the mean power between two readings by counter, in watts.

    A counter that passed its end once is set right; one that jumped back otherwise, or is in one
    reading only, is left out.
    """
    elapsed_s = after.at_s - before.at_s
    if elapsed_s <= 0:
        return {}
    first = {one.name: one for one in before.energies}
    found = {}
    for one in after.energies:
        if one.name not in first:
            continue
        spent_j = one.energy_j - first[one.name].energy_j
        if spent_j < 0:
            spent_j += one.energy_j_wrap
        if spent_j >= 0 and spent_j / elapsed_s <= POWER_W_MAX:
            found[one.name] = spent_j / elapsed_s
    return found


def decode_throttled(word: int) -> tuple[Throttle, ...]:
    """Decode the Raspberry Pi firmware's word.

    >>> [(one.reason, one.now) for one in decode_throttled(0x50001)]
    [('undervoltage', True), ('throttled', False)]
    """
    found = []
    for bit, reason in THROTTLED_BITS.items():
        now, since_boot = word >> bit & 1, word >> (bit + 16) & 1
        if now or since_boot:
            found.append(Throttle(source="firmware", reason=reason, now=bool(now)))
    return tuple(found)


def _temp_c(tree: Tree, path: str) -> float | None:
    value = tree.integer(path)
    if value is None:
        return None
    if not TEMP_C_MIN <= value / 1000 <= TEMP_C_MAX:
        tree.broken(path, f"implausible: {value} m°C")
        return None
    return value / 1000


def _temperatures(tree: Tree) -> list[Temperature]:
    found = []
    for folder in tree.paths("/sys/class/thermal/thermal_zone*"):
        temp_c = _temp_c(tree, f"{folder}/temp")
        name = tree.text(f"{folder}/type") or folder.rpartition("/")[2]
        if temp_c is not None:
            found.append(Temperature(name=name, temp_c=temp_c, limit_c=_trip_c(tree, folder)))
    zones = {one.name.replace("_", "-") for one in found}
    for folder, device in _hwmon(tree):
        # The kernel mirrors most zones in hwmon, under the zone's name with underscores.
        if device.replace("_", "-") in zones:
            continue
        for path in tree.paths(f"{folder}/temp[0-9]*_input"):
            temp_c = _temp_c(tree, path)
            start = path.removesuffix("_input")
            if temp_c is None:
                continue
            label = tree.text(f"{start}_label")
            limits = [_temp_c(tree, f"{start}_{name}") for name in ("max", "crit")]
            # Chips without a limit often report 0, or their own maximum of 65261 °C.
            known = [limit for limit in limits if limit is not None and limit > 0]
            found.append(
                Temperature(
                    name=f"{device} {label}" if label else device,
                    temp_c=temp_c,
                    limit_c=min(known, default=None),
                )
            )
    return found


def _trip_c(tree: Tree, folder: str) -> float | None:
    trips: dict[str, list[float]] = {}
    for path in tree.paths(f"{folder}/trip_point_*_type"):
        temp_c = _temp_c(tree, path.removesuffix("_type") + "_temp")
        if temp_c is not None and temp_c > 0:  # 0 and below: a trip that is switched off
            trips.setdefault(tree.text(path) or "", []).append(temp_c)
    # The lowest passive trip starts the control loop, the highest is the temperature it keeps.
    if "passive" in trips:
        return max(trips["passive"])
    return min(trips.get("hot", []) + trips.get("critical", []), default=None)


def _hwmon(tree: Tree) -> list[tuple[str, str]]:
    return [
        (folder, tree.text(f"{folder}/name") or folder.rpartition("/")[2])
        for folder in tree.paths("/sys/class/hwmon/hwmon*")
    ]


def _power(tree: Tree, path: str, name: str, power_w: float) -> list[Power]:
    if not 0 <= power_w <= POWER_W_MAX:
        tree.broken(path, f"implausible: {power_w:g} W")
        return []
    return [Power(name=name, power_w=power_w)]


def _powers(tree: Tree) -> list[Power]:
    found = []
    for folder, device in _hwmon(tree):
        for kind in ("input", "average"):
            for path in tree.paths(f"{folder}/power[0-9]*_{kind}"):
                power_uw = tree.integer(path)
                label = tree.text(path.removesuffix(f"_{kind}") + "_label")
                if power_uw is not None:
                    name = f"{device} {label}" if label else device
                    found += _power(tree, path, name, power_uw / 1e6)
        if device.startswith("ina3221"):  # volts and amperes per rail, and no product of the two
            for path in tree.paths(f"{folder}/in[1-3]_input"):
                number = path.removesuffix("_input")[-1]
                millivolt = tree.integer(path)
                milliampere = tree.integer(f"{folder}/curr{number}_input")
                label = tree.text(f"{folder}/in{number}_label") or f"channel {number}"
                # "NC" is a channel that the board does not connect.
                if label != "NC" and millivolt is not None and milliampere is not None:
                    found += _power(tree, path, f"{device} {label}", millivolt * milliampere / 1e6)
    return found + _batteries(tree)


def _batteries(tree: Tree) -> list[Power]:
    found = []
    for folder in tree.paths("/sys/class/power_supply/*"):
        # A "Device" scope is a mouse's or a headset's battery.
        if tree.text(f"{folder}/type") != "Battery" or tree.text(f"{folder}/scope") == "Device":
            continue
        state = tree.text(f"{folder}/status")
        power_uw = tree.integer(f"{folder}/power_now")
        current_ua = tree.integer(f"{folder}/current_now")
        voltage_uv = tree.integer(f"{folder}/voltage_now")
        if power_uw is None and current_ua is not None and voltage_uv is not None:
            power_uw = current_ua * voltage_uv // 1_000_000
        if power_uw is not None and state in ("Discharging", "Charging"):
            # Some drivers sign the current by its direction.
            name = "battery discharge" if state == "Discharging" else "battery charge"
            found += _power(tree, folder, name, abs(power_uw) / 1e6)
    return found


def _energies(tree: Tree) -> list[Energy]:
    found = []
    for folder in tree.paths("/sys/class/powercap/*rapl:*"):
        energy_uj = tree.integer(f"{folder}/energy_uj")
        wrap_uj = tree.integer(f"{folder}/max_energy_range_uj") or 0
        name = tree.text(f"{folder}/name") or ""
        if energy_uj is not None:
            found.append(
                Energy(
                    name=f"{folder.rpartition('/')[2]} {name}".strip(),
                    energy_j=energy_uj / 1e6,
                    energy_j_wrap=wrap_uj / 1e6,
                )
            )
    return found


def _firmware(tree: Tree) -> list[Throttle]:
    found: list[Throttle] = []
    # Pi 4: soc/soc:firmware; Pi 5: soc@107c000000/soc@107c000000:firmware.
    for path in tree.paths("/sys/devices/platform/soc*/*:firmware/get_throttled"):
        word = tree.integer(path, base=16)
        if word is not None:
            found += decode_throttled(word)
    for folder, device in _hwmon(tree):
        known = any(one.reason == "undervoltage" and one.now for one in found)
        if device == "rpi_volt" and tree.integer(f"{folder}/in0_lcrit_alarm") == 1 and not known:
            found.append(Throttle(source="firmware", reason="undervoltage", now=True))
    return found


def _cooling(tree: Tree) -> list[Throttle]:
    found = []
    for folder in tree.paths("/sys/class/thermal/cooling_device*"):
        name = tree.text(f"{folder}/type") or ""
        if not name.lower().startswith(COOLING_SLOWS):
            continue
        state, most = tree.integer(f"{folder}/cur_state"), tree.integer(f"{folder}/max_state")
        if state is not None and state > 0:
            reason = f"too hot: {name} at step {state}" + (f" of {most}" if most else "")
            found.append(Throttle(source=name, reason=reason, now=True))
    return found


def _clocks(tree: Tree) -> tuple[Clock, ...]:
    # One folder per CPU: the policy folders are newer than some boards' kernels.
    alike: dict[tuple[int | None, int | None, int | None, str], list[int]] = {}
    for folder in tree.paths("/sys/devices/system/cpu/cpu[0-9]*/cpufreq"):
        freq, limit, most = (
            _mhz(tree, f"{folder}/{name}")
            for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq")
        )
        cpu = int(folder.split("/")[-2].removeprefix("cpu"))
        governor = tree.text(f"{folder}/scaling_governor") or ""
        alike.setdefault((freq, limit, most, governor), []).append(cpu)
    return tuple(
        Clock(
            cpus=tuple(cpus),
            freq_mhz=freq,
            freq_mhz_limit=limit,
            freq_mhz_max=most,
            governor=governor,
        )
        for (freq, limit, most, governor), cpus in alike.items()
    )


def _mhz(tree: Tree, path: str) -> int | None:
    freq_khz = tree.integer(path)
    return round(freq_khz / 1000) if freq_khz is not None and freq_khz > 0 else None


def _capped(clocks: tuple[Clock, ...]) -> list[Throttle]:
    found = []
    for clock in clocks:
        limit, most = clock.freq_mhz_limit, clock.freq_mhz_max
        if limit is not None and most is not None and limit < most:
            numbers = f"{clock.cpus[0]}-{clock.cpus[-1]}" if len(clock.cpus) > 1 else clock.cpus[0]
            reason = f"CPU {numbers} capped at {limit} of {most} MHz"
            found.append(Throttle(source="cpufreq", reason=reason, now=True))
    return found


def _counted(tree: Tree) -> list[Throttle]:
    """Counters of events since boot: on x86 per core, on a Jetson per overcurrent alarm."""
    found = []
    for kind in ("core", "package"):
        counts = [
            tree.integer(path) or 0
            for path in tree.paths(
                f"/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/{kind}_throttle_count"
            )
        ]
        if most := max(counts, default=0):
            reason = f"{kind} too hot {most} times"
            found.append(Throttle(source="cpu", reason=reason, now=False))
    for folder, device in _hwmon(tree):
        if device == "soctherm_oc":
            for path in tree.paths(f"{folder}/oc[0-9]*_event_cnt"):
                if count := tree.integer(path):
                    alarm = path.rpartition("/")[2].removesuffix("_event_cnt")
                    reason = f"overcurrent {alarm} {count} times"
                    found.append(Throttle(source=device, reason=reason, now=False))
    return found


def _load(tree: Tree) -> float | None:
    text = tree.text("/proc/loadavg")
    try:
        return float(text.split()[0]) if text else None
    except (ValueError, IndexError):
        tree.broken("/proc/loadavg", "not a load")
        return None


def _disk_bytes_free(tree: Tree, disk: Path) -> int | None:
    if not tree.live:
        free = tree.fact("disk_bytes_free")
        return free if isinstance(free, int) else None
    try:
        found = os.statvfs(disk)
    except OSError as exc:
        tree.broken(str(disk), (exc.strerror or "unknown").lower())
        return None
    return found.f_bavail * found.f_frsize
