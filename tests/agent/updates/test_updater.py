"""Stories: what a device does with honest, broken and evil servers (faults A, B 18, F 56-58).

The invariant of every refusal: the active bundle is untouched, nothing that was refused is tried
again by itself, and the fleet is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from shoal.agent.errors import ModelFormatError
from shoal.agent.updates import UpdateConfig, Updater
from shoal.agent.updates.errors import (
    AssignmentError,
    BundleRejectedError,
    ClockError,
    EndlessDataError,
    IllegalEventError,
    MetadataError,
    NotApprovedError,
    RemoteError,
    ReplayError,
    RollbackError,
    SlowDownloadError,
    SpaceError,
    StaleMetadataError,
    UpdateBusyError,
    UpdateError,
)
from shoal.agent.updates.fs import Disk
from shoal.agent.updates.metadata import Approvals
from shoal.agent.updates.slots import TRANSITIONS, Event, Held, Phase, SlotState, step
from shoal.proto.bundle import Manifest, pack
from shoal.proto.errors import SignatureError
from shoal.proto.records import Kind, check_body
from tests.sims.repository import DAY_MS, RepositorySimulator, SignedAssignment

CONFIG = UpdateConfig(bundle_bytes_max=1 << 20, rate_bytes_s_min=1000, grace_s=5, deadline_s=600)


def make_bundle(number: int, size: int = 8000) -> bytes:
    """Return a valid bundle of a little more than ``size`` bytes."""
    manifest = Manifest(
        name="demo", model="model.onnx", input="x", output="p", channels=("c",),
        classes=("a", "b"), samples=4,
    )  # fmt: skip
    graph = bytes((number * 7 + i) % 251 for i in range(size))
    return pack(manifest, {"model.onnx": graph, "golden.npz": b"g", "profile.json": b"{}"})


@dataclass
class Device:
    """One device with its disk, and the server it talks to."""

    root: Path
    repo: RepositorySimulator = field(default_factory=RepositorySimulator)
    told: list[tuple[int, str]] = field(default_factory=list)
    """(counter, state) of every UPDATE record."""
    events: list[str] = field(default_factory=list)
    """Code or name of every EVENT record."""
    tested: int = 0
    unfit: bool = False
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        """Start it."""
        self.root.mkdir(exist_ok=True)
        self.reboot()

    def reboot(self) -> Path | None:
        """Forget all that is in memory, and boot."""
        approvals = Approvals(
            self.root / "metadata", tuf_root=self.repo.files["1.root.json"], remote=self.repo,
            fs=self.disk, config=CONFIG, clock=self.repo.time.clock,
            monotonic=self.repo.time.monotonic,
        )  # fmt: skip
        self.updater = Updater(
            self.root, device="wrist-01",
            director_key=self.repo.director.public_key().public_bytes_raw(),
            approvals=approvals, remote=self.repo, self_test=self.self_test, emit=self.emit,
            clock=self.repo.time.clock, config=CONFIG, fs=self.disk,
            monotonic=self.repo.time.monotonic, sleep=self.repo.time.sleep,
        )  # fmt: skip
        return self.updater.boot()

    def self_test(self, path: Path) -> None:
        """Stand in for the child process."""
        assert path.is_file()
        self.tested += 1
        if self.unfit:
            raise ModelFormatError("golden vectors differ")

    def emit(self, kind: Kind, body: dict[str, Any]) -> None:
        """Take a record."""
        check_body(kind, body)
        if kind is Kind.UPDATE:
            self.told.append((body["counter"], body["state"]))
        else:
            self.events.append(body["data"].get("code", body["name"]))

    def apply(self, signed: SignedAssignment) -> Path | None:
        """Bring an assignment as far as its trial."""
        return self.updater.apply_here(signed)

    def install(self, number: int, counter: int) -> bytes:
        """Approve, assign, try and confirm a bundle."""
        data = make_bundle(number)
        path = f"models/demo/{number}"
        self.repo.approve(path, data)
        found = self.apply(self.repo.assign(path, counter=counter))
        assert found is not None and found.read_bytes() == data
        self.updater.trial_passed()
        return data


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """A device that runs bundle 1, by assignment 1."""
    device = Device(tmp_path / "state")
    device.install(1, counter=1)
    device.told.clear()
    return device


def offer(device: Device, number: int = 2, counter: int = 2) -> SignedAssignment:
    """Approve another bundle and assign it."""
    device.repo.approve(f"models/demo/{number}", make_bundle(number))
    return device.repo.assign(f"models/demo/{number}", counter=counter)


def runs(device: Device, number: int) -> bool:
    """Return whether the device, started anew, would load this bundle as confirmed."""
    path = device.reboot()
    assert path is not None
    return not device.updater.in_trial and path.read_bytes() == make_bundle(number)


# --- the road --------------------------------------------------------------------------------


def test_an_update_is_told_step_by_step(device: Device) -> None:
    """Each state is told when it is true, and confirmed only after the trial."""
    path = device.apply(offer(device))
    assert device.updater.in_trial and path is not None
    assert [state for _, state in device.told] == ["offered", "downloading", "verified", "trial"]
    fallback = device.updater.fallback()
    assert fallback is not None and fallback.read_bytes() == make_bundle(1)
    device.updater.trial_passed()
    assert device.told[-1] == (2, "confirmed")
    assert runs(device, 2)


def test_apply_works_off_the_loop(device: Device) -> None:
    """The asynchronous face does the same."""
    path = asyncio.run(device.updater.apply(offer(device)))
    assert path is not None and path.read_bytes() == make_bundle(2)


def test_a_cancelled_update_ends_its_thread(device: Device) -> None:
    """The agent stops in the middle of a download: the thread ends at its next chunk."""
    signed = offer(device)
    at_chunk, go_on = threading.Event(), threading.Event()

    def waits(data: bytes) -> bytes:
        at_chunk.set()
        assert go_on.wait(20)
        return data

    device.repo.tamper = waits

    async def story() -> None:
        task = asyncio.create_task(device.updater.apply(signed))
        assert await asyncio.to_thread(at_chunk.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(story())  # returns when the thread has ended
    assert device.told[-1] == (2, "downloading")
    assert next(device.root.glob("?/part")).stat().st_size == device.repo.chunk
    device.repo.tamper = None
    assert device.apply(signed) is not None


def test_an_expired_assignment_that_was_carried_out_is_nothing_to_do(device: Device) -> None:
    """The device asks for years and stays as it is: no alarm."""
    signed = device.repo.assign("models/demo/1", counter=1)
    device.repo.time.now_ms += 30 * DAY_MS
    assert device.apply(signed) is None
    assert device.events == []


def test_the_same_refusal_is_told_once(device: Device) -> None:
    """A device that polls a stale server does not flood its spool."""
    signed = offer(device)
    device.repo.time.now_ms += 2 * DAY_MS
    for _ in range(3):
        with pytest.raises(StaleMetadataError):
            device.apply(signed)
    assert device.events == ["agent.update.stale_metadata"]


def test_the_same_assignment_again_is_nothing_to_do(device: Device) -> None:
    """A device asks again and again; only the first time something happens."""
    signed = offer(device)
    device.apply(signed)
    with pytest.raises(UpdateBusyError):
        device.apply(signed)
    device.updater.trial_passed()
    told = len(device.told)
    assert device.apply(signed) is None
    assert len(device.told) == told


def test_a_failed_trial_goes_back_and_is_not_repeated(device: Device) -> None:
    """The fleet hears why; the same assignment is not tried again, a newer one is."""
    signed = offer(device)
    device.apply(signed)
    device.updater.trial_failed("too slow")
    assert device.told[-1] == (2, "failed")
    assert device.apply(signed) is None
    assert runs(device, 1)
    device.install(3, counter=3)
    assert runs(device, 3)


def test_three_loads_without_a_pass_are_the_end(device: Device) -> None:
    """A bundle that takes the agent down is loaded three times, then never again (fault 54)."""
    device.apply(offer(device))  # the first load
    for _ in range(2):
        assert device.reboot() is not None and device.updater.in_trial
    assert runs(device, 1)
    assert device.told[-1] == (2, "failed")


def test_a_rollback_by_the_fleet_needs_no_download(device: Device) -> None:
    """The bundle before is in the other slot; a new assignment brings it back at once."""
    device.install(2, counter=2)
    device.repo.asked.clear()
    path = device.apply(device.repo.assign("models/demo/1", counter=3))
    assert path is not None
    device.updater.trial_passed()
    assert runs(device, 1)
    assert not [asked for asked in device.repo.asked if "@" in asked]


def test_an_assignment_of_what_runs_is_confirmed_at_once(device: Device) -> None:
    """Nothing to swap: the counter rises, and the fleet hears it."""
    assert device.apply(device.repo.assign("models/demo/1", counter=2)) is None
    assert device.told == [(2, "confirmed")]


def test_the_last_outcome_is_told_again_at_boot(device: Device) -> None:
    """A crash may come between the slots and the spool; the fleet takes it once."""
    device.told.clear()
    device.reboot()
    assert device.told == [(1, "confirmed")]


# --- A: the server, the network --------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 17, 4000, -1])
def test_a_flipped_bit_is_found(device: Device, offset: int) -> None:
    """Fault 1: the part is thrown away, the slot untouched, the assignment given up."""

    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[offset] ^= 4
        return bytes(changed)

    signed = offer(device)
    device.repo.tamper = flip
    with pytest.raises(BundleRejectedError, match="hash"):
        device.apply(signed)
    assert device.told[-1] == (2, "failed")
    assert not list(device.root.glob("?/part"))
    assert runs(device, 1)


def test_an_unknown_key_is_refused(device: Device) -> None:
    """Fault 2: timestamp signed by a fresh key."""
    signed = offer(device)
    forged = [CryptoSigner.generate_ed25519()]
    device.repo.files["timestamp.json"] = device.repo.sign(device.repo.timestamp, forged)
    with pytest.raises(MetadataError):
        device.apply(signed)
    assert device.events == ["agent.update.metadata"]
    assert runs(device, 1)
    device.repo.publish()
    assert device.apply(signed) is not None, "the old trusted set was kept"


def test_one_root_signature_of_two_is_not_enough(device: Device) -> None:
    """Fault 3: a stripped signature, and one key that signs under two ids."""
    repo = device.repo
    signed = offer(device)
    repo.rotate_root()
    whole = repo.files["2.root.json"]
    repo.files["2.root.json"] = repo.sign(repo.root, repo.signers["root"][:1])
    with pytest.raises(MetadataError):
        device.apply(signed)
    twice = repo.sign(repo.root, repo.signers["root"][:1])
    first = repo.signers["root"][0].public_key.keyid.encode()

    document = json.loads(twice)
    document["signatures"].append({**document["signatures"][0], "keyid": "0" * len(first)})
    repo.files["2.root.json"] = json.dumps(document).encode()
    with pytest.raises(MetadataError):
        device.apply(signed)
    repo.files["2.root.json"] = whole
    assert device.apply(signed) is not None


def test_metadata_cannot_go_back(device: Device) -> None:
    """Fault 4: timestamp and snapshot of before."""
    old = dict(device.repo.files)
    device.install(2, counter=2)
    signed = offer(device, 3, counter=3)
    device.repo.files["timestamp.json"] = old["timestamp.json"]
    with pytest.raises(RollbackError):
        device.apply(signed)
    assert runs(device, 2)


def test_metadata_cannot_go_back_after_a_power_cut_emptied_it(device: Device) -> None:
    """Fault 5: python-tuf alone accepts this; the device's own floor does not."""
    old = dict(device.repo.files)
    device.install(2, counter=2)
    for name in ("timestamp.json", "snapshot.json"):
        (device.root / "metadata" / name).write_bytes(b"")
    device.repo.files = {**device.repo.files, "timestamp.json": old["timestamp.json"]}
    device.reboot()
    with pytest.raises(RollbackError, match="this device has seen"):
        device.apply(device.repo.assign("models/demo/1", counter=3))
    assert runs(device, 2)


def test_an_old_assignment_is_refused(device: Device) -> None:
    """Fault 6: a recorded assignment, validly signed, played again."""
    first = device.repo.assign("models/demo/1", counter=1)
    device.install(2, counter=2)
    for signed in (first, device.repo.assign("models/demo/1", counter=2)):
        with pytest.raises(ReplayError):
            device.apply(signed)
    assert device.events == ["agent.update.replay"] * 2
    assert runs(device, 2)


def test_frozen_metadata_installs_nothing(device: Device) -> None:
    """Fault 7: the same valid metadata for two days; the device keeps serving."""
    signed = offer(device)
    device.repo.time.now_ms += 2 * DAY_MS
    with pytest.raises(StaleMetadataError) as caught:
        device.apply(signed)
    assert caught.value.retry
    assert runs(device, 1)
    device.repo.publish()
    assert device.apply(signed) is not None


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_metadata_of_two_times_does_not_mix(device: Device, role: str) -> None:
    """Fault 8: a new timestamp with an older snapshot or targets under the new name."""
    repo = device.repo
    versions = {"snapshot": repo.snapshot.version, "targets": repo.targets.version}
    old = repo.files[f"{versions[role]}.{role}.json"]
    signed = offer(device)
    repo.files[f"{versions[role] + 1}.{role}.json"] = old
    with pytest.raises(MetadataError):
        device.apply(signed)
    assert runs(device, 1)


def test_endless_metadata_ends(device: Device) -> None:
    """Fault 9, metadata: more than the bound."""
    signed = offer(device)
    device.repo.files["timestamp.json"] += b" " * 20_000
    with pytest.raises(MetadataError):
        device.apply(signed)


def test_endless_data_ends(device: Device) -> None:
    """Fault 9: at most one chunk more than the bundle comes, and it is not written."""
    signed = offer(device)
    device.repo.endless, device.repo.chunk = True, 3001
    with pytest.raises(EndlessDataError):
        device.apply(signed)
    assert not list(device.root.glob("?/part"))
    assert runs(device, 1)


def test_a_drip_feed_ends_and_resumes(device: Device) -> None:
    """Fault 10: a byte every few seconds; the part is kept for a better time."""
    signed = offer(device)
    device.repo.chunk, device.repo.drip_s = 10, 2.0
    before_ms = device.repo.time.now_ms
    with pytest.raises(SlowDownloadError):
        device.apply(signed)
    assert device.repo.time.now_ms - before_ms < 60_000
    part = next(device.root.glob("?/part"))
    held = part.stat().st_size
    assert 0 < held < 100
    device.repo.chunk, device.repo.drip_s = 1000, 0.0
    device.reboot()
    device.repo.asked.clear()
    assert device.apply(signed) is not None
    assert any(asked.endswith(f"@{held}") for asked in device.repo.asked)


def test_silence_ends_too(device: Device) -> None:
    """Fault 10: not one byte comes; the stream's own deadline ends it."""
    signed = offer(device)
    device.repo.drip_s = 1e6
    for _ in range(2):
        before_ms = device.repo.time.now_ms
        with pytest.raises((SlowDownloadError, RemoteError)):
            device.apply(signed)
        assert device.repo.time.now_ms - before_ms <= 130_000
    assert runs(device, 1)


def test_a_broken_connection_is_taken_up_again(device: Device) -> None:
    """Streams that break after two chunks: the download goes on where it was."""
    signed = offer(device)
    device.repo.cut_after = 2
    assert device.apply(signed) is not None
    offsets = [int(asked.partition("@")[2]) for asked in device.repo.asked if "@" in asked]
    assert offsets[-5:] == [0, 2000, 4000, 6000, 8000]


def test_a_server_that_is_down_is_tried_later(device: Device) -> None:
    """Nothing is given up because nobody answers."""
    signed = offer(device)
    device.repo.down = True
    with pytest.raises(RemoteError) as caught:
        device.apply(signed)
    assert caught.value.retry
    device.repo.down = False
    assert device.apply(signed) is not None


def test_a_torn_part_is_fetched_again_once(device: Device) -> None:
    """What a power cut did to a part proves nothing about the server."""
    signed = offer(device)
    device.repo.cut_after = 0
    with pytest.raises(RemoteError):
        device.apply(signed)
    next(device.root.glob("?/part")).write_bytes(b"\0" * 5000)
    device.repo.cut_after = None
    path = device.apply(signed)
    assert path is not None and path.read_bytes() == make_bundle(2)


def test_a_hidden_root_is_missed(device: Device) -> None:
    """Fault 12: the server says there is no newer root, but this device has seen one."""
    device.repo.rotate_root()
    old = dict(device.repo.files)
    device.install(2, counter=2)
    for name in ("root.json", "root_history/2.root.json", "timestamp.json", "snapshot.json"):
        (device.root / "metadata" / name).unlink()
    device.repo.files = old
    del device.repo.files["2.root.json"]
    with pytest.raises(MetadataError):
        device.apply(device.repo.assign("models/demo/1", counter=3))
    assert runs(device, 2)


def test_stolen_online_keys_introduce_nothing(device: Device) -> None:
    """Fault 14: director, snapshot and timestamp keys sign for a bundle nobody approved."""
    data = make_bundle(66)
    sha256 = hashlib.sha256(data).hexdigest()
    device.repo.artefacts[sha256] = data
    device.repo.publish()
    for path in ("models/demo/evil", "models/demo/1"):
        counter = 2 if path.endswith("evil") else 3
        signed = device.repo.assign(path, counter=counter, sha256=sha256, length=len(data))
        with pytest.raises(NotApprovedError):
            device.apply(signed)
    assert device.told == [(2, "failed"), (3, "failed")]
    assert runs(device, 1)


def test_skipped_roots_are_caught_up(device: Device) -> None:
    """Fault 16: a device at root 1 meets a repository at root 6."""
    for _ in range(5):
        device.repo.rotate_root()
    assert device.apply(offer(device)) is not None


def test_other_assignments_are_refused(device: Device) -> None:
    """Another device's, an expired one, one by another key, one from this clock's future."""
    offer(device)
    now_ms, path = device.repo.time.now_ms, "models/demo/2"
    with pytest.raises(AssignmentError, match="wrist-02"):
        device.apply(device.repo.assign(path, counter=2, device="wrist-02"))
    with pytest.raises(AssignmentError, match="expired"):
        device.apply(device.repo.assign(path, counter=2, expires_unix_ms=now_ms))
    with pytest.raises(ClockError):
        device.apply(device.repo.assign(path, counter=2, issued_unix_ms=now_ms + DAY_MS))
    signed = device.repo.assign(path, counter=2)
    with pytest.raises(SignatureError):
        device.apply(SignedAssignment(signed.payload, bytes(64)))
    assert device.told == []
    assert device.apply(signed) is not None


def test_a_clock_that_jumped_back_judges_nothing(device: Device) -> None:
    """Fault 65: thirty years back; python-tuf alone accepts everything then."""
    signed = offer(device)
    now_ms = device.repo.time.now_ms
    device.repo.time.now_ms -= 30 * 365 * DAY_MS
    with pytest.raises(ClockError):
        device.apply(signed)
    device.repo.time.now_ms = now_ms + 30 * 365 * DAY_MS
    with pytest.raises(UpdateError):
        device.apply(signed)
    device.repo.time.now_ms = now_ms
    assert device.apply(signed) is not None


# --- B and F: the bundle, the disk -----------------------------------------------------------


def test_an_unfit_bundle_never_becomes_a_trial(device: Device) -> None:
    """The self-test's word is final, and remembered."""
    device.unfit = True
    signed = offer(device)
    with pytest.raises(BundleRejectedError, match="golden vectors"):
        device.apply(signed)
    assert device.apply(signed) is None
    assert device.tested == 2  # once for bundle 1
    assert runs(device, 1)


def test_approved_bytes_that_are_no_bundle_are_refused(device: Device) -> None:
    """A pickle, validly approved: no parser beyond ours touches it (fault 23)."""
    device.repo.approve("models/demo/2", b"\x80\x04\x95 not a bundle" * 100)
    with pytest.raises(BundleRejectedError, match="not a model bundle"):
        device.apply(device.repo.assign("models/demo/2", counter=2))
    assert device.tested == 1
    assert runs(device, 1)


def test_a_bundle_of_another_model_is_refused(device: Device) -> None:
    """The assignment names the model, the bundle must agree."""
    offer(device)
    with pytest.raises(BundleRejectedError):
        device.apply(device.repo.assign("models/demo/2", counter=2, model="other"))


def test_a_bundle_too_large_for_this_device_is_refused(device: Device) -> None:
    """Before a byte of it is downloaded."""
    device.repo.approve("models/demo/2", bytes((1 << 20) + 1))
    device.repo.asked.clear()
    with pytest.raises(BundleRejectedError, match="this device takes"):
        device.apply(device.repo.assign("models/demo/2", counter=2))
    assert not [asked for asked in device.repo.asked if "@" in asked]


def test_a_slot_with_a_second_name_is_not_loaded(device: Device) -> None:
    """Fault 18: hard links and strangers in the slot."""
    path = device.reboot()
    assert path is not None
    os.link(path, device.root / "outside")
    assert device.reboot() is None
    assert "no_valid_model" in device.events


def test_a_stranger_in_the_slot_is_not_tolerated(device: Device) -> None:
    """Fault 18: a graph could name a file beside it."""
    path = device.reboot()
    assert path is not None
    (path.parent / "weights.bin").write_bytes(b"x")
    assert device.reboot() is None


def test_a_symlink_is_not_followed(device: Device) -> None:
    """Fault 17: neither as a bundle nor as a part."""
    path = device.reboot()
    assert path is not None
    real = device.root / "real"
    path.rename(real)
    path.symlink_to(real)
    assert device.reboot() is None


def test_rot_is_found_and_repaired(device: Device) -> None:
    """Faults 56 and 57: no older bundle steps in; the same assignment brings it again."""
    device.install(2, counter=2)
    for path in device.root.glob("?/model.shoal"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert device.reboot() is None
    assert device.events[-1] == "no_valid_model"
    assert device.apply(device.repo.assign("models/demo/2", counter=2)) is not None
    device.updater.trial_passed()
    assert runs(device, 2)


@pytest.mark.parametrize("name", ["state", "floor"])
def test_rotten_state_is_told_and_survived(device: Device, name: str) -> None:
    """The agent stays up, keeps what the other file knows, and takes the next assignment."""
    device.install(2, counter=2)
    (device.root / name).write_bytes(b"rotten")
    device.reboot()
    assert "update_state_damaged" in device.events
    assert (device.root / f"{name}.damaged").exists()
    with pytest.raises(ReplayError):
        device.apply(device.repo.assign("models/demo/1", counter=1))
    device.install(3, counter=3)
    assert runs(device, 3)


def test_a_full_disk_fails_cleanly(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 58: there is no room; nothing was downloaded, and it works when there is."""
    signed = offer(device)

    def full(path: Path, size: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(device.disk, "reserve", full)
        with pytest.raises(SpaceError):
            device.apply(signed)
    assert not [asked for asked in device.repo.asked if "@" in asked][1:]
    assert device.apply(signed) is not None


# --- the table -------------------------------------------------------------------------------

HELD = Held(model="demo", sha256="0" * 64, length=1, counter=1, rollout="r")


@given(st.lists(st.sampled_from(list(Event)), max_size=30))
def test_illegal_events_change_nothing(events: list[Event]) -> None:
    """Whatever comes in any order: the table's step, or an error and the same state."""
    state = SlotState()
    for event in events:
        legal = (state.phase, event) in TRANSITIONS and not (
            event is Event.LOADED and state.tries < 1
        )
        try:
            new = step(state, event, held=HELD, tries=3)
        except IllegalEventError:
            assert not legal
            continue
        assert legal and new.phase is TRANSITIONS[state.phase, event]
        assert (new.staging is not None) == (new.phase is not Phase.IDLE)
        assert new.tries >= 0 and (new.tries == 0 or new.phase is Phase.TRIAL)
        state = new


def test_every_refusal_is_typed() -> None:
    """Errors carry a code of their own, for the fleet's eyes."""
    kinds: list[type[UpdateError]] = [UpdateError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    codes = [kind.code for kind in kinds]
    assert len(codes) == len(set(codes)) >= 16
