"""The MQTT topic grammar; nothing else in the product builds or parses a topic.

    shoal/v1/<device>/up/t          batches of spooled records        QoS 1
    shoal/v1/<device>/up/e          presence, retained; LWT offline   QoS 1
    shoal/v1/<device>/down/ack      application acknowledgement       QoS 1
    shoal/v1/<device>/down/cmd      nudge: "look", never content      QoS 1
    shoal/v1/<device>/down/desired  version of the desired state, retained

A broker's access list needs two patterns: ``shoal/v1/%u/up/#`` to write and
``shoal/v1/%u/down/#`` to read. The device's identity is the topic's, never the payload's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .errors import ContractError, TopicError
from .names import check_name

PREFIX: Final = "shoal/v1"
SHARE_GROUP: Final = "ingest"


class Leaf(StrEnum):
    """The last two levels of a topic."""

    TELEMETRY = "up/t"
    PRESENCE = "up/e"
    ACK = "down/ack"
    COMMAND = "down/cmd"
    DESIRED = "down/desired"


@dataclass(frozen=True, slots=True)
class Topic:
    """A parsed topic."""

    device: str
    leaf: Leaf

    def __str__(self) -> str:
        return f"{PREFIX}/{self.device}/{self.leaf}"


def topic(device: str, leaf: Leaf) -> str:
    """Return the topic of a device's leaf.

    Raises:
        ContractError: The device id is not a legal name.
    """
    return str(Topic(check_name(device), leaf))


def parse(text: str) -> Topic:
    """Return the parts of a topic.

    Raises:
        TopicError: The topic is not in the grammar.
    """
    parts = text.split("/")
    if len(parts) != 5 or "/".join(parts[:2]) != PREFIX:
        raise TopicError(f"topic {text!r:.120} is not in the grammar {PREFIX}/<device>/<leaf>")
    try:
        return Topic(check_name(parts[2]), Leaf("/".join(parts[3:])))
    except (ContractError, ValueError) as exc:
        raise TopicError(f"topic {text!r:.120} is not in the grammar: {exc}") from exc


def subscription(leaf: Leaf, *, device: str = "+", share: str = "") -> str:
    """Return a topic filter for a leaf of one device, or of all (``+``).

    Args:
        leaf: The leaf.
        device: A device id, or ``+`` for every device.
        share: Name of an MQTT 5 shared-subscription group; "" = not shared.
    """
    middle = device if device == "+" else check_name(device)
    plain = f"{PREFIX}/{middle}/{leaf}"
    return f"$share/{check_name(share, what='share group')}/{plain}" if share else plain
