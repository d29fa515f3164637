"""Record schemas and their bytes: what a device says over MQTT.

    batch   = [VERSION, stream: bin 16, [record, ...]]          one MQTT payload, <= 64 KiB
    record  = [seq: uint, kind: str, time_ms: uint, body: map]   one spool entry
    ack     = {"stream": bin 16, "upto": uint}                   down/ack
    presence= {"state": "online"|"offline", "boot": bin 16}      up/e
    nudge   = {"look": "tasks"|"desired"}                        down/cmd
    desired = {"version": uint}                                  down/desired

Everything is MessagePack. ``seq`` counts from 1 within a stream; a stream id is random and made
at every boot, so (device, stream, seq) names a record for ever. ``time_ms`` is the device's own
clock, Unix milliseconds, and may be wrong. A body carries the fields of its kind; fields a
reader does not know are kept (a newer minor writes them), a missing or ill-typed field is a
``RecordError`` (an optional one may be missing, not ill-typed), an unknown version of the batch
too: the batch is quarantined as a whole.

Limits are those of fault 50: a megabyte of empty maps would cost 71 MB without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgpack

from .errors import ContractError, RecordError
from .names import check_digest

VERSION: Final = 1
STREAM_SIZE: Final = 16
BATCH_BYTES_MAX: Final = 64 << 10
RECORD_BYTES_MAX: Final = 48 << 10  # a batch holds at least one record and its frame
RECORDS_MAX: Final = 4096
ITEMS_MAX: Final = 16_384  # of one array or map
SLICE_CHARS_MAX: Final = 40
PLACE_CHARS_MAX: Final = 40  # name of a site or a hardware class
CAPTURE_BYTES_MAX: Final = 32 << 10
SKETCH_BYTES_MAX: Final = 44 << 10  # 4 KiB of a record are for the counters of a window beside it
SEQ_MAX: Final = 2**53  # exact in every JSON reader and in SQLite
_FRAME_BYTES: Final = 32  # of a record around its body, and 3 that a field's header may grow by


class Kind(StrEnum):
    """Kinds of records."""

    WINDOW = "window"
    LABELS = "labels"
    EVENT = "event"
    REPORTED = "reported"
    UPDATE = "update"
    GAP = "gap"
    CAPTURE = "capture"


class Priority(StrEnum):
    """Spool classes, in the order in which a full spool gives them up."""

    DEBUG = "debug"
    RAW = "raw"
    WINDOW = "window"
    RESULT = "result"
    VITAL = "vital"  # never evicted: audit, update, security


PRIORITY: Final[Mapping[Kind, Priority]] = {
    Kind.WINDOW: Priority.WINDOW,
    Kind.LABELS: Priority.WINDOW,
    Kind.EVENT: Priority.RESULT,
    Kind.REPORTED: Priority.RESULT,
    Kind.UPDATE: Priority.VITAL,
    Kind.GAP: Priority.VITAL,
    Kind.CAPTURE: Priority.RAW,
}


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it travels."""

    seq: int
    """Number within the stream, 1 to 2**53."""
    kind: Kind
    time_ms: int
    """The device's clock, Unix ms; may be wrong."""
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """A decoded and checked batch."""

    stream: bytes
    records: tuple[Record, ...]


Check = Callable[[Any], bool]


def _uint(value: Any) -> bool:
    return type(value) is int and 0 <= value <= SEQ_MAX


def _split(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2


def _number(value: Any) -> bool:
    return type(value) in (int, float) and value == value and abs(value) < 1e300


def _text(bound: int) -> Check:
    return lambda value: type(value) is str and len(value) <= bound


def _digest(value: Any) -> bool:
    if type(value) is not str:
        return False
    try:
        check_digest(value)
    except ContractError:
        return False
    return True


def _digest_or_empty(value: Any) -> bool:
    return value == "" or _digest(value)


def _bin(bound: int) -> Check:
    return lambda value: type(value) is bytes and len(value) <= bound


def _counts(bound: int) -> Check:
    return lambda value: (
        type(value) is list and len(value) <= bound and all(_uint(item) for item in value)
    )


def _runs(value: Any) -> bool:
    if not _counts(ITEMS_MAX)(value) or not value or len(value) % 2 or value[0] < 1:
        return False
    starts, ends = value[::2], value[1::2]
    return all(a <= b for a, b in zip(starts, ends, strict=True)) and all(
        b < a for b, a in zip(ends, starts[1:], strict=False)
    )


def _table(value: Any) -> bool:
    return type(value) is dict and len(value) <= 64 and all(type(key) is str for key in value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _floats(bound: int) -> Check:
    return lambda value: type(value) is bytes and len(value) <= bound and len(value) % 4 == 0


def _quality(value: Any) -> bool:
    return (
        _table(value)
        and len(value) <= 16
        # the channels of a bundle, 1024 at most, and the confidence
        and all(_counts(1025)(each) for each in value.values())
    )


def _calibration(value: Any) -> bool:
    return _counts(20)(value) and len(value) == 20


def _state(value: Any) -> bool:
    return _table(value) and all(
        _text(PLACE_CHARS_MAX)(value.get(name, "")) for name in ("site", "hardware")
    )


# The fields that each kind must carry. Units are last in the names; counts are plain.
SCHEMAS: Final[Mapping[Kind, Mapping[str, Check]]] = {
    # One telemetry window of one model: `index` counts windows of (boot, model) from 0.
    # `sketch` is SketchBank.to_bytes() of the input channels and, last, the confidence.
    # `latency_us` are the counts of the histogram shoal.proto.latency defines.
    Kind.WINDOW: {
        "model": _digest,
        "index": _uint,
        "start_ms": _uint,
        "end_ms": _uint,
        "predictions": _uint,
        "errors": _uint,
        "classes": _counts(1024),
        "sketch": _bin(SKETCH_BYTES_MAX),
        "latency_us": _counts(64),
    },
    # Labels that arrived late, joined to the predictions of window `index`. `split` says which
    # part of the data they belong to (0 train, 1 validation, 2 test). `confusion` is row-major
    # true x predicted.
    Kind.LABELS: {
        "model": _digest,
        "index": _uint,
        "split": _split,
        "labelled": _uint,
        "correct": _uint,
        "confusion": _counts(4096),
    },
    Kind.EVENT: {
        "name": _text(80),
        "severity": lambda value: value in ("info", "warning", "error", "critical"),
        "text": _text(1000),
        "data": _table,
    },
    # What the device is. `version` grows with every report of a boot; `model` is the bundle that
    # really runs ("" = none), `desired` the version of the desired state it acted on. `state` may
    # say its "site" and "hardware" class, text of up to 40 characters each.
    Kind.REPORTED: {
        "version": _uint,
        "model": _digest_or_empty,
        "desired": _uint,
        "agent": _text(40),
        "rss_bytes": _uint,
        "state": _state,
    },
    # A step of an update: state is one of offered, downloading, trial, confirmed, failed.
    Kind.UPDATE: {
        "rollout": _text(64),
        "counter": _uint,
        "model": _digest,
        "state": lambda value: (
            value in ("offered", "downloading", "verified", "trial", "confirmed", "failed")
        ),
        "reason": _text(500),
    },
    # Records of `stream` that were accepted and will never be sent: `count` of them, all of spool
    # class `class`. `runs` says exactly which: first, last, first, last, … ascending; records of
    # other classes may lie between two runs, never inside one.
    Kind.GAP: {
        "stream": lambda value: type(value) is bytes and len(value) == STREAM_SIZE,
        "class": _text(16),
        "runs": lambda value: _runs(value),
        "count": _uint,
        "reason": _text(200),
    },
    # One input of a model, whole, as the device's policy chose it: `prediction` is its id, `data`
    # its values of `shape`, float32 little-endian.
    Kind.CAPTURE: {
        "model": _digest,
        "slice": _text(SLICE_CHARS_MAX),
        "prediction": _uint,
        "reason": lambda value: value in ("random", "threshold", "drift"),
        "shape": _counts(8),
        "data": _floats(CAPTURE_BYTES_MAX),
    },
}

# Fields that a kind may carry, since version 0.2 of the product; without one it means what its
# comment says.
OPTIONAL: Final[Mapping[Kind, Mapping[str, Check]]] = {
    Kind.WINDOW: {
        # Value of the slice tag that the predictions share; `index` counts within it. "": no tag.
        "slice": _text(SLICE_CHARS_MAX),
        # Start of the interval of time in which the window began, by the device's clock: a
        # multiple of the interval's length. 0: windows end by count alone.
        "aligned_ms": _uint,
        # Counts for each feature of the sketch: values "below" and "above" the profile's range
        # and "stuck" in runs of equal values (0 for outputs); "schema": [calls whose tensors did
        # not fit]; "rate": predictions [expected, seen] of all slices since the last told. {}.
        "quality": _quality,
        # Predicted class x confidence decile, row-major. []: too many classes.
        "scores": _counts(16_384),
        # Sums of the profile's random features, float32 little-endian, and rows in them. Empty: 0.
        "projection": _floats(16 << 10),
        "projected": _uint,
        # Predictions that are in no sketch and no quality count, for the CPU budget. 0.
        "shed": _uint,
        # Intervals that went into this window because each had too few predictions. 0.
        "carried": _uint,
        # The sketch has bins and nulls alone: for privacy, or because more does not fit. False.
        "bins_only": _flag,
    },
    Kind.LABELS: {
        "slice": _text(SLICE_CHARS_MAX),  # as the window's
        # (wrong, right) x confidence decile, row-major. []: not counted.
        "calibration": _calibration,
    },
}


def check_body(kind: Kind, body: Any) -> None:
    """Check the fields of a record's body against its schema.

    Raises:
        RecordError: A field is missing, ill-typed or out of bounds, or an optional one is there
            and is so; the message names it.
    """
    if not _table(body):
        raise RecordError(f"body of a {kind} record is not a map of at most 64 names")
    for name, check in SCHEMAS[kind].items():
        if name not in body:
            raise RecordError(f"{kind} record lacks the field {name!r}")
        _check_field(kind, name, check, body[name])
    for name, check in OPTIONAL.get(kind, {}).items():
        if name in body:
            _check_field(kind, name, check, body[name])


def _check_field(kind: Kind, name: str, check: Check, value: Any) -> None:
    if not check(value):
        raise RecordError(f"{kind} record: field {name!r} has an unacceptable value {value!r:.80}")


def room(body: Mapping[str, Any]) -> int:
    """Return how many bytes may be added to one field of a body, below 0 if it is too large.

    Args:
        body: Fields of a record; what is added may make a field's header longer.
    """
    return RECORD_BYTES_MAX - _FRAME_BYTES - len(msgpack.packb(dict(body)))


def encode_record(record: Record) -> bytes:
    """Return the bytes of one checked record, as the spool keeps them.

    Raises:
        RecordError: The body breaks its schema, ``seq`` is out of range, or the bytes would be
            more than ``RECORD_BYTES_MAX``.
    """
    if not 1 <= record.seq <= SEQ_MAX or not _uint(record.time_ms):
        raise RecordError(f"seq {record.seq} or time_ms {record.time_ms} is out of range")
    check_body(record.kind, record.body)
    data: bytes = msgpack.packb([record.seq, str(record.kind), record.time_ms, dict(record.body)])
    if len(data) > RECORD_BYTES_MAX:
        raise RecordError(
            f"{record.kind} record of {len(data)} bytes exceeds {RECORD_BYTES_MAX}",
            hint="send less in one record: fewer channels or bins per window",
        )
    return data


def encode_batch(stream: bytes, records: Sequence[bytes]) -> bytes:
    """Return the MQTT payload of encoded records, without decoding them again.

    Args:
        stream: Stream id, 16 bytes.
        records: 1 to ``RECORDS_MAX`` results of :func:`encode_record`, ascending in ``seq``.

    Raises:
        RecordError: Too many records, a bad stream id, or more than ``BATCH_BYTES_MAX`` bytes.
    """
    if len(stream) != STREAM_SIZE or not 1 <= len(records) <= RECORDS_MAX:
        raise RecordError(f"a batch takes a 16-byte stream id and 1 to {RECORDS_MAX} records")
    packer = msgpack.Packer(autoreset=False)
    packer.pack_array_header(3)
    packer.pack(VERSION)
    packer.pack(stream)
    packer.pack_array_header(len(records))
    data: bytes = packer.bytes() + b"".join(records)
    if len(data) > BATCH_BYTES_MAX:
        raise RecordError(f"batch of {len(data)} bytes exceeds {BATCH_BYTES_MAX}")
    return data


def unpack(data: bytes, *, bytes_max: int = BATCH_BYTES_MAX) -> Any:
    """Decode MessagePack from a peer, within limits on sizes, items and depth.

    Raises:
        RecordError: Not MessagePack, over a limit, trailing bytes, or nested too deep.
    """
    if len(data) > bytes_max:
        raise RecordError(f"payload of {len(data)} bytes exceeds {bytes_max}")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=ITEMS_MAX,
            max_map_len=1024,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise RecordError(f"payload is not acceptable MessagePack: {exc!s:.200}") from exc


def decode_record(data: bytes) -> Record:
    """Return one checked record from the bytes of :func:`encode_record`.

    Raises:
        RecordError: The bytes are not a valid record.
    """
    return _record(unpack(data, bytes_max=RECORD_BYTES_MAX))


def _record(raw: Any) -> Record:
    if type(raw) is not list or len(raw) != 4:
        raise RecordError("a record is not [seq, kind, time_ms, body]")
    seq, name, time_ms, body = raw
    if not _uint(seq) or seq < 1 or not _uint(time_ms):
        raise RecordError(f"record has seq {seq!r:.40} and time_ms {time_ms!r:.40}")
    try:
        kind = Kind(name)
    except ValueError as exc:
        raise RecordError(f"record kind {name!r:.40} is unknown") from exc
    check_body(kind, body)
    return Record(seq, kind, time_ms, body)


def decode_batch(data: bytes) -> Batch:
    """Return the checked batch of an MQTT payload.

    Whatever bytes come, this yields a batch or raises; it takes all of a batch or none.

    Raises:
        RecordError: The payload breaks the contract in any way.
    """
    raw = unpack(data)
    if type(raw) is not list or len(raw) != 3:
        raise RecordError("a batch is not [version, stream, records]")
    version, stream, records = raw
    if version != VERSION or type(version) is not int:
        raise RecordError(
            f"batch version {version!r:.20} is not {VERSION}",
            hint="the device is newer than this server: update the server first",
        )
    if type(stream) is not bytes or len(stream) != STREAM_SIZE:
        raise RecordError("stream id is not 16 bytes")
    if type(records) is not list or not 1 <= len(records) <= RECORDS_MAX:
        raise RecordError(f"a batch holds 1 to {RECORDS_MAX} records")
    return Batch(stream, tuple(_record(item) for item in records))


@dataclass(frozen=True, slots=True)
class Ack:
    """The server holds every record of ``stream`` up to and including ``upto``."""

    stream: bytes
    upto: int

    def encode(self) -> bytes:
        """Return the MQTT payload."""
        data: bytes = msgpack.packb({"stream": self.stream, "upto": self.upto})
        return data

    @classmethod
    def decode(cls, data: bytes) -> Ack:
        """Return the acknowledgement of a payload; raise RecordError when it is none."""
        raw = _message(data, {"stream": _bin(STREAM_SIZE), "upto": _uint})
        if len(raw["stream"]) != STREAM_SIZE:
            raise RecordError("stream id is not 16 bytes")
        return cls(raw["stream"], raw["upto"])


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether a device holds its connection; offline is what the broker says for it."""

    online: bool
    boot: bytes

    def encode(self) -> bytes:
        """Return the MQTT payload."""
        state = "online" if self.online else "offline"
        data: bytes = msgpack.packb({"state": state, "boot": self.boot})
        return data

    @classmethod
    def decode(cls, data: bytes) -> Presence:
        """Return the presence of a payload; raise RecordError when it is none."""
        raw = _message(
            data, {"state": lambda v: v in ("online", "offline"), "boot": _bin(STREAM_SIZE)}
        )
        return cls(raw["state"] == "online", raw["boot"])


@dataclass(frozen=True, slots=True)
class Nudge:
    """A hint to look: the device asks over gRPC what is new. Content never comes by MQTT."""

    look: str
    """``tasks`` or ``desired``."""

    def encode(self) -> bytes:
        """Return the MQTT payload."""
        data: bytes = msgpack.packb({"look": self.look})
        return data

    @classmethod
    def decode(cls, data: bytes) -> Nudge:
        """Return the nudge of a payload; raise RecordError when it is none."""
        return cls(_message(data, {"look": lambda v: v in ("tasks", "desired")})["look"])


@dataclass(frozen=True, slots=True)
class DesiredVersion:
    """The retained version of a device's desired state."""

    version: int

    def encode(self) -> bytes:
        """Return the MQTT payload."""
        data: bytes = msgpack.packb({"version": self.version})
        return data

    @classmethod
    def decode(cls, data: bytes) -> DesiredVersion:
        """Return the version of a payload; raise RecordError when it is none."""
        return cls(_message(data, {"version": _uint})["version"])


def _message(data: bytes, fields: Mapping[str, Check]) -> dict[str, Any]:
    raw = unpack(data, bytes_max=4096)
    if not _table(raw) or any(name not in raw or not fields[name](raw[name]) for name in fields):
        raise RecordError(f"message is not a map with acceptable {', '.join(fields)}")
    found: dict[str, Any] = raw
    return found
