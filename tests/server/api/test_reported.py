"""Whatever a device reports, what is shown of it is bounded, printable and counted as it was."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.api import reported

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("code", "severity", "text"), ANYTHING)),
    max_size=14,
)
MONITORS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys((*reported.COUNTS, "sketch_hindrance"), ANYTHING)
)
STATES = st.fixed_dictionaries(
    {},
    optional={"warnings": ENTRIES | ANYTHING, "monitor": MONITORS | ANYTHING},
)


@given(st.fixed_dictionaries({}, optional={"state": STATES | ANYTHING}))
def test_any_state_is_read(state: dict[str, Any]) -> None:
    """No state raises; text is one printable line within its bound, a count whole or unknown."""
    found = reported.warnings(state)
    assert len(found) <= reported.WARNINGS_MAX
    for each in found:
        assert set(each) == {"code", "severity", "text", "fix"}
        assert each["severity"] in ("warning", "error")
        assert len(each["code"]) <= reported.CODE_CHARS_MAX
        assert len(each["text"]) <= reported.TEXT_CHARS_MAX
        assert all(text.isprintable() for text in each.values())
    lacks = reported.untold(state)
    if lacks is not None:
        assert set(lacks) == {*reported.COUNTS, "text"}
        assert all(
            lacks[name] is None or (type(lacks[name]) is int and lacks[name] >= 0)
            for name in reported.COUNTS
        )
        assert lacks["text"].isprintable() and len(lacks["text"]) <= 500


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("as it is: 600 × 31", "as it is: 600 × 31"),
        ("two\nlines\tand\r\nmore", "two lines and more"),
        ("\x1b[2J\x1b]0;owned\x07", "\ufffd[2J\ufffd]0;owned\ufffd"),
        ("txt\u202egpj.exe", "txt\ufffdgpj.exe"),
        ("\x9b31m\u2066\u200b", "\ufffd31m\ufffd\ufffd"),
        ("x" * 300, "x" * 200),
    ],
)
def test_text_is_one_line_that_steers_nothing(text: str, want: str) -> None:
    """Neither a terminal nor the direction of a line."""
    assert reported.plain(text) == want


@pytest.mark.parametrize(
    ("monitor", "want"),
    [
        ({"withheld": 0, "sketch_stride": 1, "bins_alone": 0}, ""),
        ({"labels_missed": 9, "slices_over": 9, "captures_refused": 9}, ""),
        ({"withheld": 1}, "1 prediction withheld"),
        ({"sketch_stride": 4}, "1 of 4 predictions sketched"),
        ({"bins_alone": 1200, "curtailed": 3},
         "1,200 windows as bins alone, 3 windows without scores or projection"),
        ({"withheld": 2, "sketch_hindrance": "no room"}, "2 predictions withheld (no room)"),
        ({"withheld": 0, "sketch_hindrance": "no room"}, "no room"),
        ({"withheld": -1, "bins_alone": True, "sketch_stride": 2**60}, ""),
    ],
)  # fmt: skip
def test_what_windows_lack(monitor: dict[str, Any], want: str) -> None:
    """Only what makes a verdict of less than the device saw; labels and captures do not."""
    lacks = reported.untold({"state": {"monitor": monitor}})
    assert lacks is not None and lacks["text"] == want


def test_a_device_that_says_nothing_is_unknown() -> None:
    """No counts is not a count of zero: agents without a model, or that never reported."""
    assert reported.untold({}) is None
    assert reported.untold({"state": {"monitor": {}}}) is None
    assert reported.warnings({}) == []


def test_every_warning_of_the_agent_has_a_fix() -> None:
    """A code that the agent gains needs a line here: what is an operator to do?"""
    import re
    from pathlib import Path

    import shoal.agent

    sources = Path(shoal.agent.__file__).parent.rglob("*.py")
    warn = re.compile(r"_?health\.warn\(\s*\"([a-z.]+)\"")
    codes = {code for path in sources for code in warn.findall(path.read_text())}
    assert codes == reported.FIXES.keys()
