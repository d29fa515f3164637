from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ._call import Tap
from ._projection import Projector
from ._sketch import Bank

REASONS: tuple[str, ...]

class Journal:
    @property
    def predictions(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def captures_missed(self) -> int: ...
    def __init__(self, pending_max: int, *, cpu_share_max: float) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...
    def claim(self, prediction: int) -> tuple[int, int, int] | None: ...
    def watch(
        self, *, values: int, random_in: int, margin_below: float, outside_above: float
    ) -> None: ...
    def captured(self, random_in: int) -> tuple[int, str, int, bytes] | None: ...

class WindowTap(Tap):
    limit: int
    @property
    def seen(self) -> int: ...
    @property
    def misfits(self) -> int: ...
    def __init__(
        self,
        bank: Bank,
        journal: Journal,
        *,
        input: int,
        output: int,
        samples: int,
        classes: int,
        values: int,
        low__c: NDArray[np.float32],
        high__c: NDArray[np.float32],
        deciles__9: NDArray[np.float32],
        stuck_min: int,
        limit: int,
        projector: Projector | None,
        row_stride: int,
        ready: Callable[[], None],
        tick: Callable[[], None],
        sliced: Callable[[str], WindowTap],
    ) -> None: ...
    def put(self, window__k: NDArray[Any], said__k: NDArray[Any], latency_ns: int) -> None: ...
    def misfit(self) -> None: ...
    def begin(self, window: int) -> None: ...
    def read(self) -> dict[str, Any]: ...
