from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ._engine import Engine

LATENCY_BINS_N: int

class Tap:
    deadline_ns: int
    def ready(self) -> None: ...
    def tick(self) -> None: ...
    def sliced(self, tag: str) -> Tap: ...

class Call:
    name: str
    backend: str
    version: str
    stateful: bool
    def __init__(
        self,
        engine: Engine,
        *,
        name: str = "model",
        refused: type[Exception] = ...,
        failed: type[Exception] = ...,
        closed: type[Exception] = ...,
        monitor: object | None = None,
        prepare: Mapping[str, tuple[int, int, Sequence[float], Sequence[float]]] | None = None,
        nan_refused: bool = False,
    ) -> None: ...
    def infer(
        self, inputs: Mapping[str, NDArray[Any]], *, slice: str | None = None
    ) -> dict[str, NDArray[Any]]: ...
    def infer_into(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        *,
        slice: str | None = None,
    ) -> None: ...
    def infer_raw(
        self,
        inputs: Mapping[str, tuple[Sequence[int], bytes | bytearray | memoryview]],
        outputs: Iterable[str] | None = None,
        *,
        slice: str | None = None,
    ) -> dict[str, tuple[tuple[int, ...], bytes]]: ...
    def time_ns(self, inputs: Mapping[str, NDArray[Any]], repeats: int) -> list[int]: ...
    def counters(self) -> tuple[int, int, list[int]]: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...

def bin_of_ns(latency_ns: int) -> int: ...
