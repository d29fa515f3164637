"""Say on one page what a machine is, what holds it back, and what to do about it.

Pure: board, readings and backend findings in, text out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .board import Board
from .sensors import Readings, Throttle

WIDTH = 80
_LABEL = 16  # columns of the names at the left, with their indent
_MIB = 1 << 20
MEMORY_BYTES_LOW = 128 * _MIB  # one session of a small model with Python takes half of it
DISK_BYTES_LOW = 256 * _MIB  # two slots of a large model
TEMP_C_NEAR = 5.0  # a board under load climbs this much in a minute
FAST_SHARE = 0.9  # CPUs within 10 % of the fastest count as fast


class Backend(Protocol):
    """What a probe found out about one backend."""

    @property
    def name(self) -> str:
        """E.g. "openvino"."""

    @property
    def state(self) -> str:
        """One of "ready", "missing", "broken"."""

    @property
    def detail(self) -> str:
        """Version, or what it needs."""

    @property
    def devices(self) -> Sequence[str]:
        """What it can run on."""


def cpu_span(cpus: Sequence[int]) -> str:
    """Write a list of CPUs as the kernel does.

    >>> cpu_span((0, 1, 2, 5))
    '0-2,5'
    """
    spans: list[list[int]] = []
    for cpu in cpus:
        if spans and cpu == spans[-1][1] + 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def size(count_bytes: int) -> str:
    """Write a size, e.g. "7.6 GiB"; below a GiB in whole MiB."""
    if count_bytes >= 1 << 30:
        return f"{count_bytes / (1 << 30):.1f} GiB"
    return f"{count_bytes / _MIB:.0f} MiB"


def advice(board: Board, readings: Readings, backends: Sequence[Backend] = ()) -> tuple[str, ...]:
    """Return what an operator should know or do, the most urgent first; empty if all is well."""
    return (
        *_heat(readings),
        *(one.problem for one in board.accelerators if one.problem),
        *_limits(board, readings),
        *_cpus(board, readings),
        *_int8(board),
        *_unreadable(readings),
        *_space(readings),
        *(
            f"backend {one.name} is broken: {one.detail}"
            for one in backends
            if one.state == "broken"
        ),
    )


def _int8(board: Board) -> list[str]:
    if board.machine != "x86_64" or any("vnni" in each for each in board.isa):
        return []
    return [
        "no VNNI: ONNX Runtime's sums of int8 products saturate with 8-bit weights, and answers "
        "may be wrong; quantize to 7 bits (reduce_range), and try models with golden vectors"
    ]


def _heat(readings: Readings) -> list[str]:
    found = []
    now = [one.reason for one in readings.throttles if one.now]
    if now:
        found.append(f"throttled now: {', '.join(now)}: do not trust a trial until this is over")
    if any(one.reason == "undervoltage" for one in readings.throttles):
        found.append(
            "undervoltage: use the maker's power supply and a short cable, and feed USB devices "
            "from a hub of their own"
        )
    past = [one.reason for one in readings.throttles if not one.now and one.reason not in now]
    if past:
        found.append(f"since boot: {', '.join(past)}: look at cooling and power supply")
    for one in readings.temperatures:
        if one.limit_c is not None and not now and one.temp_c >= one.limit_c - TEMP_C_NEAR:
            found.append(
                f"{one.name} is at {one.temp_c:.0f} °C, its limit is {one.limit_c:.0f} °C: "
                "it will slow down under load"
            )
    return found


def _limits(board: Board, readings: Readings) -> list[str]:
    found = []
    quota, usable = board.limits.cpu_quota, board.cpus_usable
    if quota is not None and quota < len(usable):
        found.append(f"cgroup allows {quota:g} CPU: use threads={board.threads_max}")
    if len(usable) < len(board.cpus_online):
        found.append(
            f"only CPU {cpu_span(usable)} of {len(board.cpus_online)} is allowed: "
            f"use threads={board.threads_max} at most"
        )
    limit = board.limits.memory_bytes_max
    if limit is not None:
        left = readings.memory_bytes_available
        rest = "" if left is None else f", {size(left)} are left"
        found.append(f"cgroup allows {size(limit)} of memory{rest}: beyond it the agent is killed")
    if board.user_bits == 32 and board.machine in ("aarch64", "x86_64"):
        found.append(
            f"this Python is 32-bit on a 64-bit kernel ({board.machine}): runtimes ship no such "
            "wheels; install a 64-bit system"
        )
    return found


def _cpus(board: Board, readings: Readings) -> list[str]:
    found = []
    speeds = [(one.capacity or one.freq_mhz_max or 0, one.cpus) for one in board.clusters]
    most = max((speed for speed, _ in speeds), default=0)
    fast = [cpu for speed, cpus in speeds if speed >= most * FAST_SHARE for cpu in cpus]
    fast = [cpu for cpu in fast if cpu in board.cpus_usable]
    if most and 0 < len(fast) < min(len(board.cpus_usable), board.threads_max):
        found.append(
            f"CPU {cpu_span(fast)} is faster than the others: use threads={len(fast)} at most, "
            "or the slow ones hold the others up"
        )
    if board.x86_level in (1, 2):
        found.append(
            f"no AVX2 (x86-64-v{board.x86_level}): vector code runs at half width; let "
            "`shoal-agent trial` choose between fp32 and int8"
        )
    if "asimd" in board.isa and "dotprod" not in board.isa:
        found.append(
            "no dotprod instructions: int8 gains little over fp32 on some models; let "
            "`shoal-agent trial` choose"
        )
    # intel_pstate's and amd-pstate's "powersave" scales with load; elsewhere it is the slowest.
    slow = [one for one in readings.clocks if one.governor == "powersave"]
    if slow and board.x86_level == 0:
        cpus = cpu_span(sorted(cpu for one in slow for cpu in one.cpus))
        found.append(f"governor powersave keeps CPU {cpus} at its slowest: use schedutil")
    return found


def _unreadable(readings: Readings) -> list[str]:
    if any(one.path.endswith("/energy_uj") for one in readings.unknown) and not readings.energies:
        return [
            "energy counters cannot be read: trials will not know the energy; let the agent's "
            "group read /sys/class/powercap/*/energy_uj"
        ]
    return []


def _space(readings: Readings) -> list[str]:
    found = []
    memory, disk = readings.memory_bytes_available, readings.disk_bytes_free
    if memory is not None and memory < MEMORY_BYTES_LOW:
        found.append(f"only {size(memory)} of memory are available")
    if disk is not None and disk < DISK_BYTES_LOW:
        found.append(f"only {size(disk)} are free at {readings.disk_path}: models may not fit")
    return found


@dataclass(slots=True)
class _Page:
    lines: list[str] = field(default_factory=list)

    def head(self, name: str) -> None:
        self.lines += [""] if self.lines else []
        self.lines.append(name)

    def row(self, name: str, text: str) -> None:
        label = f"  {name} ".ljust(_LABEL)
        self.lines += textwrap.wrap(
            _clean(text) or "-",
            WIDTH,
            initial_indent=_clean(label),
            subsequent_indent=" " * _LABEL,
            break_on_hyphens=False,
        )


def _clean(text: str) -> str:
    """Makers' and drivers' strings go to a terminal: no control characters, no broken text."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.replace("\n", " "))


def render(board: Board, readings: Readings, backends: Sequence[Backend] = ()) -> str:
    """Return the page, lines of 80 columns at most.

    Args:
        board: What the machine is.
        readings: What it measures now.
        backends: What was probed; empty prints that none were.
    """
    page = _Page()
    _board(page, board)
    _cpu(page, board, readings)
    _memory(page, board, readings)
    page.head("accelerators")
    for one in board.accelerators:
        access = "ok" if one.may_open else "no access"
        driver = f", driver {one.driver}" if one.driver else ""
        page.row(one.kind, f"{access}: {one.name}, {one.node or 'no device node'}{driver}")
    if not board.accelerators:
        page.row("none", "no device node and no driver of a known accelerator")
    _sensors(page, board, readings)
    page.head("backends")
    for backend in backends:
        detail = f": {backend.detail}" if backend.detail else ""
        on = f" ({', '.join(backend.devices)})" if backend.devices else ""
        page.row(backend.name, f"{backend.state}{detail}{on}")
    if not backends:
        page.row("none", "no backend was probed")
    page.head("advice")
    told = advice(board, readings, backends)
    for number, text in enumerate(told, 1):
        page.lines += textwrap.wrap(
            _clean(text),
            WIDTH,
            initial_indent=f"  {number}. ",
            subsequent_indent="     ",
            break_on_hyphens=False,
        )
    if not told:
        page.lines.append("  nothing to do")
    return "\n".join(page.lines)


def _board(page: _Page, board: Board) -> None:
    page.head("board")
    page.row("model", board.model or "unknown")
    page.row("kind", board.kind or "unknown")
    bits = f"{board.user_bits}-bit Python" if board.user_bits else ""
    system = [board.machine, board.kernel and f"Linux {board.kernel}", board.libc, bits]
    page.row("system", ", ".join(filter(None, system)) or "unknown")
    page.row("digest", board.digest)


def _cpu(page: _Page, board: Board, readings: Readings) -> None:
    page.head("cpu")
    uneven = len({one.capacity for one in board.clusters}) > 1
    for one in board.clusters:
        facts = [f"{len(one.cpus)} × {one.model or 'unknown CPU'}"]
        facts += [f"up to {one.freq_mhz_max} MHz"] if one.freq_mhz_max else []
        facts += [f"speed {one.capacity} of 1024"] if one.capacity and uneven else []
        page.row("CPU", f"{cpu_span(one.cpus)}: {', '.join(facts)}")
    offline = board.cpus_possible_count - len(board.cpus_online)
    if offline:
        page.row("offline", f"{offline} of {board.cpus_possible_count}")
    level = f" (x86-64-v{board.x86_level})" if board.x86_level else ""
    page.row("instructions", " ".join(board.isa) + level)
    for clock in readings.clocks:
        if clock.freq_mhz:
            most = f" of {clock.freq_mhz_max}" if clock.freq_mhz_max else ""
            governor = f", {clock.governor}" if clock.governor else ""
            page.row(
                "clock now", f"CPU {cpu_span(clock.cpus)}: {clock.freq_mhz}{most} MHz{governor}"
            )


def _memory(page: _Page, board: Board, readings: Readings) -> None:
    page.head("memory and limits")
    facts = [size(board.memory_bytes) if board.memory_bytes else "unknown"]
    if readings.memory_bytes_available is not None:
        facts.append(f"{size(readings.memory_bytes_available)} available")
    if readings.swap_bytes_free:
        facts.append(f"{size(readings.swap_bytes_free)} of swap free")
    page.row("memory", ", ".join(facts))
    limits = board.limits
    if limits.version:
        quota = "no CPU limit" if limits.cpu_quota is None else f"{limits.cpu_quota:g} CPU"
        most = limits.memory_bytes_max
        memory = "no memory limit" if most is None else f"{size(most)} of memory"
        high = limits.memory_bytes_high
        slowed = "" if high is None else f", slowed from {size(high)}"
        page.row("cgroup", f"v{limits.version}: {quota}, {memory}{slowed}")
    page.row("for us", f"CPU {cpu_span(board.cpus_usable)}, threads up to {board.threads_max}")
    if readings.disk_bytes_free is not None:
        page.row("disk", f"{size(readings.disk_bytes_free)} free at {readings.disk_path}")


def _throttles(throttles: Sequence[Throttle]) -> str:
    now = [one.reason for one in throttles if one.now]
    past = [one.reason for one in throttles if not one.now]
    parts = [f"now: {', '.join(now)}"] if now else []
    parts += [f"since boot: {', '.join(past)}"] if past else []
    return "; ".join(parts) or "none seen"


def _sensors(page: _Page, board: Board, readings: Readings) -> None:
    page.head("sensors")
    for one in readings.temperatures[:4]:
        limit = "" if one.limit_c is None else f", limit {one.limit_c:.0f} °C"
        page.row("heat", f"{one.temp_c:.1f} °C {one.name}{limit}")
    if len(readings.temperatures) > 4:
        page.row("", f"{len(readings.temperatures) - 4} more, cooler")
    for power in readings.powers:
        page.row("power", f"{power.power_w:.2f} W {power.name}")
    for energy in readings.energies:
        page.row("energy", f"counter {energy.name}")
    page.row("throttling", _throttles(readings.throttles))
    if readings.load_1min is not None:
        page.row("load", f"{readings.load_1min:.2f} over a minute")
    reasons: dict[str, list[str]] = {}
    for unknown in dict.fromkeys((*board.unknown, *readings.unknown)):
        reasons.setdefault(unknown.reason, []).append(unknown.path)
    for reason, paths in reasons.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        page.row("unknown", f"{reason}: {paths[0]}{more}")
