"""Settings of rollouts: their pace, and what a wave must prove."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What makes a wave fail. Limits are what an operator tolerates, not what is hoped for."""

    failures_max_share: float = 0.1
    """Share of a wave's devices, 0 to 1, that may fail or fall silent."""
    errors_rise_max: float = 0.02
    """By how much the share of predictions that fail may rise, 0 to 1."""
    latency_factor_max: float = 4.0
    """How many times the 99th percentile of before is still acceptable as the one of now; at least
    1, in steps of the histogram (26 %). Machines are noisier than models: be generous."""
    accuracy_drop_max: float = 0.05
    """By how much the share of right answers may fall, 0 to 1, on labels no training touched."""
    alpha: float = 0.1
    """Two-sided error probability of each check, over all looks at it together."""
    windows_max: int = 200
    """Telemetry windows and label records per device that a comparison reads, the newest ones."""

    def __post_init__(self) -> None:
        """Refuse limits that cannot work.

        Raises:
            ValueError: A limit is out of its range.
        """
        for name in ("failures_max_share", "errors_rise_max", "accuracy_drop_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share, 0 to 1")
        if not 0 < self.alpha < 1:
            raise ValueError("alpha must be within 0 and 1")
        if self.latency_factor_max < 1 or self.windows_max < 1:
            raise ValueError("latency_factor_max and windows_max must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Pace and bounds of rollouts."""

    tick_s: float = 1.0
    """Rollouts are looked at this often, s, and whenever a device says something about one."""
    gate_s: float = 2.0
    """Shortest time between two judgements of the same wave, s: each reads its windows anew."""
    offers_per_tick_max: int = 200
    """Assignments signed in one transaction; other writers wait for it, some 0.1 s."""
    bake_s_max: float = 86_400.0
    """A wave whose evidence is still insufficient after this long, s, is paused."""
    deadline_s: int = 3600
    """Per device, s, from its offer; for a rollout that names no deadline itself."""
    deadline_s_max: int = 30 * 86_400
    """Longest deadline that a rollout may name, s."""
    bake_windows_max: int = 10_000
    """Most telemetry windows per device that a rollout may ask for before its gate."""
    waves_max: int = 20
    """Most waves of a rollout."""
    gate: GateConfig = field(default_factory=GateConfig)
    """What a wave must prove."""

    def __post_init__(self) -> None:
        """Refuse a pace that cannot work.

        Raises:
            ValueError: A value is out of its range.
        """
        if not 0 < self.tick_s <= 600 or self.gate_s < 0 or self.bake_s_max <= 0:
            raise ValueError("tick_s must be up to 600 s, gate_s from 0 s, bake_s_max above 0 s")
        if not 1 <= self.deadline_s <= self.deadline_s_max:
            raise ValueError("deadline_s must be 1 to deadline_s_max s")
        if min(self.offers_per_tick_max, self.waves_max, self.bake_windows_max) < 1:
            raise ValueError("offers_per_tick_max, waves_max, bake_windows_max must be at least 1")
