"""The console's document: nothing unknown is guessed, no device is left out of a denominator."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from shoal.server.errors import StoreError
from shoal.server.store import Store
from shoal.server.store.tables import (
    Alert,
    Device,
    DriftState,
    Labels,
    Model,
    Rollout,
    RolloutDevice,
    Stream,
)
from shoal.server.web import ConsoleConfig, views

from .conftest import DRIFTING, NOW_MS, V1, V2, WRISTS

CONFIG = ConsoleConfig()


def test_an_empty_fleet_is_empty_and_unknown(empty_store: Store) -> None:
    """Without a device there are zeros for counts and null for shares."""
    seen = views.look(empty_store, now_ms=NOW_MS, config=CONFIG)
    assert seen["summary"]["devices"] == {"total": 0, "online": 0}
    assert seen["summary"]["totals"] == {
        "devices": 0, "online": 0, "stored": 0, "lost": 0, "quarantined": 0,
    }  # fmt: skip
    assert seen["summary"]["accuracy"] == {"value": None, "devices": 0, "gain": None}
    assert seen["accuracy"]["devices"] == [] and seen["rollouts"] == [] and seen["rounds"] == []


def test_the_seeded_fleet(store: Store) -> None:
    """Devices, drift, totals, alerts and rounds are those that were written."""
    seen = views.look(store, now_ms=NOW_MS, config=CONFIG)
    devices = {row["id"]: row for row in seen["fleet"]["devices"]}
    assert list(devices) == WRISTS and seen["fleet"]["total"] == 10
    assert seen["summary"]["devices"] == {"total": 10, "online": 9}
    assert seen["summary"]["drifting"] == ["wrist-06", "wrist-09"]
    assert devices["wrist-09"]["drift"]["features"] == DRIFTING["wrist-09"]
    assert devices["wrist-03"]["drift"]["drifting"] is False  # of the model that runs now
    assert devices["wrist-03"]["model"] == {"name": "wearable", "version": 2, "sha256": V2}
    assert devices["wrist-08"]["rollout"]["state"] == "offered"
    totals = seen["summary"]["totals"]
    assert (totals["stored"], totals["lost"], totals["quarantined"]) == (590, 4, 1)
    assert seen["alerts"]["open"] == 3
    assert [alert["state"] for alert in seen["alerts"]["alerts"]] == [
        "open", "open", "open", "acknowledged", "resolved",
    ]  # fmt: skip
    assert seen["rounds"][0]["round"] == 30 and len(seen["rounds"][0]["history"]) == 30
    json.dumps(seen, allow_nan=False)


def test_rollout_counts_every_device_that_was_meant(store: Store) -> None:
    """States and waves add up to the plan, those that still wait included."""
    rollout = views.look(store, now_ms=NOW_MS, config=CONFIG)["rollouts"][0]
    assert rollout["eligible"] == 10 == sum(rollout["counts"].values())
    assert rollout["counts"]["confirmed"] == 4 and rollout["counts"]["eligible"] == 2
    assert [wave["devices"] for wave in rollout["waves"]] == [2, 8]
    first, second = rollout["waves"]
    assert first["evidence"]["verdict"] == "PASS" and second["evidence"] is None
    assert first["began_ms"] < second["began_ms"]


def test_accuracy_is_that_of_the_model_that_runs(empty_store: Store) -> None:
    """Labels of the model before count for the gain and the line, never for `now`."""
    with empty_store.begin() as session:
        session.add_all(
            [
                Device(id=1, name="a", created_ms=1, reported={"model": V2}),
                Device(id=2, name="b", created_ms=1, reported={"model": ""}),
                Stream(id=1, device_id=1, stream=b"s", first_ms=1),
            ]
        )
        session.flush()
        for seq, (model, correct) in enumerate([(V1, 50), (V1, 60), (V2, 90)]):
            session.add(
                Labels(
                    device_id=1, stream_id=1, seq=seq, number=seq, split=0, model_sha256=model,
                    received_ms=NOW_MS - 60_000 + 20_000 * seq, labelled=100, correct=correct,
                    confusion=[],
                )
            )  # fmt: skip
    seen = views.look(empty_store, now_ms=NOW_MS, config=CONFIG)
    a, b = seen["fleet"]["devices"]
    assert a["accuracy"] == {"value": 0.9, "correct": 90, "labelled": 100}
    assert a["model"] == {"sha256": V2, "name": None, "version": None}
    assert b["accuracy"] is None and b["model"] is None and b["drift"] is None
    assert seen["summary"]["accuracy"] == {"value": 0.9, "devices": 1, "gain": 0.35}
    shares = [point[1] for point in seen["accuracy"]["devices"][0]["points"]]
    assert [share for share in shares if share is not None] == [0.5, 0.6, 0.9]
    assert None in shares  # steps without labels are gaps, not zeros


def test_old_windows_say_less_of_now(empty_store: Store) -> None:
    """`Now` is the newest 200 labelled windows: what was before them does not count."""
    with empty_store.begin() as session:
        session.add(Device(id=1, name="a", created_ms=1, reported={"model": V1}))
        session.flush()
        session.add(Stream(id=1, device_id=1, stream=b"s", first_ms=1))
        session.flush()
        for seq in range(10):
            session.add(
                Labels(
                    device_id=1, stream_id=1, seq=seq, number=seq, split=0, model_sha256=V1,
                    received_ms=NOW_MS - 100_000 + 10_000 * seq, labelled=100,
                    correct=100 if seq >= 8 else 0, confusion=[],
                )
            )  # fmt: skip
    seen = views.look(empty_store, now_ms=NOW_MS, config=CONFIG)
    assert seen["fleet"]["devices"][0]["accuracy"]["value"] == 1.0


def test_a_large_fleet_is_cut_and_says_so(empty_store: Store) -> None:
    """Beyond the bound the silent and failed devices stay, and the total is still the truth."""
    with empty_store.begin() as session:
        session.add_all(
            [
                Device(id=n, name=f"d{n:03d}", created_ms=1, online=n != 77, reported={})
                for n in range(1, 101)
            ]
        )
        session.add(
            Model(name="m", version=1, sha256=V1, size=1, created_ms=1, manifest={}, profile={})
        )
        session.add(
            Rollout(id="r", model_sha256=V1, state="running", waves=[100], bake_windows=1,
                    deadline_s=1, created_ms=1, changed_ms=1)
        )  # fmt: skip
        session.flush()
        session.add(
            RolloutDevice(rollout_id="r", device_id=99, wave=0, state="failed", changed_ms=1)
        )
    seen = views.look(empty_store, now_ms=NOW_MS, config=ConsoleConfig(devices_max=3))
    assert [row["id"] for row in seen["fleet"]["devices"]] == ["d001", "d077", "d099"]
    assert seen["fleet"]["total"] == 100 == seen["summary"]["devices"]["total"]


def test_a_device_that_tells_less_than_it_sees_stays_in_a_cut_fleet(empty_store: Store) -> None:
    """It is no healthy one; what it says of itself comes with it, read and bounded."""
    state = {"monitor": {"withheld": 7}, "warnings": [{"code": "spool.flush", "text": "x" * 999}]}
    with empty_store.begin() as session:
        session.add_all(
            [
                Device(id=n, name=f"d{n}", created_ms=1, online=True, reported_ms=5,
                       reported={"model": "", "state": state if n == 9 else {}})
                for n in range(1, 10)
            ]
        )  # fmt: skip
    seen = views.look(empty_store, now_ms=NOW_MS, config=ConsoleConfig(devices_max=1))
    (device,) = seen["fleet"]["devices"]
    assert (device["id"], device["reported_ms"]) == ("d9", 5)
    assert device["untold"]["text"] == "7 predictions withheld"
    (warning,) = device["warnings"]
    assert warning["text"] == "x" * 200 and "disk" in warning["fix"]


def test_a_broken_database_is_an_error_of_ours(empty_store: Store) -> None:
    """The page gets a code and a hint, not a traceback."""
    with empty_store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE labels")
    with pytest.raises(StoreError, match="could not be read"):
        views.look(empty_store, now_ms=NOW_MS, config=CONFIG)


def test_an_alert_says_how_far_it_reaches(store: Store) -> None:
    """Scope, subject, evidence with its counts; the text without the place, which is beside it."""
    seen = views.look(store, now_ms=NOW_MS, config=CONFIG)["alerts"]["alerts"]
    site = next(alert for alert in seen if alert["scope"] == "site")
    assert (site["kind"], site["subject"], site["device"]) == ("local_shift", "north", None)
    assert site["text"].startswith("inputs of 3 of 4 devices") and site["note"] == "on my way"
    assert site["evidence"]["affected"] == 3 and site["evidence"]["rest"]["judged"] == 6
    suspected = next(alert for alert in seen if alert["scope"] == "fleet")
    assert suspected["suspected"] and suspected["tone"] == "warn"
    lost = next(alert for alert in seen if alert["kind"] == "accuracy_loss" and alert["device"])
    assert (lost["device"], lost["tone"]) == ("wrist-09", "bad")


def test_an_alert_of_an_older_server_is_shown(empty_store: Store) -> None:
    """Without scope, subject and evidence it is its device's."""
    with empty_store.begin() as session:
        session.add(Device(id=1, name="a", created_ms=1, reported={}))
        session.flush()
        session.add(
            Alert(
                device_id=1, model_sha256=V1, kind="key_conflict", state="open", evidence={},
                text="a second key", opened_ms=1,
            )
        )  # fmt: skip
    (alert,) = views.look(empty_store, now_ms=NOW_MS, config=CONFIG)["alerts"]["alerts"]
    assert (alert["subject"], alert["evidence"], alert["text"]) == ("a", None, "a second key")


def test_the_heat_map_is_bounded_and_of_the_model_that_runs(store: Store) -> None:
    """Devices by what is most unlike; sites are means of their devices; the rest is counted."""
    seen = views.look(store, now_ms=NOW_MS, config=CONFIG)["drift"]
    rows = {row["name"]: row for row in seen["devices"]}
    assert seen["looked"] == 10 and seen["more"] == 0 and len(rows) == 10
    assert [row["name"] for row in seen["devices"]][:2] == ["wrist-09", "wrist-06"]
    at = seen["features"].index("gyro_z")
    assert rows["wrist-09"]["now"][at] > 2 and rows["wrist-03"]["now"][at] < 2
    assert rows["wrist-09"]["points"][0][1][at] == 0 and len(rows["wrist-09"]["points"]) == 24
    sites = {row["name"]: row for row in seen["sites"]}
    assert {name: row["devices"] for name, row in sites.items()} == {"north": 4, "south": 5}
    south = [rows[name]["now"][at] for name in WRISTS[4:9]]
    assert sites["south"]["now"][at] == pytest.approx(sum(south) / 5, abs=0.06)
    assert 2 <= len(sites["south"]["points"]) <= 24
    few = views.look(store, now_ms=NOW_MS, config=ConsoleConfig(heat_devices_max=2))["drift"]
    assert {row["name"] for row in few["devices"]} == {"wrist-06", "wrist-09"}


def test_the_heat_map_of_many_features_says_what_it_leaves_out(store: Store) -> None:
    """The most unlike ones are drawn."""
    names = [f"f{i:02d}" for i in range(40)]
    with store.begin() as session:
        for state in session.scalars(select(DriftState)):
            points = [[NOW_MS, [float(i) / 10 for i in range(40)]]]
            state.state = {"trace": {"features": names, "points": points}}
    seen = views.look(store, now_ms=NOW_MS, config=CONFIG)["drift"]
    assert seen["features"] == names[:-13:-1] and seen["more"] == 28
    assert seen["devices"][0]["now"][0] == 3.9
