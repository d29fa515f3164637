"""Settings of the console."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleConfig:
    """Where the console listens, who may ask, and how much it shows."""

    enabled: bool = True
    """Whether the server offers the console."""
    host: str = "127.0.0.1"
    """Address to listen on. The console has no login: everyone who reaches it may read it, so it
    stays on loopback unless a proxy that asks for one stands before it."""
    port: int = 8460
    """TCP port, 0 to 65535; 0 lets the system choose."""
    names: tuple[str, ...] = ()
    """Further host names under which browsers may ask, e.g. that of a proxy; a request for any
    other name is refused (DNS rebinding)."""
    refresh_s: float = 1.0
    """Rest between two looks at the database, s, 0.1 to 60: pages see a change after at most this
    and a look. A look that computes for more than a quarter of it is rested for four times as long
    as it computed. Looks stop while nobody watches."""
    history_s: int = 86_400
    """How far back the chart of accuracy goes, s, at least 60."""
    devices_max: int = 500
    """Devices a snapshot carries; those in need of attention come first. 500 are 200 kB."""
    alerts_max: int = 100
    """Alerts a snapshot carries, open ones first."""
    heat_devices_max: int = 200
    """Devices whose drift the heat map is made of, those that drift first; a row is 2 kB."""
    sockets_max: int = 32
    """Pages that may watch at a time; each holds one connection."""
    connections_max: int = 128
    """Connections at a time, pages and requests together; more get 503."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: A value is out of its range.
        """
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, not within 0 to 65535")
        if not 0.1 <= self.refresh_s <= 60:
            raise ValueError(f"refresh_s is {self.refresh_s}, not within 0.1 to 60")
        if self.history_s < 60:
            raise ValueError(f"history_s is {self.history_s}, less than 60")
        for name in (
            "devices_max",
            "alerts_max",
            "heat_devices_max",
            "sockets_max",
            "connections_max",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, less than 1")
