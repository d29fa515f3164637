from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from typing_extensions import Buffer

from ._engine import Engine
from .errors import KernelError

class LiteRtError(KernelError): ...

class Library:
    def __init__(self, path: bytes, accelerators: int, folder: bytes) -> None: ...

class Session(Engine):
    @property
    def accelerated(self) -> bool: ...
    def __init__(
        self,
        library: Library,
        version: str,
        model: bytes,
        key: str,
        inputs: dict[str, tuple[int, int, tuple[int, ...]]],
        outputs: dict[str, tuple[int, int, tuple[int, ...]]],
        *,
        threads: int,
        accelerators: int,
        stateful: bool,
    ) -> None: ...
    def reset(self) -> None: ...
    def call(
        self, inputs: Sequence[tuple[Sequence[int], Buffer | NDArray[Any]]]
    ) -> list[tuple[tuple[int, ...], bytes]]: ...
