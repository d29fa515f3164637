"""Cut what a client sends into requests; pure, llhttp does the grammar.

    bytes --feed--> items: Request, Request, ..., and last of all perhaps a Refusal

Invariants:
    what is kept of a client is bounded: heads by count and bytes, bodies by bytes, all bodies
    together by the budget, and framing by a share of what it frames;
    after a Refusal nothing more is read: where the next request would start is not known.

Source: RFC 9110 and 9112. What llhttp's strict mode refuses (two lengths, a length with chunks,
bare CR or LF, bad characters) is refused.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

CHUNK_FRAME_BYTES: Final = 16
"""Framing that is allowed for each byte of a body; chunks of one byte need 5."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, whole."""

    method: str
    target: bytes
    headers: dict[bytes, bytes]
    """Names are in lower case; a name that came twice has its values joined by a comma."""
    body: bytes
    keep: bool
    """Whether the client goes on with this connection."""
    old: bool
    """Whether it is HTTP/1.0, where keeping on must be said."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing more is read from this client."""

    status: int
    text: str


class Budget:
    """Bytes that all clients' bodies may have together. Used by one thread."""

    def __init__(self, bytes_max: int) -> None:
        self.left = bytes_max


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageLimits:
    """How large requests may be."""

    head_bytes_max: int = 16 << 10
    """Target and headers of one request, in bytes; trailers count too."""

    headers_max: int = 64
    """Headers of one request; clients send 5 to 20."""

    body_bytes_max: int = 64 << 20
    """Body of one request, in bytes, as sent and after decompression."""

    json_values_max: int = 1 << 20
    """Numbers, strings, lists and objects in one JSON text, asked or answered: reading so many
    takes 0.5 s, in which nobody else is served, and up to 200 MB. Binary tensors have no such
    bound."""

    def __post_init__(self) -> None:
        """Check the limits."""
        sizes = (self.head_bytes_max, self.headers_max, self.body_bytes_max, self.json_values_max)
        if min(sizes) < 1:
            raise ValueError(
                "head_bytes_max, headers_max, body_bytes_max, json_values_max must be at least 1"
            )


class _StopError(Exception):
    """Ends llhttp's run from inside a callback; the refusal has been noted."""


@dataclass(slots=True)
class _Draft:
    """The request that is being read."""

    target: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    count: int = 0
    head_size: int = 0
    head_ended: bool = False
    parts: list[bytes] = field(default_factory=list)
    body_size: int = 0
    fed: int = 0


class Requests:
    """The requests of one connection. Used by one thread.

    Args:
        limits: Of each request.
        budget: Of all bodies; what they hold is taken from it until ``give_back``.
    """

    def __init__(self, limits: MessageLimits, budget: Budget) -> None:
        self.items: deque[Request | Refusal] = deque()
        self.begun = 0
        """Requests whose first byte has come."""
        self.ended = False
        """Whether a refusal has come: more bytes are dropped."""
        self.continues = False
        """Whether the client waits for ``100 Continue`` before it sends its body."""
        self._limits = limits
        self._budget = budget
        self._held = 0
        self._draft: _Draft | None = None
        self._parser = HttpRequestParser(self)

    @property
    def stage(self) -> str:
        """Where the next byte belongs: "between" requests, in a "head", or in a "body"."""
        if self._draft is None:
            return "between"
        return "body" if self._draft.head_ended else "head"

    def feed(self, data: bytes | memoryview) -> None:
        """Take what the client sent; ``items`` grow."""
        while len(data) and not self.ended:
            try:
                self._parser.feed_data(data)
            except HttpParserUpgrade as exc:  # we speak nothing else: go on as if not asked
                data = data[exc.args[0] :]
                continue
            except HttpParserError as exc:
                if not self.ended:  # else a callback has said why
                    self._refuse(400, f"the request is not HTTP/1.1: {exc}")
            break
        draft = self._draft
        if draft is None or self.ended:
            return
        draft.fed += len(data)
        # What is fed and neither head nor body is framing, trailers or an unfinished header. The
        # first feed may have held other requests too, which is one buffer's size at most.
        framing = draft.fed - draft.body_size * (1 + CHUNK_FRAME_BYTES)
        if framing > 2 * self._limits.head_bytes_max + len(data):
            self._refuse(431, f"the head has more than {self._limits.head_bytes_max} bytes")

    def give_back(self, size: int) -> None:
        """Say that a body of ``size`` bytes is no longer held."""
        self._held -= size
        self._budget.left += size

    def close(self) -> None:
        """Give back all bodies; nothing may be fed any more."""
        self.ended = True
        self.give_back(self._held)
        self.items.clear()
        self._draft = None

    # ---- called by llhttp

    def on_message_begin(self) -> None:
        """Start a request."""
        self.begun += 1
        self._draft = _Draft()

    def on_url(self, part: bytes) -> None:
        """Take a part of the target."""
        draft = self._now()
        draft.target += part
        self._head(draft, len(part))

    def on_header(self, name: bytes, value: bytes | None) -> None:
        """Take a header, or a trailer, which is dropped."""
        draft, text = self._now(), value or b""
        draft.count += 1
        self._head(draft, len(name) + len(text))
        if draft.count > self._limits.headers_max:
            self._stop(431, f"the request has more than {self._limits.headers_max} headers")
        if draft.head_ended:
            return
        key = name.lower()
        if key in draft.headers:
            text = draft.headers[key] + b", " + text
        draft.headers[key] = text

    def on_headers_complete(self) -> None:
        """Refuse early what cannot be served, before its body is read."""
        draft = self._now()
        draft.head_ended = True
        headers, version = draft.headers, self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop(505, f"HTTP/{version} is not supported; use HTTP/1.1")
        if self._parser.get_method() == b"CONNECT":
            self._stop(501, "this is no proxy")
        host = headers.get(b"host")
        if (host is None and version == "1.1") or (host is not None and b"," in host):
            self._stop(400, "the request must have one Host header")
        if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            self._stop(501, "no Transfer-Encoding but chunked is supported")
        size = int(headers.get(b"content-length") or 0)  # llhttp has checked that it is a number
        if size > self._limits.body_bytes_max:
            self._oversize()
        if size > self._budget.left:
            self._busy()
        expected = headers.get(b"expect")
        if expected is not None and version == "1.1":
            if expected.lower() != b"100-continue":
                self._stop(417, "no Expect but 100-continue is supported")
            self.continues = True

    def on_body(self, part: bytes) -> None:
        """Take a part of the body."""
        draft, size = self._now(), len(part)
        draft.body_size += size
        if draft.body_size > self._limits.body_bytes_max:
            self._oversize()
        if size > self._budget.left:
            self._busy()
        self.give_back(-size)
        draft.parts.append(part)
        self.continues = False  # it did not wait

    def on_message_complete(self) -> None:
        """Hand the request over."""
        draft = self._now()
        parts, parser = draft.parts, self._parser
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self.items.append(
            Request(
                parser.get_method().decode("ascii"), draft.target, draft.headers, body,
                parser.should_keep_alive(), parser.get_http_version() == "1.0",
            )
        )  # fmt: skip
        self._draft = None
        self.continues = False

    # ----

    def _now(self) -> _Draft:
        assert self._draft is not None, "llhttp begins a message before its parts"
        return self._draft

    def _head(self, draft: _Draft, size: int) -> None:
        draft.head_size += size
        if draft.head_size > self._limits.head_bytes_max:
            self._stop(431, f"the head has more than {self._limits.head_bytes_max} bytes")

    def _oversize(self) -> None:
        self._stop(413, f"the body has more than {self._limits.body_bytes_max} bytes")

    def _busy(self) -> None:
        self._stop(503, "the bodies of all requests under way are too large; try again later")

    def _refuse(self, status: int, text: str) -> None:
        self.ended = True
        self.continues = False
        self._draft = None
        self.items.append(Refusal(status, text))

    def _stop(self, status: int, text: str) -> None:
        self._refuse(status, text)
        raise _StopError(text)
