"""What this machine is: the facts that do not change while it runs.

    files below a root --Tree--> Board --digest--> key of everything that was measured on it

What changes (temperature, clocks, free memory) is in ``sensors.py``; what can run here is the
backends' to say.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import accelerators, cpu
from .accelerators import Accelerator
from .cgroup import Limits, read_limits
from .cpu import Cluster
from .tree import Tree, Unknown

# Every change of what `digest` covers, or how, throws away all cached trials: count it here.
DIGEST_VERSION = 1
# The total is what firmware and kernel leave, which differs by some MB from one kernel to the next.
_MEMORY_STEP_BYTES = 256 << 20

KINDS = (  # first match wins
    ("raspberrypi,5", "raspberry-pi-5"),
    ("brcm,bcm2712", "raspberry-pi-5"),
    ("raspberrypi,4", "raspberry-pi-4"),
    ("brcm,bcm2711", "raspberry-pi-4"),
    ("raspberrypi,", "raspberry-pi"),
    ("nvidia,tegra234", "jetson-orin"),
    ("nvidia,tegra194", "jetson-xavier"),
    ("nvidia,tegra", "jetson"),
    ("fsl,imx8mp", "imx8mp"),
    ("fsl,imx8", "imx8"),
    ("fsl,imx9", "imx9"),
    ("rockchip,rk3588", "rk3588"),
    ("rockchip,", "rockchip"),
    ("qcom,", "qualcomm"),
    ("ti,", "ti"),
    ("mediatek,", "mediatek"),
    ("amlogic,", "amlogic"),
    ("allwinner,", "allwinner"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One machine as one process sees it; a fact that could not be had is empty, 0 or None."""

    machine: str
    """Architecture of the kernel: "x86_64", "aarch64", "armv7l", "riscv64"; empty if unknown."""
    user_bits: int
    """Bits of this Python: 32 under a 64-bit kernel has no wheels of 64-bit runtimes; 0 unknown."""
    kind: str
    """Family that fits by its device tree, "pc" for a machine with DMI; empty if unknown."""
    model: str
    """What the maker calls it."""
    compatible: tuple[str, ...]
    """Device-tree names, the most specific first; empty on a PC."""
    cpus_online: tuple[int, ...]
    """Numbers of the CPUs that run."""
    cpus_possible_count: int
    """CPUs that the kernel could bring up."""
    clusters: tuple[Cluster, ...]
    """The online CPUs, alike by alike, the fastest first."""
    isa: tuple[str, ...]
    """Instructions that inference gains from and every CPU has, sorted."""
    x86_level: int
    """x86-64 micro-architecture level 1 to 4; 0 on other machines."""
    memory_bytes: int
    """What the kernel manages, in bytes; 0 if unknown."""
    limits: Limits
    """What this process may use of it."""
    kernel: str
    """Release, e.g. "6.6.51+rpt-rpi-v8"."""
    libc: str
    """E.g. "glibc 2.36"; empty if it does not say (musl)."""
    accelerators: tuple[Accelerator, ...]
    """Sorted by kind and node."""
    unknown: tuple[Unknown, ...]
    """What is there and could not be read."""

    @classmethod
    def read(cls, root: Path = Path("/")) -> Board:
        """Read the machine.

        Args:
            root: Where /proc, /sys, /dev and /etc are; another folder is a recorded board.

        Returns:
            The board. Files that are missing or broken leave their facts empty; nothing is raised.
        """
        return cls.from_tree(Tree(root))

    @classmethod
    def from_tree(cls, tree: Tree) -> Board:
        """Read the machine below an open tree, e.g. one that is recorded afterwards."""
        cpus = cpu.read_cpus_all(tree)
        compatible = _compatible(tree)
        return cls(
            machine=_machine(tree),
            user_bits=_user_bits(tree),
            kind=_kind(tree, compatible),
            model=_model(tree),
            compatible=compatible,
            cpus_online=cpus.online,
            cpus_possible_count=cpus.possible_count,
            clusters=cpus.clusters,
            isa=cpus.isa,
            x86_level=cpus.x86_level,
            memory_bytes=meminfo_bytes(tree).get("MemTotal", 0),
            limits=read_limits(tree),
            kernel=tree.text("/proc/sys/kernel/osrelease") or "",
            libc=_libc(tree),
            accelerators=accelerators.find(tree, compatible),
            unknown=tree.unknown,
        )

    @property
    def cpu_model(self) -> str:
        """The CPUs in a line, e.g. "4 × Cortex-A76 + 4 × Cortex-A55"."""
        return cpu.summary(self.clusters)

    @property
    def cpus_usable(self) -> tuple[int, ...]:
        """Online CPUs that cpuset and affinity leave this process."""
        left = tuple(sorted(set(self.cpus_online) & set(self.limits.cpus)))
        return left or self.cpus_online

    @property
    def threads_max(self) -> int:
        """Most threads that can run at once: never more than the quota pays for; at least 1.

        A thread beyond the quota does not merely wait: the whole group stops till the next period.
        """
        quota = self.limits.cpu_quota
        count = len(self.cpus_usable)
        return max(1, count if quota is None else min(count, int(quota)))

    @property
    def memory_bytes_usable(self) -> int:
        """What this process may use at most, in bytes; 0 if unknown."""
        limit = self.limits.memory_bytes_max
        return self.memory_bytes if limit is None else min(limit, self.memory_bytes or limit)

    @property
    def digest(self) -> str:
        """Key of what decides performance: equal boards run a model equally fast.

        Covers CPUs and their instructions, memory to 256 MiB, limits of this process, and kind,
        driver and access of accelerators. Leaves out names, kernel and libc versions, numbers of
        device nodes (they change between boots), and readings.

        Returns:
            16 hexadecimal digits.
        """
        memory = self.memory_bytes_usable + _MEMORY_STEP_BYTES // 2
        facts = {
            "version": DIGEST_VERSION,
            "machine": self.machine,
            "user_bits": self.user_bits,
            "kind": self.kind,
            "clusters": [
                [one.model, len(one.cpus), one.freq_mhz_max, one.capacity] for one in self.clusters
            ],
            "cpus_usable": [len(set(one.cpus) & set(self.cpus_usable)) for one in self.clusters],
            "cpu_quota": self.limits.cpu_quota,
            "isa": self.isa,
            "memory": memory // _MEMORY_STEP_BYTES,
            "accelerators": sorted(
                [one.kind, one.driver, one.may_open] for one in self.accelerators
            ),
        }
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return every fact in JSON's types, with the digest."""
        facts = {
            **asdict(self),
            "cpu_model": self.cpu_model,
            "cpus_usable": self.cpus_usable,
            "threads_max": self.threads_max,
            "memory_bytes_usable": self.memory_bytes_usable,
            "digest": self.digest,
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain


def meminfo_bytes(tree: Tree) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    found = {}
    for line in (tree.text("/proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if number.isdecimal() and unit == "kB":
            found[name] = int(number[:20]) << 10
    return found


def _machine(tree: Tree) -> str:
    if tree.live:
        return os.uname().machine
    return str(
        tree.fact("machine") or tree.text("/proc/sys/kernel/arch") or cpu.machine(tree) or ""
    )


def _user_bits(tree: Tree) -> int:
    if tree.live:
        return struct.calcsize("P") * 8
    bits = tree.fact("user_bits")
    return bits if bits in (32, 64) else 0


def _libc(tree: Tree) -> str:
    if not tree.live:
        return str(tree.fact("libc") or "")
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):  # musl knows no such name
        return ""


def _compatible(tree: Tree) -> tuple[str, ...]:
    text = tree.text("/proc/device-tree/compatible") or ""
    return tuple(filter(None, text.split("\0")))[:16]


def _model(tree: Tree) -> str:
    found = tree.text("/proc/device-tree/model")
    if found:
        return found
    names = [
        tree.text(f"/sys/class/dmi/id/{name}") or "" for name in ("sys_vendor", "product_name")
    ]
    # Makers that left the field to its default say nothing.
    named = [name for name in names if name and name.lower() not in _DMI_EMPTY]
    return " ".join(dict.fromkeys(named))


_DMI_EMPTY = ("to be filled by o.e.m.", "default string", "system manufacturer", "not specified")


def _kind(tree: Tree, compatible: tuple[str, ...]) -> str:
    for start, kind in KINDS:
        if any(name.startswith(start) for name in compatible):
            return kind
    return "pc" if tree.exists("/sys/class/dmi/id") else ""
