"""A window that does not fit a record loses the least useful first. Properties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.agent.window_fit import FEATURE_BYTES_MAX, Step, WindowFit, Write
from shoal.ext.sketch import SketchBank
from shoal.proto.records import (
    SEQ_MAX,
    SKETCH_BYTES_MAX,
    Kind,
    Record,
    decode_record,
    encode_record,
    room,
)

LOST: Mapping[Step, set[str]] = {
    Step.WHOLE: set(),
    Step.BINS_ALONE: set(),
    Step.NO_SCORES: {"scores"},
    Step.NO_PROJECTION: {"scores", "projection", "projected"},
}


def writer(sketches: int, bins: int) -> Write:
    """Return a bank of so many bytes, never less whatever the budget."""
    return lambda *, bins_only, bytes_max: bytes(bins if bins_only else sketches)


def body(*, count: int, classes: int, features: int, projected: int) -> dict[str, Any]:
    """Return what stands beside the sketch, all counters of one magnitude."""
    return {
        "model": "a" * 64,
        "index": SEQ_MAX,
        "start_ms": SEQ_MAX,
        "end_ms": SEQ_MAX,
        "predictions": SEQ_MAX,
        "errors": SEQ_MAX,
        "classes": [count] * classes,
        "latency_us": [count] * 64,
        "aligned_ms": SEQ_MAX,
        "quality": {
            **{name: [count] * features for name in ("below", "above", "stuck")},
            "schema": [SEQ_MAX],
            "rate": [SEQ_MAX, SEQ_MAX],
        },
        "slice": "s" * 40,
        "scores": [count] * 640,  # 64 classes: what a tap counts at most
        "projection": bytes(4 * projected),
        "projected": SEQ_MAX,
        "shed": SEQ_MAX,
        "carried": SEQ_MAX,
    }


@settings(deadline=None, max_examples=300)
@given(
    count=st.sampled_from([0, 127, 128, 255, 256, 65_535, 65_536, 1 << 33, SEQ_MAX]),
    classes=st.integers(0, 1024),
    features=st.integers(1, 1025),
    projected=st.integers(1, 256),
    bins=st.integers(0, 50 << 10),
    sketches=st.integers(0, 50 << 10),
    bins_only=st.booleans(),
)
def test_what_fits_is_never_refused_and_nothing_goes_that_could_stay(
    count: int,
    classes: int,
    features: int,
    projected: int,
    bins: int,
    sketches: int,
    bins_only: bool,
) -> None:
    """The encoder takes every window at its longest; the step before would not have fitted."""
    whole = body(count=count, classes=classes, features=features, projected=projected)
    rule = WindowFit(writer(0, 0), features=features, edges=1, bins_only=bins_only)
    write = writer(bins + sketches, bins)
    step, found = rule.fit(whole, write)
    assert (found is None) == (step is Step.WITHHELD)
    if found is not None:
        record = Record(SEQ_MAX, Kind.WINDOW, SEQ_MAX, found)
        assert decode_record(encode_record(record)) == record
        assert whole.keys() - found.keys() == LOST[step]
        alone = bins_only or step >= Step.BINS_ALONE
        assert found.get("bins_only", False) is alone
        assert len(found["sketch"]) == (bins if alone else bins + sketches)
    for better in Step:
        if better >= step or (better is Step.BINS_ALONE and bins_only):
            continue
        kept = {name: each for name, each in whole.items() if name not in LOST[better]}
        alone = bins_only or better >= Step.BINS_ALONE
        size = bins if alone else bins + sketches
        space = room(kept | {"sketch": b""} | ({"bins_only": True} if alone else {}))
        assert size > min(space, SKETCH_BYTES_MAX), better


def test_a_step_that_leaves_out_nothing_is_no_step() -> None:
    """A model of many classes has no scores to lose."""
    whole = body(count=SEQ_MAX, classes=1024, features=500, projected=256)
    del whole["scores"]
    bins = room({**whole, "sketch": b"", "bins_only": True}) + 100
    rule = WindowFit(writer(0, 0), features=500, edges=1, bins_only=False)
    step, found = rule.fit(whole, writer(bins, bins))
    assert step is Step.NO_PROJECTION and found is not None and "projection" not in found


@pytest.mark.parametrize(
    ("features", "edges", "best", "text"),
    [
        (300, 15, Step.WHOLE, ""),
        (601, 31, Step.BINS_ALONE, "bins alone: 601 features x 31 edges do not fit a record"),
        (
            1024,
            255,
            Step.WITHHELD,
            "windows are withheld: 1024 features x 255 edges do not fit a record, "
            "not even as bins alone",
        ),
    ],
)
def test_what_can_never_fit_is_known_beforehand(
    features: int, edges: int, best: Step, text: str
) -> None:
    """Of a bank that has counted nothing: counters only grow."""
    bank = SketchBank(features, edges=[np.arange(edges, dtype=np.float32)] * features)
    rule = WindowFit(bank.to_bytes, features=features, edges=edges, bins_only=False)
    assert rule.best is best and rule.hindrance(best) == text
    bank.update(np.zeros((200, features), np.float32))
    assert rule.fit({}, bank.to_bytes).step >= best


def test_picks_go_before_sketches_do() -> None:
    """The budget of a feature shrinks with the room; the record stays whole."""
    rng = np.random.default_rng(1)
    sizes = {}
    for features in (20, 400):
        edges: list[NDArray[np.float32]] = [np.array([-1, 0, 1], np.float32)] * features
        bank = SketchBank(features, edges=edges, seed=1)
        bank.update(rng.standard_normal((2_000, features)).astype(np.float32))
        rule = WindowFit(bank.to_bytes, features=features, edges=3, bins_only=False)
        step, found = rule.fit({}, bank.to_bytes)
        assert step is Step.WHOLE and found is not None and "bins_only" not in found
        sizes[features] = len(found["sketch"]) / features
        kept = SketchBank.from_bytes(found["sketch"])
        assert abs(float(kept.quantiles(features - 1, 0.5))) < 0.5
    assert 300 < sizes[20] <= FEATURE_BYTES_MAX and sizes[400] < SKETCH_BYTES_MAX / 400


def test_a_hindrance_says_what_is_missing() -> None:
    """Short enough for a warning of the reported state."""
    rule = WindowFit(writer(0, 0), features=1025, edges=255, bins_only=False)
    texts = [rule.hindrance(step) for step in Step]
    assert [each.split(":")[0] for each in texts] == [
        "",
        "bins alone",
        "bins alone, no scores",
        "bins alone, no scores, no projection",
        "windows are withheld",
    ]
    assert max(map(len, texts)) <= 150
    private = WindowFit(writer(0, 0), features=9, edges=9, bins_only=True)
    assert private.hindrance(Step.NO_SCORES).startswith("no scores:")
