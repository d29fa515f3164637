from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Buffer

from ._engine import Engine

def variants() -> tuple[tuple[str, int, bool], ...]: ...
def pack(
    weights: bytes | array[Any],
    outs: int,
    runs: int,
    length: int,
    item: int,
    lanes: int,
    panels: Sequence[tuple[int, int]],
) -> bytes: ...

class MicroEngine(Engine):
    variant: str
    steps: int
    scratch_bytes: int
    def __init__(
        self,
        version: str,
        variant: int,
        inputs: Sequence[tuple[str, int, tuple[int, ...]]],
        outputs: Sequence[tuple[str, int, tuple[int, ...]]],
        program: Sequence[Mapping[str, Any]],
        scratch_bytes: int,
        zero_bytes: int,
    ) -> None: ...
    def call(self, shape: Sequence[int], data: Buffer) -> tuple[tuple[int, ...], bytes]: ...
