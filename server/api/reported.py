"""What a device cannot do, and what it did not tell: read from the state that it reports.

The state is the device's own words. Whatever is in it, there are values within the bounds below:
text is one line of printable characters, counts are whole numbers. Who shows text still escapes
it for a page or a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...proto.records import SEQ_MAX

TEXT_CHARS_MAX: Final = 200  # the agent cuts there too
CODE_CHARS_MAX: Final = 40
WARNINGS_MAX: Final = 10  # the agent sends no more
COUNTS: Final = (
    "withheld", "bins_alone", "curtailed", "sketch_stride",
    "labels_missed", "slices_over", "captures_refused",
)  # fmt: skip
"""As docs/sketches.md explains them; of the model that runs, since it was loaded."""

FIXES: Final[Mapping[str, str]] = {
    "identity.renewal": "let it reach the server before its certificate expires, or enrol it again",
    "link.denied": "correct the broker's access list (docs/mosquitto.md)",
    "link.down": "check its network, and the broker",
    "link.packet": "raise the broker's limit of a packet (docs/mosquitto.md)",
    "link.spool": "check its disk: space, permissions, wear",
    "monitor.capture": "raise monitor.capture.bytes_per_day in its agent.toml, or capture nothing",
    "monitor.sketch": "make the profile with fewer bins, or let windows end sooner "
    "(docs/sketches.md)",
    "runtime.slow": "run shoal-agent doctor on it",
    "spool.flush": "check its disk: space, permissions, wear",
    "spool.refused": "let it reach the broker, free its disk, or raise spool.bytes_max",
    "updates": "look at its rollout (shoal rollouts list); it tries again by itself",
}
"""What an operator can do about a warning, by its code."""


def plain(text: str, *, chars_max: int = TEXT_CHARS_MAX) -> str:
    """Return text as one line of printable characters, cut at a length.

    Control characters could move a terminal's cursor, and marks of direction turn a line round.
    """
    line = " ".join(text[: 4 * chars_max].split())
    return "".join(each if each.isprintable() else "\ufffd" for each in line)[:chars_max]


def warnings(reported: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what a device says is wrong with it, the oldest first.

    Args:
        reported: Body of a reported state; {} = it said nothing yet.

    Returns:
        Up to 10 of ``{code, severity, text, fix}``; ``severity`` is warning or error, ``fix`` is
        ours, "" for a code that this server does not know.
    """
    told = _map(reported.get("state")).get("warnings")
    found = []
    for each in told[:WARNINGS_MAX] if isinstance(told, list) else []:
        entry = _map(each)
        code = plain(str(entry.get("code", "")), chars_max=CODE_CHARS_MAX)
        found.append(
            {
                "code": code,
                "severity": "error" if entry.get("severity") == "error" else "warning",
                "text": plain(str(entry.get("text", ""))),
                "fix": FIXES.get(code, ""),
            }
        )
    return found


def untold(reported: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a device counted and did not tell; None if it does not say.

    Args:
        reported: Body of a reported state.

    Returns:
        The ``COUNTS``, null where one is not known, and ``text``: what its windows lack and why,
        "" if they lack nothing. Silence of such a device is no health.
    """
    monitor = _map(reported.get("state")).get("monitor")
    if not isinstance(monitor, dict) or not monitor:
        return None
    counts = {name: _count(monitor.get(name)) for name in COUNTS}
    return {**counts, "text": _lacks(counts, plain(str(monitor.get("sketch_hindrance", ""))))}


def _lacks(counts: Mapping[str, int | None], why: str) -> str:
    parts = [
        text.format(count=count, s="" if count == 1 else "s")
        for name, text, usual in (
            ("withheld", "{count:,} prediction{s} withheld", 0),
            ("sketch_stride", "1 of {count:,} predictions sketched", 1),
            ("bins_alone", "{count:,} window{s} as bins alone", 0),
            ("curtailed", "{count:,} window{s} without scores or projection", 0),
        )
        if (count := counts[name]) is not None and count > usual
    ]
    told = ", ".join(parts)
    return f"{told} ({why})" if told and why else told or why


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= SEQ_MAX else None


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
