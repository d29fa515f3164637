from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ._engine import Engine

class PyEngine(Engine):
    def __init__(
        self,
        backend: str,
        version: str,
        inputs: tuple[tuple[str, int, tuple[int, ...]], ...],
        outputs: tuple[tuple[str, int, tuple[int, ...]], ...],
        call: Callable[[list[NDArray[Any]]], list[NDArray[Any]]],
        *,
        stateful: bool = False,
    ) -> None: ...
