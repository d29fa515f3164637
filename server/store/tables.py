"""The tables of the metadata database.

Times are Unix milliseconds of the server's clock unless the name says ``device``. States are
text from the tables of states of the part that owns them. JSON columns hold documents that
nothing queries by content.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, ForeignKey, Index, LargeBinary, MetaData, UniqueConstraint, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Root of the tables; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[Any]: JSON}


# --- devices -------------------------------------------------------------------------------


class Device(Base):
    """One enrolled device."""

    __tablename__ = "device"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    """The id on the wire, [a-z0-9-]{1,40}."""
    created_ms: Mapped[int]
    revoked_ms: Mapped[int | None]
    agent_version: Mapped[str] = mapped_column(default="")
    online: Mapped[bool] = mapped_column(default=False)
    seen_ms: Mapped[int | None]
    """Last message of any kind."""
    boot: Mapped[bytes | None]
    """Boot id of the last presence."""
    reported: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Body of the newest reported state."""
    reported_ms: Mapped[int | None]
    reported_stream: Mapped[bytes | None]
    reported_seq: Mapped[int] = mapped_column(default=0)
    """The (stream, seq) that `reported` came from: an older record never overwrites it."""
    desired_version: Mapped[int] = mapped_column(default=0)
    """Version of the desired state; grows with every change."""
    site: Mapped[str] = mapped_column(default="", server_default="", index=True)
    """Where it stands, as its agent reports it; "" = not said."""
    hardware: Mapped[str] = mapped_column(default="", server_default="", index=True)
    """Its hardware class, as its agent reports it; "" = not said."""


class Token(Base):
    """One enrolment token; the secret is kept hashed."""

    __tablename__ = "token"
    id: Mapped[int] = mapped_column(primary_key=True)
    device_name: Mapped[str] = mapped_column(index=True)
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    created_ms: Mapped[int]
    expires_ms: Mapped[int]
    key_sha256: Mapped[str | None]
    """Of the public key (SPKI) that used it first; another key is refused."""
    certificate_pem: Mapped[str | None]
    """What that key got: the same request gets it again."""


class Certificate(Base):
    """One issued device certificate."""

    __tablename__ = "certificate"
    serial: Mapped[str] = mapped_column(primary_key=True)
    """Hex."""
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), index=True)
    issued_ms: Mapped[int]
    expires_ms: Mapped[int]
    revoked_ms: Mapped[int | None]


# --- telemetry -----------------------------------------------------------------------------


class Stream(Base):
    """One record stream of a device: one boot of its agent."""

    __tablename__ = "stream"
    __table_args__ = (UniqueConstraint("device_id", "stream"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    stream: Mapped[bytes]
    first_ms: Mapped[int]
    upto: Mapped[int] = mapped_column(default=0)
    """Every seq up to here is stored or covered by a stored gap."""


class RecordRow(Base):
    """One stored record: exactly one row per (stream, seq)."""

    __tablename__ = "record"
    __table_args__ = (UniqueConstraint("stream_id", "seq"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    stream_id: Mapped[int] = mapped_column(ForeignKey("stream.id"))
    seq: Mapped[int]
    kind: Mapped[str]
    device_time_ms: Mapped[int]
    received_ms: Mapped[int]
    body: Mapped[bytes] = mapped_column(LargeBinary)
    """MessagePack of the body."""


class Window(Base):
    """One telemetry window, parsed; its late labels are added to it."""

    __tablename__ = "window"
    __table_args__ = (
        UniqueConstraint("stream_id", "model_sha256", "slice", "number"),
        Index("ix_window_device_model", "device_id", "model_sha256", "received_ms"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    stream_id: Mapped[int] = mapped_column(ForeignKey("stream.id"))
    model_sha256: Mapped[str]
    slice: Mapped[str] = mapped_column(default="", server_default="")
    """Value of the slice tag that its predictions share; "" = no slicing."""
    number: Mapped[int]
    """Index within (stream, model, slice), from 0."""
    device_start_ms: Mapped[int]
    device_end_ms: Mapped[int]
    received_ms: Mapped[int]
    predictions: Mapped[int]
    errors: Mapped[int]
    classes: Mapped[list[Any]]
    latency_us: Mapped[list[Any]]
    sketch: Mapped[bytes] = mapped_column(LargeBinary)
    extra: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    """The optional fields of the record: quality, scores, shed, bins_only."""
    projection: Mapped[bytes] = mapped_column(LargeBinary, default=b"", server_default="")
    """Sums of the random features, little-endian float32; empty = not sent."""
    drift_done: Mapped[bool] = mapped_column(default=False, index=True)
    """The drift worker has folded this window's sketch."""
    lake_done: Mapped[bool] = mapped_column(default=False, server_default=false(), index=True)
    """It is in a file of the lake."""


class Labels(Base):
    """Late labels of one window and one split, as one record brought them."""

    __tablename__ = "labels"
    __table_args__ = (
        UniqueConstraint("stream_id", "seq"),
        Index("ix_labels_device_model", "device_id", "model_sha256", "received_ms"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    stream_id: Mapped[int] = mapped_column(ForeignKey("stream.id"))
    seq: Mapped[int]
    model_sha256: Mapped[str]
    slice: Mapped[str] = mapped_column(default="", server_default="")
    number: Mapped[int]
    split: Mapped[int]
    received_ms: Mapped[int]
    labelled: Mapped[int]
    correct: Mapped[int]
    confusion: Mapped[list[Any]]
    extra: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    """The optional fields of the record: calibration."""
    drift_done: Mapped[bool] = mapped_column(default=False, index=True)
    lake_done: Mapped[bool] = mapped_column(default=False, server_default=false(), index=True)
    """They are in a file of the lake."""


class Gap(Base):
    """Records a device had accepted and gave up: reported lost."""

    __tablename__ = "gap"
    __table_args__ = (UniqueConstraint("device_id", "stream", "spool_class", "first", "last"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    stream: Mapped[bytes]
    """The stream that lost them; another than the one that tells, after a reboot."""
    spool_class: Mapped[str]
    first: Mapped[int]
    last: Mapped[int]
    count: Mapped[int]
    reason: Mapped[str]
    received_ms: Mapped[int]


class LakeFile(Base):
    """One Parquet file of the lake; readers use only those that are not retired."""

    __tablename__ = "lake_file"
    __table_args__ = (Index("ix_lake_file_model", "model_sha256", "dataset", "grain", "last_ms"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    dataset: Mapped[str]
    """windows, features, labels."""
    grain: Mapped[str]
    """One of shoal.server.lake.rules.Grain."""
    tier: Mapped[str]
    """One of shoal.server.lake.rules.Tier."""
    model_sha256: Mapped[str]
    day: Mapped[str]
    """UTC day of all its rows, YYYY-MM-DD."""
    path: Mapped[str] = mapped_column(unique=True)
    """Under the folder of the lake."""
    rows: Mapped[int]
    bytes: Mapped[int]
    windows: Mapped[int]
    """Windows, or label records, that its rows hold together."""
    first_ms: Mapped[int]
    """Time of its first row."""
    last_ms: Mapped[int]
    folded: Mapped[bool]
    """Its windows are in a file of the next tier too."""
    created_ms: Mapped[int]
    retired_ms: Mapped[int | None] = mapped_column(index=True)
    """Since when no reader should begin with it; the file goes a while later."""


class Quarantine(Base):
    """A message that broke the contract; kept so that a person can look."""

    __tablename__ = "quarantine"
    id: Mapped[int] = mapped_column(primary_key=True)
    device_name: Mapped[str]
    topic: Mapped[str]
    reason: Mapped[str]
    size: Mapped[int]
    head: Mapped[bytes] = mapped_column(LargeBinary)
    """The first kilobyte."""
    received_ms: Mapped[int]


# --- models and rollouts ---------------------------------------------------------------------


class Artefact(Base):
    """One content-addressed file of the artefact store."""

    __tablename__ = "artefact"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    created_ms: Mapped[int]
    kind: Mapped[str]
    """bundle, dataset, parameters, source, delta."""


class Model(Base):
    """One registered bundle."""

    __tablename__ = "model"
    __table_args__ = (UniqueConstraint("name", "version"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[int]
    """Per name, from 1."""
    sha256: Mapped[str] = mapped_column(unique=True)
    size: Mapped[int]
    created_ms: Mapped[int]
    note: Mapped[str] = mapped_column(default="")
    parent_sha256: Mapped[str] = mapped_column(default="")
    source_sha256: Mapped[str] = mapped_column(default="")
    """Artefact of kind `source`: float model, calibration set, profile. "" = foreign bundle."""
    manifest: Mapped[dict[str, Any]]
    profile: Mapped[dict[str, Any]] = mapped_column(deferred=True)
    """Up to 8 MiB: read where it is asked for, not with the row."""
    evidence: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Gate results."""
    approved_ms: Mapped[int | None]


class Rollout(Base):
    """One rollout; states are those of shoal.server.rollouts.states."""

    __tablename__ = "rollout"
    id: Mapped[str] = mapped_column(primary_key=True)
    model_sha256: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    wave: Mapped[int] = mapped_column(default=0)
    """The wave in progress, from 0."""
    waves: Mapped[list[Any]]
    """Cumulative device counts."""
    bake_windows: Mapped[int]
    deadline_s: Mapped[int]
    created_ms: Mapped[int]
    changed_ms: Mapped[int]
    reason: Mapped[str] = mapped_column(default="")
    evidence: Mapped[list[Any]] = mapped_column(default=list)
    """One verdict per judged wave."""


class RolloutDevice(Base):
    """The progress of one device in one rollout."""

    __tablename__ = "rollout_device"
    __table_args__ = (UniqueConstraint("rollout_id", "device_id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollout.id"))
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), index=True)
    wave: Mapped[int]
    state: Mapped[str]
    """One of shoal.server.rollouts.states.DeviceState."""
    reason: Mapped[str] = mapped_column(default="")
    offered_ms: Mapped[int | None]
    changed_ms: Mapped[int]


class AssignmentRow(Base):
    """The newest assignment of a device; the counter is never reused."""

    __tablename__ = "assignment"
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), primary_key=True)
    counter: Mapped[int]
    rollout_id: Mapped[str]
    model_sha256: Mapped[str]
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    issued_ms: Mapped[int]


# --- learning --------------------------------------------------------------------------------


class TrainingRun(Base):
    """One central training run."""

    __tablename__ = "training_run"
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    """queued, running, done, failed."""
    name: Mapped[str]
    dataset_sha256: Mapped[str]
    settings: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    model_sha256: Mapped[str] = mapped_column(default="")
    reason: Mapped[str] = mapped_column(default="")
    created_ms: Mapped[int]
    changed_ms: Mapped[int]


class RoundsRun(Base):
    """One run of federated rounds."""

    __tablename__ = "rounds_run"
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    """running, quantizing, done, failed."""
    base_sha256: Mapped[str]
    settings: Mapped[dict[str, Any]]
    round: Mapped[int] = mapped_column(default=0)
    """Rounds finished."""
    parameters_sha256: Mapped[str]
    """Artefact: the newest parameters."""
    momentum_sha256: Mapped[str] = mapped_column(default="")
    """Artefact: the server optimiser's state; "" = none."""
    candidate_sha256: Mapped[str] = mapped_column(default="")
    history: Mapped[list[Any]] = mapped_column(default=list)
    """One entry per finished round."""
    reason: Mapped[str] = mapped_column(default="")
    created_ms: Mapped[int]
    changed_ms: Mapped[int]


class Evaluation(Base):
    """One evaluation of bundles on the data that devices hold out."""

    __tablename__ = "evaluation"
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    """running, done, failed."""
    bundles: Mapped[list[Any]]
    split: Mapped[str]
    devices: Mapped[list[Any]]
    created_ms: Mapped[int]
    deadline_ms: Mapped[int]


class Task(Base):
    """One lease: a device's part in a round or an evaluation."""

    __tablename__ = "task"
    __table_args__ = (UniqueConstraint("owner_id", "round", "device_id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    owner_id: Mapped[str] = mapped_column(index=True)
    """The rounds run or evaluation."""
    kind: Mapped[str]
    """train, evaluate."""
    round: Mapped[int]
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), index=True)
    state: Mapped[str]
    """offered, reported, failed, expired."""
    result: Mapped[dict[str, Any]] = mapped_column(default=dict)
    delta_sha256: Mapped[str] = mapped_column(default="")
    created_ms: Mapped[int]
    deadline_ms: Mapped[int]
    changed_ms: Mapped[int]


# --- watching ----------------------------------------------------------------------------------


class DriftState(Base):
    """The detectors' state of one device and model, after `windows` windows."""

    __tablename__ = "drift_state"
    __table_args__ = (UniqueConstraint("device_id", "model_sha256"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    model_sha256: Mapped[str] = mapped_column(index=True)
    windows: Mapped[int] = mapped_column(default=0)
    state: Mapped[dict[str, Any]]
    verdict: Mapped[dict[str, Any]] = mapped_column(default=dict)
    changed_ms: Mapped[int]


class Alert(Base):
    """One alert; its states are those of shoal.server.drift.alerts."""

    __tablename__ = "alert"
    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int | None] = mapped_column(ForeignKey("device.id"), index=True)
    """The device it is about; None: a group of them, named by ``scope`` and ``subject``."""
    scope: Mapped[str] = mapped_column(default="device", server_default="device")
    """device, site, hardware, fleet."""
    subject: Mapped[str] = mapped_column(default="", server_default="")
    """Name of the device, site or hardware class; "" = the fleet."""
    model_sha256: Mapped[str]
    kind: Mapped[str]
    """sensor_fault, local_shift, fleet_shift, accuracy_loss, key_conflict, …"""
    fingerprint: Mapped[str] = mapped_column(default="", server_default="", index=True)
    """What is the same alert: (kind, scope, subject, model). One of them is live at a time."""
    state: Mapped[str] = mapped_column(index=True)
    """open, acknowledged, silenced, resolved."""
    text: Mapped[str]
    evidence: Mapped[dict[str, Any]]
    windows: Mapped[int] = mapped_column(default=0)
    """Telemetry windows of the device seen when it opened."""
    seen: Mapped[int] = mapped_column(default=1, server_default="1")
    """Judgements that found it again since it opened, this one included."""
    opened_ms: Mapped[int]
    seen_ms: Mapped[int] = mapped_column(default=0, server_default="0")
    """The last of them."""
    changed_ms: Mapped[int] = mapped_column(default=0, server_default="0")
    """Last change of its state."""
    actor: Mapped[str] = mapped_column(default="", server_default="")
    """Who acknowledged, silenced or resolved it; "" = the server."""
    note: Mapped[str] = mapped_column(default="", server_default="")
    silenced_until_ms: Mapped[int | None]
    resolved_ms: Mapped[int | None]


class Event(Base):
    """One event that a device told."""

    __tablename__ = "event"
    __table_args__ = (UniqueConstraint("stream_id", "seq"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), index=True)
    stream_id: Mapped[int] = mapped_column(ForeignKey("stream.id"))
    seq: Mapped[int]
    name: Mapped[str]
    severity: Mapped[str]
    text: Mapped[str]
    data: Mapped[dict[str, Any]]
    device_time_ms: Mapped[int]
    received_ms: Mapped[int]


class Audit(Base):
    """One entry of the hash-chained log; see shoal.server.store.audit."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True)
    """1, 2, 3, … without a hole."""
    time_ms: Mapped[int]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[dict[str, Any]]
    previous_sha256: Mapped[str]
    sha256: Mapped[str]
