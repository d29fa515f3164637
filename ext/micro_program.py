"""A program of the micro engine before it is laid out: rooms and the steps between them.

A room is a tensor's place. Rooms are channels-last, with a border of zeros as wide as the padding
of the convolution that reads them. A room of quantized values holds value - zero point as int16.
Nothing here knows ONNX: that is ``micro_plan.py``. Names and numbers are those of
``_micro_kernels.h``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SCRATCH_BYTES_MAX = 64 << 20
CHANNELS, PLANAR, GEMM_F, GEMM_Q, DEPTH_F, DEPTH_Q, UNARY, BINARY, QUANT, DEQUANT = range(10)
MAX_F, MAX_Q, MEAN_F, GLOBAL_F, GLOBAL_Q, NORM, SOFTMAX, SOFTMAX_Q, TABLE = range(10, 19)
INPUT, OUTPUT = -1, -2  # MICRO_INPUT, MICRO_OUTPUT
_ALIGNED = 64
_SLACK = 128  # bytes behind a room that vectors may read: two of the widest
_ROWS = 6  # MICRO_ROWS
_PANEL_MAX = 8  # MICRO_PANEL_MAX


class NotAChainError(Exception):
    """The graph is not one of the kernel path; the text says why, in one line."""


def check(good: object, reason: str) -> None:
    """Refuse the graph unless `good`."""
    if not good:
        raise NotAChainError(reason)


@dataclass(slots=True)
class Room:
    """Place of one tensor, laid out at the end."""

    h: int
    w: int
    c: int
    item: int = 4
    call: int = 0
    """INPUT or OUTPUT if it is the call's own memory."""
    border: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Zeros above, left, below, right."""
    offset: int = 0

    @property
    def row(self) -> int:
        """Elements from row to row."""
        return (self.border[1] + self.w + self.border[3]) * self.c

    @property
    def size(self) -> int:
        """Bytes with border and slack, a multiple of the alignment."""
        rows = self.border[0] + self.h + self.border[2]
        return -(-(rows * self.row * self.item + _SLACK) // _ALIGNED) * _ALIGNED

    def view(self) -> tuple[int, int, int, int, int]:
        """Return the fields of MicroView."""
        if self.call:
            return self.call, self.h, self.w, self.c, self.w * self.c
        first = self.border[0] * self.row + self.border[1] * self.c
        return self.offset + first * self.item, self.h, self.w, self.c, self.row


@dataclass(slots=True)
class Layer:
    """Weights of a convolution or dense layer, before they are packed."""

    weights: array[Any]
    """Float32, or int16 minus the zero point; (O, kernel height, kernel width, C / groups)."""
    bias: array[Any]
    """(O,), float32 or int32."""
    scale: array[float] | None = None
    """(O,), from int32 sums to the output."""


@dataclass(slots=True)
class Step:
    """One step of the program."""

    kind: int
    src: Room
    dst: Room
    flag: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    groups: int = 1
    layer: Layer | None = None
    constants: array[Any] = field(default_factory=lambda: array("f"))
    scale: array[float] = field(default_factory=lambda: array("f"))
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    room: Room | None = None


class Alias(Room):
    """Another room's memory, seen in another shape: what a Reshape reads."""

    def __init__(self, of: Room, like: Room) -> None:
        super().__init__(like.h, like.w, like.c, like.item)
        self.of = of

    def view(self) -> tuple[int, int, int, int, int]:
        """Return the other room's place with this one's shape."""
        return (self.of.view()[0], self.h, self.w, self.c, self.w * self.c)


@dataclass(slots=True)
class Program:
    """Steps in order, and what a call looks like."""

    inputs: tuple[tuple[str, int, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, int, tuple[int, ...]], ...]
    steps: list[Step]
    quantized: bool
    """Whether a layer computes in int8."""

    def lay_out(
        self, lanes: int, pack: Callable[..., bytes]
    ) -> tuple[list[dict[str, Any]], int, int]:
        """Return rows of the C program, the bytes of its scratch, and how many must start as 0."""
        rooms: dict[int, Room] = {}
        for step in self.steps:
            for room in (step.src, step.dst, step.room):
                if room is not None and not room.call and not isinstance(room, Alias):
                    rooms[id(room)] = room
        offset = zeros = 0
        for room in sorted(rooms.values(), key=lambda room: not any(room.border)):
            room.offset = offset
            offset += room.size
            if any(room.border):
                zeros = offset
        check(offset <= SCRATCH_BYTES_MAX, f"its activations take {offset} bytes")
        return [_row(step, lanes, pack) for step in self.steps], offset, zeros


def _row(step: Step, lanes: int, pack: Callable[..., bytes]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": step.kind, "flag": step.flag, "src": step.src.view(), "dst": step.dst.view(),
        "kernel": step.kernel, "stride": step.stride, "dilation": step.dilation, "pad": step.pad,
        "groups": (step.groups, step.src.c // step.groups, step.dst.c // step.groups),
        "weights_group": 0, "lanes_group": 0, "panels_n": 0, "runs_n": 0, "run_length": 0,
        "constants": len(step.constants), "room": step.room.offset if step.room else 0,
        "low": step.low, "high": step.high, "step": step.step,
        "panels": b"", "runs": b"", "weights": b"", "bias": step.constants.tobytes(),
        "scale": step.scale.tobytes(),
    }  # fmt: skip
    if step.layer is not None:
        row |= _layer_row(step, step.layer, lanes, pack)
    return row


def _layer_row(step: Step, layer: Layer, lanes: int, pack: Callable[..., bytes]) -> dict[str, Any]:
    """Return the packed weights of a step and where its windows lie."""
    src, dst, groups = step.src, step.dst, step.groups
    (kernel_h, kernel_w), (dilation_h, dilation_w) = step.kernel, step.dilation
    depth = step.kind in (DEPTH_F, DEPTH_Q)
    inside = src.c // groups
    rows = [i * dilation_h * src.row for i in range(kernel_h)]
    if groups == 1 and dilation_w == 1:  # a row of the window is contiguous
        runs, length = rows, kernel_w * src.c
    else:
        runs = [row + j * dilation_w * src.c for row in rows for j in range(kernel_w)]
        length = inside
    item = layer.weights.itemsize
    outs = dst.c // groups
    if depth:
        width = -(-outs * groups // lanes) * lanes
        taps = len(runs)
        flat = array(layer.weights.typecode, bytes(item * taps * width))
        for tap in range(taps):
            flat[tap * width : tap * width + dst.c] = layer.weights[tap::taps]
        return {
            "weights": flat.tobytes(), "runs": array("q", runs).tobytes(), "runs_n": taps,
            "lanes_group": width, "bias": _padded(layer.bias, width),
            "scale": _padded(layer.scale, width), "run_length": 1,
        }  # fmt: skip
    vectors = -(-outs // lanes)
    panels: list[tuple[int, int]] = []
    most = 2 if dst.w >= _ROWS else _PANEL_MAX
    first = 0
    while vectors:
        size = next(size for size in (8, 4, 2, 1) if size <= min(most, vectors))
        panels.append((first, size))
        first += size * lanes
        vectors -= size
    width = first
    pairs = -(-length // 2) * 2 if item == 2 else length
    numbers = array("q")
    for first, size in panels:
        count = min(size * lanes, outs - first)
        numbers.extend((first, size, count, first * len(runs) * pairs, first))
    each = len(layer.weights) // groups
    packed = b"".join(
        pack(
            layer.weights[g * each : (g + 1) * each].tobytes(),
            outs, len(runs), length, item, lanes, panels,
        )
        for g in range(groups)
    )  # fmt: skip
    return {
        "weights": packed, "weights_group": width * len(runs) * pairs, "lanes_group": width,
        "panels": numbers.tobytes(), "panels_n": len(panels), "runs": array("q", runs).tobytes(),
        "runs_n": len(runs), "run_length": pairs // 2 if item == 2 else length,
        "bias": _padded(layer.bias, width, groups), "scale": _padded(layer.scale, width, groups),
    }  # fmt: skip


def _padded(values: array[Any] | None, width: int, groups: int = 1) -> bytes:
    """Return the values with each group's filled up to `width` zeros of 4 bytes."""
    if values is None:
        return b""
    each = len(values) // groups
    return b"".join(
        values[g * each : (g + 1) * each].tobytes() + bytes(4 * (width - each))
        for g in range(groups)
    )
