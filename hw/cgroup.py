"""What the control groups of this process allow: CPU time, CPUs, memory.

A limit on any ancestor holds for the group, so each is the least on the way up. Where the path in
/proc/self/cgroup is the host's and the mount is the container's own, nothing is found below it and
the walk ends at the mount's root, which is then the container's group.

Source: kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from .tree import Tree

MOUNT = "/sys/fs/cgroup"
DEPTH_MAX = 32  # levels walked; kubernetes in docker in a user slice has about ten
CPUS_MAX = 4096  # what one kernel can be built for
# "No limit" in v1 is the largest page-aligned number; no device has an EiB.
_NO_LIMIT = 1 << 60
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this process may use; None is no limit."""

    cpu_quota: float | None = None
    """CPU seconds per second, from the bandwidth controller; > 0."""
    cpus: tuple[int, ...] = ()
    """CPUs that its cpuset and its affinity leave; empty if unknown."""
    memory_bytes_max: int | None = None
    """Memory of its group, in bytes; beyond it a process of the group is killed."""
    memory_bytes_high: int | None = None
    """Memory beyond which the group is slowed down, in bytes."""
    version: int = 0
    """1 or 2; 0 if no control group is mounted."""


def cpu_list(text: str) -> tuple[int, ...]:
    """Read the kernel's list of CPUs.

    Raises:
        ValueError: It is not such a list, or names a CPU from 4096 on.

    >>> cpu_list("0-2,5")
    (0, 1, 2, 5)
    """
    found: set[int] = set()
    for span in filter(None, text.strip().split(",")):
        ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", span)
        low, high = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not low <= high < CPUS_MAX:
            raise ValueError(f"not a list of CPUs: {text[:20]!r}")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def read_cpus(tree: Tree, path: str) -> tuple[int, ...]:
    """Return the CPUs that a file lists, empty if there is no such file or it makes no sense."""
    text = tree.text(path)
    if text is None:
        return ()
    try:
        return cpu_list(text)
    except ValueError as exc:
        tree.broken(path, str(exc))
        return ()


def allowed_cpus(tree: Tree) -> tuple[int, ...]:
    """Return the CPUs that this process may run on: cpuset and affinity together."""
    for line in (tree.text("/proc/self/status") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "Cpus_allowed_list":
            try:
                return cpu_list(value)
            except ValueError as exc:
                tree.broken("/proc/self/status", str(exc))
    return ()


def read_limits(tree: Tree) -> Limits:
    """Return the limits of this process."""
    groups = _groups(tree)
    version = 0
    if tree.exists(f"{MOUNT}/cgroup.controllers") or tree.exists(f"{MOUNT}/unified"):
        version = 2
    if any(name in groups for name in ("cpu", "memory", "cpuset")):
        version = 1  # also on a hybrid: the controllers that limit us are v1's there
    return Limits(
        cpu_quota=_least(_quotas(tree, groups)),
        cpus=allowed_cpus(tree),
        memory_bytes_max=_least(_memory(tree, groups, "memory.max", "memory.limit_in_bytes")),
        memory_bytes_high=_least(_memory(tree, groups, "memory.high", None)),
        version=version,
    )


def memory_bytes_left(tree: Tree) -> int | None:
    """Return what the group's limit still leaves, in bytes, or None without a limit.

    Pages of files that are not in use count as free: the kernel takes them back first.
    """
    groups = _groups(tree)
    left = []
    for v1, names in (
        (False, ("memory.max", "memory.current", "inactive_file")),
        (True, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        for folder in _ancestors(tree, groups, "memory" if v1 else ""):
            limit = _bytes(tree, f"{folder}/{names[0]}")
            used = _bytes(tree, f"{folder}/{names[1]}")
            if limit is None or used is None:
                continue
            idle = 0
            for line in (tree.text(f"{folder}/memory.stat") or "").splitlines():
                name, _, value = line.partition(" ")
                if name == names[2] and value.isdecimal():
                    idle = int(value[:20])
            left.append(max(0, limit - max(0, used - idle)))
    return min(left, default=None)


def _groups(tree: Tree) -> dict[str, str]:
    """Path of this process by controller; "" is v2."""
    found: dict[str, str] = {}
    for line in (tree.text("/proc/self/cgroup") or "").splitlines()[:64]:
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or not number.isdecimal():
            tree.broken("/proc/self/cgroup", f"not a control group: {line[:20]!r}")
            continue
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _ancestors(tree: Tree, groups: dict[str, str], controller: str) -> Iterator[str]:
    """Folders of the process's group and of all above it, the group first."""
    if controller not in groups:
        return
    mounts = (f"{MOUNT}/{controller}", f"{MOUNT}/cpu,cpuacct") if controller else (MOUNT,)
    if not controller and not tree.exists(f"{MOUNT}/cgroup.controllers"):
        mounts = (f"{MOUNT}/unified",)
    mount = next((mount for mount in mounts if tree.exists(mount)), None)
    if mount is None:
        return
    # "/../x" is a group outside our namespace: its folders cannot be seen from here.
    parts = [part for part in groups[controller].split("/") if part and part not in ("..", ".")]
    for depth in range(min(len(parts), DEPTH_MAX), -1, -1):
        yield "/".join([mount, *parts[:depth]])


def _quotas(tree: Tree, groups: dict[str, str]) -> Iterator[float]:
    for folder in _ancestors(tree, groups, ""):
        text = tree.text(f"{folder}/cpu.max")
        if text is None or text.startswith("max"):
            continue
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(quota[:20]) and int(period[:20]):
            yield int(quota[:20]) / int(period[:20])
        else:
            tree.broken(f"{folder}/cpu.max", f"not a quota: {text[:20]!r}")
    for folder in _ancestors(tree, groups, "cpu"):
        quota_us = tree.integer(f"{folder}/cpu.cfs_quota_us")
        period_us = tree.integer(f"{folder}/cpu.cfs_period_us")
        if quota_us is not None and period_us is not None and quota_us > 0 and period_us > 0:
            yield quota_us / period_us


def _memory(tree: Tree, groups: dict[str, str], v2: str, v1: str | None) -> Iterator[int]:
    for folder in _ancestors(tree, groups, ""):
        limit = _bytes(tree, f"{folder}/{v2}")
        if limit is not None:
            yield limit
    for folder in _ancestors(tree, groups, "memory") if v1 else ():
        limit = _bytes(tree, f"{folder}/{v1}")
        if limit is not None:
            yield limit


def _bytes(tree: Tree, path: str) -> int | None:
    if tree.text(path) == "max":
        return None
    value = tree.integer(path)
    return value if value is not None and 0 <= value < _NO_LIMIT else None


def _least(values: Iterator[_Number]) -> _Number | None:
    return min(values, default=None)
