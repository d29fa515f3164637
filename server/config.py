"""The server's configuration: one TOML file, every key checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..proto import settings
from ..proto.names import check_name
from .api.config import ApiConfig
from .drift.config import DriftWorkerConfig
from .federated.coordinator import RoundsConfig
from .federated.evaluations import EvaluationConfig
from .federated.leases import LeaseConfig
from .ingest import IngestConfig
from .lake.config import LakeConfig
from .learning.config import ProfileConfig
from .learning.training import TrainingConfig
from .learning.worker import ExecutorConfig
from .registry.config import ArtefactConfig
from .rollouts.config import RolloutConfig
from .trust.approval import ApprovalConfig
from .trust.ca import CaConfig
from .trust.director import DirectorConfig
from .trust.enrolment import EnrolmentConfig
from .web.config import ConsoleConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where devices reach the server."""

    enrolment: str = "0.0.0.0:8461"
    """host:port of the enrolment port: TLS, no client certificate."""
    devices: str = "0.0.0.0:8462"
    """host:port of the device port: mutual TLS."""
    advertise: str = "127.0.0.1"
    """Name or address that devices are told to use; it must be in ``ca.names`` or be local."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """The MQTT 5 broker."""

    url: str = "mqtt://127.0.0.1:1883"
    """As the server reaches it: mqtt://host:port or mqtts://host:port."""
    device_url: str = ""
    """As devices reach it; "" = the same."""
    ca: Path | None = None
    """CA of the broker's certificate, PEM; for mqtts."""
    certificate: Path | None = None
    """This server's certificate for the broker, PEM; for mqtts."""
    key: Path | None = None
    """Its key, PEM; for mqtts."""

    def __post_init__(self) -> None:
        """Check that mqtts has its files."""
        files = (self.ca, self.certificate, self.key)
        if self.url.startswith("mqtts:") and None in files:
            raise ValueError("mqtts needs ca, certificate and key")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All of the server."""

    state_dir: Path
    """Folder for keys, database, artefacts and the operator's socket; made with mode 0700."""
    fleet: str
    """Name of the fleet; it goes into every certificate and cannot be changed later."""
    database: str = ""
    """SQLAlchemy URL; "" = SQLite in the state folder."""
    log_level: str = "info"
    """debug, info, warning or error."""
    listen: ListenConfig = field(default_factory=ListenConfig)
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    ca: CaConfig = field(default_factory=CaConfig)
    approval: ApprovalConfig = field(default_factory=ApprovalConfig)
    director: DirectorConfig = field(default_factory=DirectorConfig)
    enrolment: EnrolmentConfig = field(default_factory=EnrolmentConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    artefacts: ArtefactConfig = field(default_factory=ArtefactConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    drift: DriftWorkerConfig = field(default_factory=DriftWorkerConfig)
    lake: LakeConfig = field(default_factory=LakeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    evaluations: EvaluationConfig = field(default_factory=EvaluationConfig)
    leases: LeaseConfig = field(default_factory=LeaseConfig)
    console: ConsoleConfig = field(default_factory=ConsoleConfig)

    def __post_init__(self) -> None:
        """Check the limits."""
        check_name(self.fleet, what="fleet name")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ValueError("log_level must be debug, info, warning or error")


def load(path: Path) -> ServerConfig:
    """Return the configuration in a file.

    Raises:
        SettingsError: It is not acceptable; the message names the key.
    """
    return settings.read(path, ServerConfig)
