"""The recordings are those that were released, and no sample is in two splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.examples import extract_watch, watch


@pytest.fixture(scope="module")
def data() -> watch.Watch:
    """The recordings."""
    return watch.load()


@pytest.fixture(scope="module")
def released() -> bytes:
    """The bytes of the file."""
    return (Path(watch.__file__).parent / "watch.npz").read_bytes()


def numbered(*lengths: int) -> watch.Watch:
    """Recordings of person 1 whose samples say which recording and which time they are from."""
    recordings = []
    for i, length in enumerate(lengths):
        samples = np.zeros((length, 6), np.float32)
        samples[:, 0], samples[:, 1] = i, np.arange(length)
        recordings.append(watch.Recording(1, i % 7, i % 2, samples))
    return watch.Watch(tuple(recordings))


def test_the_recordings_are_all_there(data: watch.Watch) -> None:
    """140 recordings of ten people, seven exercises and two arms."""
    assert len(data.recordings) == 140
    assert sum(len(each.samples__td) for each in data.recordings) == 244_102
    keys = {(each.subject, each.exercise, each.side) for each in data.recordings}
    assert {key[0] for key in keys} == set(range(1, 11))
    assert {key[1] for key in keys} == set(range(len(watch.EXERCISES)))
    assert {key[2] for key in keys} == {0, 1}
    for each in data.recordings:
        assert each.samples__td.dtype == np.float32
        assert each.samples__td.shape[1] == len(watch.CHANNELS)
        assert np.isfinite(each.samples__td).all()


def test_the_acceleration_is_in_g(data: watch.Watch) -> None:
    """At rest it is 1."""
    samples = np.concatenate([each.samples__td for each in data.recordings])
    assert np.median(np.linalg.norm(samples[:, :3], axis=1)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("at", [0, 1000, 2_000_000, -1])
def test_a_changed_byte_is_found(released: bytes, at: int) -> None:
    """Wherever it is."""
    damaged = bytearray(released)
    damaged[at] ^= 1
    with pytest.raises(watch.DataError, match="damaged") as caught:
        watch.parse(bytes(damaged))
    assert caught.value.hint and caught.value.code == "examples.data"


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_short_file_is_found(released: bytes, size: int) -> None:
    """As a copy that broke off."""
    with pytest.raises(watch.DataError, match="damaged"):
        watch.parse(released[:size])


def test_a_missing_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a damaged installation."""
    monkeypatch.setattr(watch, "files", lambda _: tmp_path)
    with pytest.raises(watch.DataError, match="missing"):
        watch.load()


def test_the_windows_of_a_person(data: watch.Watch) -> None:
    """Shapes, dtypes, and every exercise in every split."""
    for subject in range(1, 11):
        found = watch.windows(data, subject)
        n = len(found.y__n)
        assert found.x__nct.shape == (n, 6, watch.SIZE) and found.x__nct.dtype == np.float32
        assert found.x__nct.flags.c_contiguous
        assert found.y__n.dtype == np.int64 and found.split__n.dtype == np.uint8
        # Every exercise can be learned, validated and tested.
        for split in (watch.TRAIN, watch.VALIDATION, watch.TEST):
            exercises = found.y__n[found.split__n == split]
            assert set(exercises.tolist()) == set(range(7)), (subject, split)
        assert sorted(found.order.tolist()) == list(range(n))


def test_the_stream_mixes_exercises_in_bouts(data: watch.Watch) -> None:
    """Any 100 windows in a row are a mixture, neighbours mostly agree."""
    for subject in range(1, 11):
        found = watch.windows(data, subject)
        streamed = found.y__n[found.order]
        for start in range(0, len(streamed) - 100, 50):
            assert len(set(streamed[start : start + 100].tolist())) >= 5
        same = (streamed[1:] == streamed[:-1]).mean()
        assert same >= 0.7  # neighbours are mostly of one bout: people do not change every 0.8 s


def test_the_order_is_of_its_seed(data: watch.Watch) -> None:
    """The same seed gives the same order."""
    first, again, other = (watch.windows(data, 3, seed=seed).order for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    size=st.integers(1, 60),
    stride=st.integers(1, 50),
)
def test_splits_share_no_sample(lengths: list[int], size: int, stride: int) -> None:
    """Whatever the lengths, the size and the stride."""
    data = numbered(*lengths)
    try:
        found = watch.windows(data, 1, size=size, stride=stride)
    except ValueError:
        assert all(0.6 * length < size for length in lengths)
        return
    seen: list[set[tuple[int, int]]] = [set(), set(), set()]
    for window, label, split in zip(found.x__nct, found.y__n, found.split__n, strict=True):
        recording, times = int(window[0, 0]), window[1].astype(int)
        assert (window[0] == recording).all() and label == recording % 7
        assert times.tolist() == list(range(times[0], times[0] + size))
        seen[split] |= {(recording, int(time)) for time in times}
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    for i in range(len(lengths)):  # time goes on from training over validation to test
        last = {s: max(t for r, t in seen[s] if r == i) for s in range(3) if i in dict(seen[s])}
        assert list(last.values()) == sorted(last.values())
    assert sorted(found.order.tolist()) == list(range(len(found.y__n)))


@pytest.mark.parametrize(
    ("subject", "size", "stride", "says"),
    [
        (0, 100, 40, "no person 0"),
        (11, 100, 40, "no person 11"),
        (1, 0, 40, "at least 1"),
        (1, 100, 0, "at least 1"),
        (1, 100_000, 40, "100000 samples"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    data: watch.Watch, subject: int, size: int, stride: int, says: str
) -> None:
    """The message says what was wrong."""
    with pytest.raises(ValueError, match=says):
        watch.windows(data, subject, size=size, stride=stride)


def test_the_extraction_keeps_all_to_half_a_step(tmp_path: Path) -> None:
    """Values, lengths and facts."""
    rng = np.random.default_rng(0)
    pieces = [rng.normal(0, [1, 1, 1, 5, 5, 5], (n, 6)) for n in (30, 50)]
    raw = {"X": pieces, "y": [3, 4], "subject": [1, 2], "side": [0, 1]}
    source, target = tmp_path / "raw.npy", tmp_path / "watch.npz"
    np.save(source, np.array(raw, object), allow_pickle=True)
    extract_watch.extract(source, target)
    with np.load(target, allow_pickle=False) as found:
        back = found["samples__nd"] * found["scale__d"]
        assert found["samples__nd"].dtype == np.int16
        step = np.abs(np.concatenate(pieces)).max(0) / 32_767
        assert (np.abs(back - np.concatenate(pieces)) <= 0.5001 * step).all()
        assert found["length__r"].tolist() == [30, 50] and found["side__r"].tolist() == [0, 1]
        assert found["subject__r"].tolist() == [1, 2] and found["exercise__r"].tolist() == [3, 4]
