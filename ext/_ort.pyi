from collections.abc import Mapping, Sequence

from ._engine import Engine

class OrtFailure(Exception): ...

def open_library(path: bytes) -> str: ...

class OrtEngine(Engine):
    def __init__(
        self,
        model: bytes,
        *,
        threads: int,
        arena: bool,
        config: Mapping[str, str],
        unknown: Sequence[str] = (),
    ) -> None: ...
