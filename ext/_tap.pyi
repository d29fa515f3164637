from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ._call import Tap
from ._sketch import Bank

class WindowTap(Tap):
    predictions: int
    seen: int
    def __init__(
        self,
        bank: Bank,
        *,
        input: int,
        output: int,
        channels: int,
        samples: int,
        classes: int,
        pending_max: int,
        limit: int,
        ready: Callable[[], None],
    ) -> None: ...
    def put(self, window__k: NDArray[Any], scores__k: NDArray[Any], latency_ns: int) -> None: ...
    def begin(self) -> None: ...
    def read(self) -> tuple[list[int], list[int]]: ...
    def claim(self, prediction: int) -> int: ...
