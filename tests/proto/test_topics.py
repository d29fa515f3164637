"""The topic grammar: one spelling, nothing else gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.proto.errors import ContractError, TopicError
from shoal.proto.topics import Leaf, Topic, parse, subscription, topic

NAMES = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True)

GOLDEN = {
    Leaf.TELEMETRY: "shoal/v1/wrist-01/up/t",
    Leaf.PRESENCE: "shoal/v1/wrist-01/up/e",
    Leaf.ACK: "shoal/v1/wrist-01/down/ack",
    Leaf.COMMAND: "shoal/v1/wrist-01/down/cmd",
    Leaf.DESIRED: "shoal/v1/wrist-01/down/desired",
}


@pytest.mark.parametrize("leaf", Leaf)
def test_golden(leaf: Leaf) -> None:
    """Access lists of brokers in the field name these."""
    assert topic("wrist-01", leaf) == GOLDEN[leaf]
    assert parse(GOLDEN[leaf]) == Topic("wrist-01", leaf)


@given(NAMES, st.sampled_from(Leaf))
def test_what_is_built_is_parsed(device: str, leaf: Leaf) -> None:
    """And names nothing but its device."""
    assert parse(topic(device, leaf)) == Topic(device, leaf)


@given(st.text(max_size=60))
def test_any_text_is_a_topic_or_a_topic_error(text: str) -> None:
    """A topic that parses is spelled exactly as it would be built."""
    try:
        found = parse(text)
    except TopicError:
        return
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shoal/v1/wrist-01",
        "shoal/v1/wrist-01/up",
        "shoal/v1/wrist-01/up/t/",
        "/shoal/v1/wrist-01/up/t",
        "shoal/v1//up/t",
        "shoal/v2/wrist-01/up/t",
        "Shoal/v1/wrist-01/up/t",
        "shoal/v1/wrist-01/up/x",
        "shoal/v1/wrist-01/down/t",
        "shoal/v1/+/up/t",
        "shoal/v1/#/up/t",
        "shoal/v1/Wrist/up/t",
        "shoal/v1/-a/up/t",
        "shoal/v1/a b/up/t",
        "shoal/v1/a\n/up/t",
        "shoal/v1/wrist-01/up/t\n",
        "shoal/v1/../up/t",
        "shoal/v1/" + "a" * 41 + "/up/t",
        "shoal/v1/é/up/t",
    ],
)
def test_what_is_no_topic(text: str) -> None:
    """The device's identity is in the topic: there is no second spelling of a name."""
    with pytest.raises(TopicError):
        parse(text)


@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "A", "a" * 41, "a-", "$share"])
def test_a_bad_name_builds_nothing(name: str) -> None:
    """Neither a topic nor, but for the plus, a filter."""
    with pytest.raises(ContractError):
        topic(name, Leaf.ACK)
    if name != "+":
        with pytest.raises(ContractError):
            subscription(Leaf.ACK, device=name)


def test_filters() -> None:
    """Of one device, of all, and shared between servers."""
    assert subscription(Leaf.ACK, device="d-1") == "shoal/v1/d-1/down/ack"
    assert subscription(Leaf.PRESENCE) == "shoal/v1/+/up/e"
    assert subscription(Leaf.TELEMETRY, share="ingest") == "$share/ingest/shoal/v1/+/up/t"
    with pytest.raises(ContractError):
        subscription(Leaf.TELEMETRY, share="a/b")
