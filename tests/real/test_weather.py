"""Fifty years of weather: a shift and a loss are told apart, and only the loss is learned from.

`python -m tests.real.fetch` brings the data; without it these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.server.drift.verdicts import ACCURACY_LOSS, FLEET_SHIFT, LOCAL_SHIFT, SENSOR_FAULT
from shoal.server.store import Store
from tests.models.fetch import FOLDER, digest
from tests.real import weather
from tests.real.fetch import WEATHER
from tests.real.weather import BREAK, LAST, REFERENCE, Days, Made, Play, Station

SHIFTS = (LOCAL_SHIFT, FLEET_SHIFT, SENSOR_FAULT)
SEED = 2


@pytest.fixture(scope="module")
def days() -> Days:
    """The stream; skip if it was not brought."""
    path = FOLDER / WEATHER.file
    if not path.exists():
        pytest.skip(f"{path.name} is not here: run `python -m tests.real.fetch`")
    assert digest(path) == WEATHER.sha256
    return weather.load(path)


@pytest.fixture(scope="module")
def model(days: Days) -> Made:
    """The model of the first quarter."""
    return weather.make(days.take(slice(0, REFERENCE)), groups=weather.GROUPS, seed=SEED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Store]]:
    """Make stores."""
    made: list[Store] = []

    def new() -> Store:
        made.append(Store(f"sqlite:///{tmp_path_factory.mktemp('weather')}/fleet.db"))
        made[-1].migrate()
        return made[-1]

    yield new
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def story(
    days: Days, model: Made, store: Callable[[], Store]
) -> tuple[Play, Sequence[tuple[str, dict[str, Any]]]]:
    """The other three quarters, played with a policy that may retrain by itself."""
    train = weather.trainer(days, seed=SEED)
    station = Station(store(), model, train=train)
    return station.play(days.take(slice(REFERENCE, None)), start=REFERENCE), station.audit()


def test_the_shift_is_told_long_before_the_loss(story: tuple[Play, Any]) -> None:
    """The first word is of the inputs; the loss is told once it is there, as another alert."""
    played, _ = story
    shift = min(each.day for each in played.told if each.kind in SHIFTS)
    loss = played.first(ACCURACY_LOSS)
    assert shift < BREAK - 5_000
    wide = played.first(LOCAL_SHIFT)
    assert wide is not None and wide < BREAK
    assert loss is not None and BREAK < loss < BREAK + 2_000
    assert any("visibility" in each.text for each in played.told if each.day == shift)
    kinds = next(kinds for day, kinds in played.live if day == loss)
    assert ACCURACY_LOSS in kinds and set(kinds) & set(SHIFTS)
    assert not any(each.suspected for each in played.told if each.kind == ACCURACY_LOSS)


def test_only_the_loss_retrains(story: tuple[Play, Any]) -> None:
    """Thousands of days of shift ask for nothing; every run names the labels that asked for it."""
    played, log = story
    losses = [each for each in played.told if each.kind == ACCURACY_LOSS]
    decided = [detail for action, detail in log if action == "retraining.decided"]
    asked = sorted([*played.retrained, *played.refused])
    assert played.retrained and asked[0] == losses[0].day
    assert len(asked) == len(decided)
    assert {detail["trigger"] for detail in decided} == {"accuracy_loss"}
    assert {action for action, _ in log} == {"retraining.decided", "retraining.started"}


def test_a_replaced_model_is_not_retrained(story: tuple[Play, Any]) -> None:
    """Each model asks for one run at most: what comes of it late is about the one before."""
    _, log = story
    decided = [detail["labels_new"] for action, detail in log if action == "retraining.decided"]
    assert all(count < 3_000 for count in decided[1:])


def test_a_model_that_is_no_better_does_not_run(story: tuple[Play, Any]) -> None:
    """At first there are too few days of the new world; asked again with more, it is."""
    played, _ = story
    assert played.refused and min(played.refused) < min(played.retrained)


def test_retraining_pays(days: Days, model: Made, story: tuple[Play, Any]) -> None:
    """On the last quarter the first model has fallen to about .605; the ones after it hold."""
    played, _ = story
    end = REFERENCE + len(played.right__n)
    _, frozen__n = model.answers(days)
    before = frozen__n[REFERENCE:BREAK].mean()
    frozen, retrained = frozen__n[LAST:end].mean(), played.right__n[LAST - REFERENCE :].mean()
    assert before > 0.76
    assert 0.57 < frozen < 0.65
    assert retrained > 0.69 and retrained > frozen + 0.07


@pytest.mark.parametrize("draw", [weather.shuffled, weather.other_years])
def test_no_drift_no_word(
    days: Days, model: Made, draw: Callable[[np.random.Generator, int], NDArray[np.int64]]
) -> None:
    """240 months of days like the reference's, six times over: no alarm of any kind."""
    orders = [draw(np.random.default_rng(seed), 240 * weather.SIZE) for seed in range(6)]
    found = weather.opened(model, days.take(slice(0, REFERENCE)), orders)
    assert found == [[]] * 6


def test_no_drift_no_word_of_the_worker(
    days: Days, model: Made, store: Callable[[], Store]
) -> None:
    """The same through the store: no alert, and nothing is proposed."""
    order = weather.other_years(np.random.default_rng(99), 200 * weather.SIZE)
    station = Station(store(), model)
    assert station.play(days.take(order)).told == []
    assert station.audit() == []


def test_the_control_can_speak(days: Days, model: Made) -> None:
    """The same short way finds what is there: the days after the break."""
    (found,) = weather.opened(model, days, [np.arange(BREAK, len(days))])
    assert {"shift", "loss"} <= set(found)
