"""How the drift worker runs, and the rules that it goes by."""

from __future__ import annotations

from dataclasses import dataclass, field

from .alerts import AlertConfig
from .detectors import DriftConfig
from .quality import QualityConfig
from .retraining import RetrainingConfig
from .scores import ScoreConfig
from .streams import StreamConfig
from .verdicts import VerdictConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftWorkerConfig:
    """How the worker runs."""

    tick_s: float = 1.0
    """New windows are looked for this often, and whenever some were stored."""
    rows_max: int = 500
    """Rows folded in one transaction."""
    judge_share_max: float = 0.25
    """Share of a core that judging a model may take, if one judgement takes more than
    ``judge_quick_s``: it looks at all devices of the model, however few have told something new.
    Windows are folded meanwhile."""
    judge_quick_s: float = 0.5
    """CPU seconds; some 1,000 devices."""
    rules: DriftConfig = field(default_factory=DriftConfig)
    """When a device is called unlike the others."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """When its data are called broken."""
    streams: StreamConfig = field(default_factory=StreamConfig)
    """When a device has changed since its first windows."""
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    """How confidence and accuracy are followed, for the evidence of verdicts."""
    verdicts: VerdictConfig = field(default_factory=VerdictConfig)
    """How far a finding reaches, and what it is called."""
    alerts: AlertConfig = field(default_factory=AlertConfig)
    """When an alert is the same one again."""
    retraining: RetrainingConfig = field(default_factory=RetrainingConfig)
    """When a model is trained again."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.tick_s <= 0 or not 1 <= self.rows_max <= 100_000:
            raise ValueError("tick_s must be above 0 s, rows_max 1 to 100000")
        if not 0 < self.judge_share_max <= 1 or self.judge_quick_s < 0:
            raise ValueError("judge_share_max must be above 0 to 1, judge_quick_s at least 0 s")
