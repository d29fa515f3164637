"""Settings of the local inference server's core."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
"""What a model may be called: it is a file's name, a part of a URL and of a topic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """How one model is run, and how much may wait for it."""

    threads: int = 1
    """Threads inside one call, 1 to 1024."""
    workers: int = 1
    """Calls that run at once, 1 to 64."""
    queue_max: int = 64
    """Requests that may wait; one more is refused at once."""
    queue_bytes_max: int = 64 << 20
    """Bytes of inputs that may wait; a single request may be larger."""
    wait_s_max: float = 10.0
    """Longest that a request may wait for its turn, in seconds, whatever deadline it has."""
    priorities: int = 3
    """Levels 1 (first) to this; a request that names none has the middle one."""
    batch_max: int = 1
    """Rows that requests are put together to; 1 = never. Only for models whose first axis is a
    batch: a free first axis may also be time, so it must be asked for."""
    batch_wait_us: int = 0
    """How long a request may wait for others to run with, in microseconds. 0 = those that wait
    anyhow."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.threads <= 1024 or not 1 <= self.workers <= 64:
            raise ValueError("threads must be 1 to 1024, workers 1 to 64")
        if not 1 <= self.queue_max <= 100_000 or self.queue_bytes_max < 1:
            raise ValueError("queue_max must be 1 to 100000, queue_bytes_max at least 1")
        if not 0 < self.wait_s_max <= 86_400 or not 1 <= self.priorities <= 100:
            raise ValueError("wait_s_max must be above 0, at most 86400; priorities 1 to 100")
        if not 1 <= self.batch_max <= 65_536 or not 0 <= self.batch_wait_us <= 10_000_000:
            raise ValueError("batch_max must be 1 to 65536, batch_wait_us 0 to 10000000")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that the operator wants served."""

    name: str
    """How clients call it; see ``NAME``."""
    path: Path
    """Its file, ``.onnx`` or ``.tflite``."""
    limits: ModelLimits = field(default_factory=ModelLimits)
    """How it is run."""

    def __post_init__(self) -> None:
        """Check the name."""
        if not NAME.match(self.name):
            raise ValueError(
                f"a model cannot be called {self.name!r:.200}: use up to 128 letters, digits, "
                "'.', '_' and '-', with a letter or digit first"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """What is served, and within which bounds."""

    models: tuple[ModelSource, ...] = ()
    """Loaded at the start; all must load."""
    allow_load: Path | None = None
    """Folder from which clients may load models by name: ``NAME.onnx``, ``NAME.tflite``,
    ``NAME/1/model.onnx`` or ``NAME/1/model.tflite``. None: only ``models`` may be loaded anew."""
    load_limits: ModelLimits = field(default_factory=ModelLimits)
    """How models from that folder are run."""
    models_max: int = 64
    """Models that may be loaded at once."""
    model_bytes_max: int = 2 << 30
    """Size of a model's file, in bytes; protobuf itself ends there."""
    unload_s: float = 10.0
    """How long requests that wait may still run when their model is taken out, in seconds."""
    shm: bool = True
    """Whether clients may register system shared memory."""
    shm_folder: Path = Path("/dev/shm")
    """Where POSIX shared memory is; a region's key is a file's name in it."""
    shm_regions_max: int = 256
    """Regions registered at once; each holds a file open."""

    def __post_init__(self) -> None:
        """Check the limits."""
        names = [each.name for each in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"model names must differ: {', '.join(names)}")
        if not max(1, len(names)) <= self.models_max <= 10_000:
            raise ValueError("models_max must be at least the number of models, at most 10000")
        if self.model_bytes_max < 1 or not 0 <= self.unload_s <= 3600:
            raise ValueError("model_bytes_max must be at least 1, unload_s 0 to 3600")
        if not 1 <= self.shm_regions_max <= 10_000:
            raise ValueError("shm_regions_max must be 1 to 10000")
