"""Records and messages: vectors, round trips, and what hostile bytes do (nothing).

The fuzz invariant: whatever bytes come, a decoder yields a checked value or raises RecordError.
"""

from __future__ import annotations

import importlib.util
import random
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.proto import records
from shoal.proto.errors import RecordError
from shoal.proto.records import (
    BATCH_BYTES_MAX,
    OPTIONAL,
    PRIORITY,
    RECORD_BYTES_MAX,
    RECORDS_MAX,
    SCHEMAS,
    SEQ_MAX,
    SKETCH_BYTES_MAX,
    Ack,
    DesiredVersion,
    Kind,
    Nudge,
    Presence,
    Priority,
    Record,
    decode_batch,
    decode_record,
    encode_batch,
    encode_record,
    room,
)

GOLDEN = Path(__file__).parent / "golden"
STREAM = bytes(range(16))


def _maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN.parent / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = _maker()
FIRST: dict[Kind, dict[str, Any]] = {Kind(kind): body for kind, body in MADE.BODIES.items()}
LATER: dict[str, dict[str, Any]] = MADE.BODIES_0_2
BODIES = FIRST | {Kind.CAPTURE: LATER["capture"]}
OPTIONALS = [(kind, name) for kind in OPTIONAL for name in OPTIONAL[kind]]


def golden(name: str) -> bytes:
    """Return the bytes of a golden file."""
    return (GOLDEN / f"{name}.bin").read_bytes()


# --- vectors ---------------------------------------------------------------------------------


def test_every_kind_has_a_vector_a_schema_and_a_class() -> None:
    """A new kind cannot be forgotten in one of them."""
    assert set(BODIES) == set(SCHEMAS) == set(PRIORITY) == set(Kind)
    assert {path.stem for path in GOLDEN.glob("*.bin")} == set(MADE.files())


@pytest.mark.parametrize("kind", FIRST)
def test_golden_record(kind: Kind) -> None:
    """Records from the field are read, and written, in the same bytes for ever."""
    data = golden(f"record_{kind}")
    record = decode_record(data)
    assert record == Record(list(FIRST).index(kind) + 1, kind, MADE.TIME_MS, FIRST[kind])
    assert encode_record(record) == data


@pytest.mark.parametrize("name", LATER)
def test_golden_record_of_a_later_version(name: str) -> None:
    """So are those of every version after the first, with all that it added."""
    data = golden(f"record_{name}")
    record = decode_record(data)
    kind = Kind(name.split("_")[0])
    assert record == Record(list(LATER).index(name) + 1, kind, MADE.TIME_MS, LATER[name])
    assert encode_record(record) == data
    assert set(record.body) == {*SCHEMAS[kind], *OPTIONAL.get(kind, {})}


def test_golden_batch() -> None:
    """A batch is the records' own bytes behind a short head: nothing is encoded twice."""
    data = golden("batch")
    batch = decode_batch(data)
    assert batch.stream == STREAM and [each.kind for each in batch.records] == list(FIRST)
    assert encode_batch(STREAM, [encode_record(each) for each in batch.records]) == data


def test_a_newer_minor_is_read_and_its_fields_are_kept() -> None:
    """A device may be updated before its server (fault 51)."""
    (record,) = decode_batch(golden("batch_newer_minor")).records
    assert record.body["new_field"] == [1, {"deep": None}]


def test_a_newer_major_is_refused_with_a_hint() -> None:
    """Guessing at a format that changed its meaning would store nonsense (fault 51)."""
    with pytest.raises(RecordError, match="version 2") as caught:
        decode_batch(golden("batch_newer_major"))
    assert "update the server first" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ack", Ack(STREAM, 70_000)),
        ("presence_online", Presence(True, STREAM)),
        ("presence_offline", Presence(False, STREAM)),
        ("nudge_tasks", Nudge("tasks")),
        ("nudge_desired", Nudge("desired")),
        ("desired", DesiredVersion(300)),
    ],
)
def test_golden_message(name: str, message: Ack | Presence | Nudge | DesiredVersion) -> None:
    """Messages have one encoding, in both directions."""
    assert message.encode() == golden(name)
    assert type(message).decode(golden(name)) == message


# --- what is refused -------------------------------------------------------------------------


def without(kind: Kind, name: str) -> dict[str, Any]:
    """Return a body that lacks a field."""
    return {key: value for key, value in BODIES[kind].items() if key != name}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in Kind for name in SCHEMAS[kind]]
)
def test_every_field_is_required_and_typed(kind: Kind, name: str) -> None:
    """The message names the field; a bool is no number, a float no count."""
    with pytest.raises(RecordError, match=f"{kind} record lacks the field '{name}'"):
        encode_record(Record(1, kind, 0, without(kind, name)))
    for value in (None, True, -1, 1.5, [None], [-1], {"a": 1, 2: 3}, "x" * 3000, SEQ_MAX + 1):
        with pytest.raises(RecordError, match=f"field '{name}' has an unacceptable value"):
            encode_record(Record(1, kind, 0, BODIES[kind] | {name: value}))


@pytest.mark.parametrize(("kind", "name"), OPTIONALS)
def test_every_optional_field_may_be_missing_and_is_typed(kind: Kind, name: str) -> None:
    """Old devices do not write it; what a new one writes wrong is refused by name."""
    whole = LATER[f"{kind}_0_2"]
    encode_record(Record(1, kind, 0, {key: each for key, each in whole.items() if key != name}))
    for value in (None, -1, 1.5, [None], [-1], {"a": 1, 2: 3}, "x" * 41, SEQ_MAX + 1, b"12345"):
        with pytest.raises(RecordError, match=f"field '{name}' has an unacceptable value"):
            encode_record(Record(1, kind, 0, whole | {name: value}))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Kind.WINDOW, {"quality": {"below": 1}}),
        (Kind.WINDOW, {"quality": {str(i): [] for i in range(17)}}),
        (Kind.WINDOW, {"projection": bytes((16 << 10) + 4)}),
        (Kind.WINDOW, {"bins_only": 1}),
        (Kind.LABELS, {"calibration": [0] * 19}),
        (Kind.LABELS, {"split": 3}),
        (Kind.CAPTURE, {"reason": "curiosity"}),
        (Kind.CAPTURE, {"data": bytes((32 << 10) + 4)}),
        (Kind.REPORTED, {"state": {"site": 5}}),
        (Kind.REPORTED, {"state": {"hardware": "x" * 41}}),
    ],
)
def test_what_an_optional_field_may_not_be(kind: Kind, fields: dict[str, Any]) -> None:
    """Bounds and shapes hold where there is a choice too."""
    with pytest.raises(RecordError, match=f"'{next(iter(fields))}'"):
        encode_record(Record(1, kind, 0, BODIES[kind] | fields))


@pytest.mark.parametrize("known", [0, 1, 200, 40_000])
def test_room_is_what_a_field_may_grow_by(known: int) -> None:
    """Whatever seq and time, and however long the field was: never refused, and little wasted."""
    body = BODIES[Kind.EVENT] | {"data": {"x": bytes(known)}}
    for more, fits in ((room(body), True), (room(body) + 40, False)):
        record = Record(SEQ_MAX, Kind.EVENT, SEQ_MAX, body | {"data": {"x": bytes(known + more)}})
        if fits:
            assert decode_record(encode_record(record)) == record
        else:
            with pytest.raises(RecordError, match="exceeds"):
                encode_record(record)


def test_a_sketch_and_the_counters_of_all_channels_are_within_bounds() -> None:
    """1,024 channels and the confidence; one more is refused, as a longer sketch is."""
    fields = {"sketch": bytes(SKETCH_BYTES_MAX), "quality": {"below": [0] * 1025}}
    encode_record(Record(1, Kind.WINDOW, 0, BODIES[Kind.WINDOW] | fields))
    for name, value in (("sketch", bytes(SKETCH_BYTES_MAX + 1)), ("quality", {"b": [0] * 1026})):
        with pytest.raises(RecordError, match=f"'{name}'"):
            encode_record(Record(1, Kind.WINDOW, 0, BODIES[Kind.WINDOW] | {name: value}))


@pytest.mark.parametrize(
    "runs",
    [
        [], [1], [0, 1], [2, 1], [1, 2, 2, 3], [5, 6, 1, 2], [1, 2, 3, "4"], [1, 2, 4, 3],
        [1, SEQ_MAX + 1],
    ],
)  # fmt: skip
def test_runs_ascend_and_do_not_touch_each_other(runs: list[Any]) -> None:
    """The server counts them as lost: no number twice."""
    with pytest.raises(RecordError, match="'runs'"):
        encode_record(Record(1, Kind.GAP, 0, BODIES[Kind.GAP] | {"runs": runs}))


@pytest.mark.parametrize(
    ("seq", "time_ms"), [(0, 0), (-1, 0), (SEQ_MAX + 1, 0), (1, -1), (1, 2**60)]
)
def test_numbers_are_bounded(seq: int, time_ms: int) -> None:
    """2**53 is exact in every reader."""
    with pytest.raises(RecordError, match="out of range"):
        encode_record(Record(seq, Kind.EVENT, time_ms, BODIES[Kind.EVENT]))
    raw = msgpack.packb([seq, "event", time_ms, BODIES[Kind.EVENT]])
    with pytest.raises(RecordError, match="record has seq"):
        decode_record(raw)


def test_sizes_are_bounded() -> None:
    """Before anything is decoded (fault 50)."""
    big = BODIES[Kind.EVENT] | {"data": {str(n): "x" * 1000 for n in range(50)}}
    with pytest.raises(RecordError, match=f"exceeds {RECORD_BYTES_MAX}"):
        encode_record(Record(1, Kind.EVENT, 0, big))
    one = encode_record(Record(1, Kind.EVENT, 0, BODIES[Kind.EVENT]))
    with pytest.raises(RecordError, match=f"exceeds {BATCH_BYTES_MAX}"):
        encode_batch(STREAM, [one] * 1000)
    with pytest.raises(RecordError, match=f"1 to {RECORDS_MAX}"):
        encode_batch(STREAM, [])
    with pytest.raises(RecordError, match=f"1 to {RECORDS_MAX}"):
        encode_batch(STREAM, [b"\xc0"] * (RECORDS_MAX + 1))
    with pytest.raises(RecordError, match="16-byte"):
        encode_batch(b"short", [one])
    for decode in (decode_batch, decode_record, Ack.decode):
        with pytest.raises(RecordError, match="exceeds"):
            decode(bytes(BATCH_BYTES_MAX + 1))


EVENT_RAW = [1, "event", 0, MADE.BODIES["event"]]


@pytest.mark.parametrize(
    "raw",
    [
        None,
        {},
        [1, STREAM],
        [True, STREAM, [EVENT_RAW]],
        [1.0, STREAM, [EVENT_RAW]],
        [1, STREAM[:15], [EVENT_RAW]],
        [1, "x" * 16, [EVENT_RAW]],
        [1, STREAM, []],
        [1, STREAM, {}],
        [1, STREAM, [EVENT_RAW, None]],
        [1, STREAM, [EVENT_RAW[:3]]],
        [1, STREAM, [[True, *EVENT_RAW[1:]]]],
        [1, STREAM, [[1, "novel", 0, {}]]],
        [1, STREAM, [[1, ["event"], 0, {}]]],
        [1, STREAM, [[1, "event", 0, []]]],
        [1, STREAM, [[1, "event", 0, {str(n): n for n in range(65)}]]],
        [1, STREAM, [EVENT_RAW] * (RECORDS_MAX + 1)],
    ],
)
def test_what_is_no_batch(raw: Any) -> None:
    """All of a batch or none of it."""
    with pytest.raises(RecordError):
        decode_batch(msgpack.packb(raw))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        golden("batch") + b"\x00",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 60_000,
        b"\x81\x01\x02",
        msgpack.packb(msgpack.ExtType(1, b"x")),
        b"\xa2\xff\xfe",
    ],
    ids=["empty", "reserved", "trailing", "array", "map", "bin", "deep", "keys", "ext", "utf8"],
)
def test_hostile_messagepack(data: bytes) -> None:
    """Lengths of 4 G, depth, types that nothing needs (fault 49)."""
    for decode in (decode_batch, decode_record, Ack.decode, Presence.decode, Nudge.decode):
        with pytest.raises(RecordError):
            decode(data)


def test_small_bytes_do_not_become_much_memory() -> None:
    """64 KiB of empty maps must not cost megabytes (fault 50)."""
    data = b"\xdc\xff\xff" + b"\x80" * 65_000
    tracemalloc.start()
    with pytest.raises(RecordError):
        decode_batch(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


# --- any bytes -------------------------------------------------------------------------------

DECODERS = (
    decode_batch, decode_record, Ack.decode, Presence.decode, Nudge.decode, DesiredVersion.decode,
)  # fmt: skip


def survives(data: bytes) -> None:
    """Hold the fuzz invariant for some bytes."""
    for decode in DECODERS:
        try:
            decode(data)
        except RecordError:
            continue


@given(st.binary(max_size=300))
def test_any_bytes_yield_a_value_or_a_record_error(data: bytes) -> None:
    """Nothing else comes out of a decoder."""
    survives(data)


def test_any_damage_to_a_good_message_yields_a_value_or_a_record_error() -> None:
    """Twenty thousand flipped, cut, doubled and spliced golden messages; the seed is fixed."""
    draw = random.Random(7)
    good = [golden(name) for name in MADE.files()]
    for _ in range(20_000):
        data = bytearray(draw.choice(good))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) + 1)
            what = draw.randrange(4)
            if what == 0 and at < len(data):
                data[at] = draw.randrange(256)
            elif what == 1:
                del data[at:]
            elif what == 2:
                data[at:at] = draw.choice(good)[: draw.randrange(40)]
            else:
                data[at:at] = bytes([draw.choice((0xC0, 0xC1, 0xDD, 0xDF, 0xC7, 0xFF))])
        survives(bytes(data))


JSONLIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**53) | st.text(max_size=8) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=8), JSONLIKE, max_size=5), min_size=1, max_size=8),
    st.integers(1, SEQ_MAX - 10),
    st.integers(0, SEQ_MAX),
)
def test_what_goes_in_comes_out(data: list[dict[str, Any]], first: int, time_ms: int) -> None:
    """Encoding and decoding a batch of events changes nothing."""
    wrote = [
        Record(first + n, Kind.EVENT, time_ms, BODIES[Kind.EVENT] | {"data": each})
        for n, each in enumerate(data)
    ]
    batch = decode_batch(encode_batch(STREAM, [encode_record(each) for each in wrote]))
    assert batch == records.Batch(STREAM, tuple(wrote))


def test_the_order_of_eviction() -> None:
    """The order of the classes is part of the format: its index is the byte on disk."""
    assert list(Priority) == ["debug", "raw", "window", "result", "vital"]
    assert {kind for kind in Kind if PRIORITY[kind] is Priority.VITAL} == {Kind.UPDATE, Kind.GAP}
