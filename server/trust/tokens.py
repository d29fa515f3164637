"""Enrolment tokens: one string that an operator carries to one device.

    shoal1.<device>.<secret>.<ca>.<port>.<host>

    device   id of the device, [a-z0-9-]{1,40}
    secret   128 random bits, 26 characters of lowercase base32
    ca       SHA-256 of the fleet CA's certificate (DER), 64 hex digits: pins the first connection
    port     of the enrolment port, 1 to 65535
    host     DNS name or IP address of the server; last, because it has dots itself

The device reads it in ``shoal.agent.identity``. The server keeps a hash of the secret. The limit
on attempts is a pure token bucket per source and one for all: guessing is hopeless anyway, but
the work of refusing must be bounded too.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ...proto.names import check_digest, check_name
from ..errors import BusyError, InvalidError

PREFIX: Final = "shoal1"
SECRET_BYTES: Final = 16
SECRET_CHARS: Final = 26


def new_secret() -> str:
    """Return 128 random bits as 26 characters of lowercase base32."""
    raw = base64.b32encode(secrets.token_bytes(SECRET_BYTES))
    return raw.decode().rstrip("=").lower()


def hash_secret(secret: str) -> str:
    """Return the hex digest that stands for a secret; 128 random bits need no slow hash."""
    return hashlib.sha256(b"shoal-token\0" + secret.encode()).hexdigest()


def text(device: str, secret: str, *, ca_sha256: str, host: str, port: int) -> str:
    """Return the token of the grammar above.

    Raises:
        ContractError: The device id or the digest is not legal.
        InvalidError: The host or port is not.
    """
    check_name(device)
    check_digest(ca_sha256)
    if not host or any(char.isspace() for char in host) or not 1 <= port <= 65535:
        raise InvalidError(f"{host!r:.80}, port {port}, is no address for a token")
    return ".".join((PREFIX, device, secret, ca_sha256, str(port), host))


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitConfig:
    """How many enrolment attempts are looked at."""

    source_per_minute: int = 60
    """From one address; many devices may share one."""
    total_per_minute: int = 3000
    """From all addresses."""
    sources_max: int = 4096
    """Addresses that are remembered; the one not seen for longest is forgotten first."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if min(self.source_per_minute, self.total_per_minute, self.sources_max) < 1:
            raise ValueError("limits of enrolment must be at least 1")


@dataclass(slots=True)
class Bucket:
    """A token bucket: full at the start, refilled evenly over a minute."""

    per_minute: int
    level: float
    time_ms: int

    def take(self, now_ms: int) -> int:
        """Take one; return 0, or in how many ms there will be one."""
        passed_ms = max(0, now_ms - self.time_ms)
        self.level = min(self.per_minute, self.level + passed_ms * self.per_minute / 60_000)
        self.time_ms = now_ms
        if self.level >= 1:
            self.level -= 1
            return 0
        return int((1 - self.level) * 60_000 / self.per_minute) + 1


class AttemptLimit:
    """The limit on attempts. Its owner calls it from one thread."""

    def __init__(self, config: LimitConfig) -> None:
        self._config = config
        self._sources: OrderedDict[str, Bucket] = OrderedDict()
        self._total = Bucket(config.total_per_minute, config.total_per_minute, 0)

    def check(self, source: str, *, now_ms: int) -> None:
        """Count an attempt.

        Raises:
            BusyError: Too many; the message says when to come again.
        """
        bucket = self._sources.pop(source, None)
        if bucket is None:
            most = self._config.source_per_minute
            bucket = Bucket(most, most, now_ms)
        self._sources[source] = bucket
        if len(self._sources) > self._config.sources_max:
            self._sources.popitem(last=False)
        wait_ms = bucket.take(now_ms) or self._total.take(now_ms)
        if wait_ms:
            raise BusyError(
                "too many enrolment attempts", hint=f"try again in {wait_ms / 1000:.1f} s"
            )
