"""The life of an alert: the table, flapping, silences; an illegal event changes nothing."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.drift import alerts
from shoal.server.drift.alerts import (
    ALERT,
    LIVE,
    Again,
    AlertConfig,
    AlertEvent,
    AlertState,
    Life,
)
from shoal.server.drift.errors import AlertEventError

CONFIG = AlertConfig(flap_s=3600, repair_s=900)
S, E = AlertState, AlertEvent
T = 1_000_000


def after(life: Life, event: AlertEvent, at_ms: int, **said: object) -> Life:
    """Return the life after an event at a time."""
    if event is E.SILENCE:
        said.setdefault("until_ms", at_ms + 60_000)
    return alerts.after(life, event, now_ms=at_ms, **said)  # type: ignore[arg-type]


@pytest.mark.parametrize(("state", "event"), list(product(S, E)))
def test_every_pair_is_in_the_table_or_refused(state: AlertState, event: AlertEvent) -> None:
    """What the table lacks raises, says the state, and leaves the life as it was."""
    life = Life(state=state, opened_ms=1, seen_ms=1, changed_ms=1, silenced_until_ms=5)
    if event in ALERT[state]:
        assert after(life, event, T).state is ALERT[state][event]
        return
    with pytest.raises(AlertEventError, match=f"is {state.value} does not take"):
        after(life, event, T)
    assert life == Life(state=state, opened_ms=1, seen_ms=1, changed_ms=1, silenced_until_ms=5)


def test_what_is_over_is_only_opened_by_being_found() -> None:
    """An operator cannot acknowledge, silence or resolve what is resolved."""
    assert set(ALERT[S.RESOLVED]) == {E.FOUND}
    assert all(E.RESOLVE in ALERT[state] and E.FOUND in ALERT[state] for state in LIVE)


def test_finding_it_again_counts_and_changes_nothing_else() -> None:
    """Also what an operator acknowledged or silenced."""
    life = alerts.begun(T)
    for state, event in ((S.OPEN, None), (S.ACKNOWLEDGED, E.ACKNOWLEDGE), (S.SILENCED, E.SILENCE)):
        if event:
            life = after(life, event, T + 5, actor="operator", note="mine")
        before, life = life, after(life, E.FOUND, T + 10)
        assert (life.state, life.seen, life.seen_ms) == (state, before.seen + 1, T + 10)
        assert (life.changed_ms, life.actor, life.note) == (
            before.changed_ms, before.actor, before.note,
        )  # fmt: skip


def test_a_silence_ends_at_its_time_and_needs_one() -> None:
    """It wakes up to open; a second silence replaces the first."""
    life = after(alerts.begun(T), E.SILENCE, T, until_ms=T + 100, actor="operator")
    assert not alerts.due(life, now_ms=T + 99) and alerts.due(life, now_ms=T + 100)
    longer = after(life, E.SILENCE, T + 50, until_ms=T + 500)
    assert not alerts.due(longer, now_ms=T + 100)
    awake = after(life, E.SILENCE_OVER, T + 100)
    assert (awake.state, awake.silenced_until_ms, awake.actor) == (S.OPEN, None, "")
    for until_ms in (None, T, T - 1):
        with pytest.raises(AlertEventError, match="end in the future"):
            alerts.after(alerts.begun(T), E.SILENCE, now_ms=T, until_ms=until_ms)


def test_a_flapping_alert_is_one_alert() -> None:
    """Found again soon it opens again and counts on; found long after it is a new one."""
    life = after(alerts.begun(T), E.CLEARED, T + 1000)
    assert (life.state, life.resolved_ms) == (S.RESOLVED, T + 1000)
    soon, late = T + 1000 + 3_599_999, T + 1000 + 3_600_000
    assert alerts.again(life, now_ms=soon, config=CONFIG) is Again.SAME
    assert alerts.again(life, now_ms=late, config=CONFIG) is Again.NEW
    back = after(life, E.FOUND, soon)
    assert (back.state, back.resolved_ms, back.seen, back.opened_ms) == (S.OPEN, None, 2, T)
    assert alerts.again(None, now_ms=T, config=CONFIG) is Again.NEW
    assert alerts.again(back, now_ms=late, config=CONFIG) is Again.SAME


def test_a_flapping_alert_that_is_silenced_stays_silent() -> None:
    """The operator said until when; that it went away in between does not change it."""
    life = after(alerts.begun(T), E.SILENCE, T, until_ms=T + 10_000)
    life = after(life, E.CLEARED, T + 1000)
    assert after(life, E.FOUND, T + 2000).state is S.SILENCED
    late = after(life, E.FOUND, T + 10_000)
    assert (late.state, late.silenced_until_ms) == (S.OPEN, None)
    ended = after(after(alerts.begun(T), E.SILENCE, T), E.RESOLVE, T + 1, actor="operator")
    assert after(ended, E.FOUND, T + 2).state is S.OPEN  # who says that it is over, ends both


def test_what_an_operator_resolved_is_given_time_for_the_repair() -> None:
    """The evidence looks back on windows of before it."""
    life = after(alerts.begun(T), E.RESOLVE, T, actor="operator", note="new cable")
    assert alerts.again(life, now_ms=T + 899_999, config=CONFIG) is Again.WAIT
    assert alerts.again(life, now_ms=T + 900_000, config=CONFIG) is Again.SAME
    server = after(alerts.begun(T), E.CLEARED, T)
    assert alerts.again(server, now_ms=T + 1, config=CONFIG) is Again.SAME


@given(st.lists(st.sampled_from(list(E)), max_size=30))
def test_no_order_of_events_leaves_a_contradiction(events: list[AlertEvent]) -> None:
    """A live alert has no end, a resolved one has; a silenced one has a time."""
    life, now_ms = alerts.begun(T), T
    for event in events:
        now_ms += 1000
        if event not in ALERT[life.state]:
            continue
        life = after(life, event, now_ms)
        assert (life.state is S.RESOLVED) == (life.resolved_ms is not None)
        assert life.state is not S.SILENCED or life.silenced_until_ms is not None
        assert life.state not in (S.OPEN, S.ACKNOWLEDGED) or life.silenced_until_ms is None
        assert T <= life.opened_ms <= life.seen_ms <= now_ms and life.changed_ms <= now_ms


def test_fingerprints_are_told_apart() -> None:
    """No site's name can make one alert look like another."""
    made = {
        alerts.fingerprint("local_shift", scope, subject, model)
        for scope, subject, model in product(
            ("device", "site"), ("a", 'a","b', "a,b", ""), ("m", "n")
        )
    }
    assert len(made) == 16


def test_the_documentation_has_the_table() -> None:
    """It is made from it: ``alerts.table_markdown()``."""
    text = (Path(__file__).parents[3] / "docs" / "alerts.md").read_text()
    assert alerts.table_markdown() in text


@pytest.mark.parametrize("change", [{"flap_s": 100}, {"repair_s": -1}, {"silence_s_max": 0}])
def test_limits_of_the_configuration(change: dict[str, int]) -> None:
    """Nonsense is refused at once."""
    with pytest.raises(ValueError, match="must"):
        AlertConfig(**change)
