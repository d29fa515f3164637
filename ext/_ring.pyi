from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typing_extensions import Buffer

from .errors import KernelError

MAGIC: int
VERSION: int
PAGE_BYTES: int
SLOT_BYTES: int
REQUEST_BYTES_MIN: int

class RequestError(KernelError, ValueError): ...
class AnswerError(KernelError, ValueError): ...

class Ring:
    slots_n: int
    request_bytes: int
    response_bytes: int
    def __init__(
        self,
        buffer: Buffer,
        slots_n: int,
        slot_first: int,
        slot_stride: int,
        request_bytes: int,
        response_bytes: int,
    ) -> None: ...
    def detach(self) -> None: ...

class Request:
    kind: int
    priority: int
    deadline_ns: int
    model: str
    revision: str
    inputs: dict[str, tuple[tuple[int, ...], bytes | memoryview]]
    types: dict[str, int]
    outputs: tuple[str, ...] | None
    prepared: Any

class Server(Ring):
    def take(self, spin_ns: int, wait_ns: int) -> int: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def request(self, index: int) -> Request: ...
    def answer(
        self,
        index: int,
        outputs: Sequence[tuple[str, int, tuple[int, ...], Buffer]],
    ) -> int: ...
    def answer_text(self, index: int, status: int, text: str) -> None: ...
    def owners(self) -> list[tuple[int, int]]: ...
    def reclaim(self, index: int, owner: int) -> bool: ...
    def sweep(self) -> int: ...

class Plan:
    header: bytes
    names: tuple[str, ...]
    def __init__(
        self,
        kind: int,
        model: str,
        revision: str,
        inputs: Sequence[tuple[str, int, tuple[int, ...], int, str]],
        outputs: Sequence[str],
        request_bytes: int,
    ) -> None: ...

class Port(Ring):
    index: int
    in_flight: bool
    @property
    def mine(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    def claim(self, owner: int) -> bool: ...
    def release(self) -> bool: ...
    def withdraw(self) -> bool: ...
    def post(
        self, plan: Plan, inputs: Mapping[str, Any], deadline_ns: int, priority: int
    ) -> int: ...
    def wait(self, spin_ns: int, wait_ns: int) -> bool: ...
    def read(self, plan: Plan, ndarray: Any, dtype_of: Callable[[int], Any]) -> tuple[int, Any]: ...

def process_id() -> int: ...
