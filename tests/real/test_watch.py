"""Ten real people: those whom the model never saw are told as local shifts, the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shoal.examples.watch import TEST, Windows
from shoal.server.drift.verdicts import LOCAL_SHIFT, SENSOR_FAULT
from shoal.server.store import Store
from tests.real import watch
from tests.real.watch import PEOPLE, Made, Watches

WINDOWS = 10  # of each device: about the length of its recordings
UNSEEN = (6, 7, 10)
TURNED = 9  # whose wrist turns otherwise at the end of the recordings: see below

Make = Callable[[tuple[int, ...]], Made]


@pytest.fixture(scope="module")
def data() -> dict[int, Windows]:
    """The recordings, cut."""
    return watch.load()


@pytest.fixture(scope="module")
def made(data: dict[int, Windows]) -> Make:
    """Make models of some people, each once."""
    found: dict[tuple[int, ...], Made] = {}

    def make(known: tuple[int, ...]) -> Made:
        if known not in found:
            found[known] = watch.make(data, known)
        return found[known]

    return make


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An empty store."""
    found = Store(f"sqlite:///{tmp_path_factory.mktemp('watch')}/fleet.db")
    found.migrate()
    yield found
    found.close()


def test_unseen_people_are_local_shifts(data: dict[int, Windows], made: Make, store: Store) -> None:
    """Each of them in an alert of his own device; of the seven others not a word."""
    known = tuple(person for person in PEOPLE if person not in UNSEEN)
    fleet = Watches(store, made(known), data, split=None)
    told = fleet.play(WINDOWS)
    assert fleet.stored() == (WINDOWS * len(PEOPLE), 0)
    assert {(each.kind, each.scope, each.devices) for each in told} == {
        (LOCAL_SHIFT, "device", frozenset({person})) for person in UNSEEN
    }
    assert len(told) == len(UNSEEN)
    assert all("unlike all that the model was made with" in each.text for each in told)
    report = fleet.drifting()
    assert set(report) == set(UNSEEN)
    assert all(each["kind"] == LOCAL_SHIFT and each["features"] for each in report.values())


def test_known_people_are_no_alert(data: dict[int, Windows], made: Make, store: Store) -> None:
    """The same fleet, and a model that has seen all ten: silence."""
    fleet = Watches(store, made(tuple(PEOPLE)), data, split=None)
    assert fleet.play(WINDOWS) == []
    assert fleet.stored() == (WINDOWS * len(PEOPLE), 0) and fleet.drifting() == {}


def test_known_people_at_another_time(data: dict[int, Windows], made: Make, store: Store) -> None:
    """The last quarters of the recordings, which no profile saw: nine people are as before.

    The ninth is not: turns about his z axis have moved by a Hellinger distance of .11 since his
    training windows, those of the others by .04 to .07. Nothing more than that may be told.
    """
    fleet = Watches(store, made(tuple(PEOPLE)), data, split=TEST)
    told = fleet.play(WINDOWS)
    assert {each.devices for each in told} <= {frozenset({TURNED})}
    assert {each.kind for each in told} <= {LOCAL_SHIFT, SENSOR_FAULT}
    assert set(fleet.drifting()) <= {TURNED}
    assert all("gyro_z" in each.text for each in told)
