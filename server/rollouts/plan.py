"""Put devices into waves: the wished ones first, then a fair draw over their classes.

A wave of only the easy devices proves nothing for the others (hardware classes, sites), so each
wave holds each class in proportion. Within a class the order is a hash of rollout and device:
the same draw at every call, another one for every rollout.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..errors import InvalidError


def waves_of(waves: Sequence[int], *, devices: int, waves_max: int) -> list[int]:
    """Return cumulative device counts, strictly ascending; the last one is ``devices``.

    Args:
        waves: Counts as the operator gave them; none or a last 0 means all.
        devices: Devices in the rollout, at least 1.
        waves_max: Most waves.

    Raises:
        InvalidError: There are too many, or they do not ascend.
    """
    if len(waves) > waves_max:
        raise InvalidError(f"a rollout has at most {waves_max} waves, not {len(waves)}")
    # "2 0" on a fleet of two devices means what it says: two, then all there are.
    given = [*waves[:-1]] if waves and not waves[-1] else [*waves]
    if any(count < 1 for count in given) or any(a >= b for a, b in pairwise(given)):
        raise InvalidError(
            f"the waves {list(waves)!r:.200} do not ascend",
            hint="name cumulative device counts, like 2 10 0; a last 0 means all",
        )
    found = [count for count in given if count < devices]
    return [*found, devices]


def assign_waves(
    devices: Mapping[str, str], waves: Sequence[int], *, canaries: Sequence[str], seed: str
) -> dict[str, int]:
    """Return the wave of each device.

    Args:
        devices: Class by device id; "" is a class like any other.
        waves: Result of :func:`waves_of`.
        canaries: Device ids that come first, in this order.
        seed: Draws the order within each class.

    Raises:
        InvalidError: A canary is not among the devices.
    """
    strange = [name for name in canaries if name not in devices]
    if strange:
        raise InvalidError(
            f"the canaries {', '.join(strange)[:200]} are not among the rollout's devices"
        )
    members: dict[str, list[str]] = defaultdict(list)
    for name, group in devices.items():
        members[group].append(name)
    place: dict[str, tuple[float, str]] = {}
    for names in members.values():
        drawn = sorted((_draw(seed, name), name) for name in names)
        for i, (draw, name) in enumerate(drawn):
            # Spread each class evenly over 0 to 1: any cut then holds it in proportion.
            place[name] = ((i + 0.5) / len(drawn), draw)
    first = list(dict.fromkeys(canaries))
    rest = sorted(set(devices) - set(first), key=lambda name: place[name])
    found, wave = {}, 0
    for i, name in enumerate([*first, *rest]):
        while i >= waves[wave]:
            wave += 1
        found[name] = wave
    return found


def _draw(seed: str, name: str) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
