"""The agent's configuration: one TOML file, every key checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..proto import settings
from ..proto.records import PLACE_CHARS_MAX
from .link import LinkConfig
from .monitor import MonitorConfig
from .serving import SourceConfig, TrialConfig
from .spool import SpoolConfig
from .trainer import TrainerConfig
from .updates import UpdateConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentConfig:
    """How a device that has no certificate yet joins its fleet."""

    token_file: Path | None = None
    """File with the enrolment token; removed once the device is enrolled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """All of the agent."""

    state_dir: Path
    """Folder for keys, slots and the spool; made with mode 0700."""
    report_s: float = 60.0
    """Reported state is sent this often, and at every change."""
    desired_poll_s: float = 300.0
    """The desired state is read this often even without a nudge."""
    drain_s: float = 5.0
    """How long a stop waits for the spool to be acknowledged."""
    log_level: str = "info"
    """debug, info, warning or error."""
    site: str = ""
    """Where the device is, up to 40 characters: drift is told by site; "" = not said."""
    hardware: str = ""
    """Its hardware class, up to 40 characters; "" = what the board calls itself."""
    enrolment: EnrolmentConfig = field(default_factory=EnrolmentConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    trial: TrialConfig = field(default_factory=TrialConfig)
    spool: SpoolConfig = field(default_factory=SpoolConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    updates: UpdateConfig = field(default_factory=UpdateConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        """Check the limits."""
        if min(self.report_s, self.desired_poll_s) <= 0 or self.drain_s < 0:
            raise ValueError("report_s and desired_poll_s must be above 0 s, drain_s at least 0 s")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ValueError("log_level must be debug, info, warning or error")
        if max(len(self.site), len(self.hardware)) > PLACE_CHARS_MAX:
            raise ValueError(f"site and hardware must be up to {PLACE_CHARS_MAX} characters")


def load(path: Path) -> AgentConfig:
    """Return the configuration in a file.

    Raises:
        SettingsError: It is not acceptable; the message names the key.
    """
    return settings.read(path, AgentConfig)
