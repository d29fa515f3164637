"""Turn an ONNX graph that is a chain of small layers into a program of the micro engine.

    Model --Chain.follow--> steps over rooms --Program.lay_out--> rows of the C program

Rule 1: what is not understood in full is refused with a reason; nothing is guessed.
Rule 2: quantized layers are made where onnxruntime's optimizer makes them (DequantizeLinear in
        front of a Conv, Gemm or MatMul, QuantizeLinear behind it) and nowhere else, and every
        other operator between the two is computed in float, as there. That is what makes the
        rounding the same.

Axes: C channels, H rows, W positions (time), O output channels, K products of one output.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from .micro_constants import Constant, Constants, Quant, bytes_of, float_of, int_of, ints_of, single
from .micro_program import (
    BINARY,
    CHANNELS,
    DEPTH_F,
    DEPTH_Q,
    DEQUANT,
    GEMM_F,
    GEMM_Q,
    GLOBAL_F,
    GLOBAL_Q,
    INPUT,
    MAX_F,
    MAX_Q,
    MEAN_F,
    NORM,
    OUTPUT,
    PLANAR,
    QUANT,
    SCRATCH_BYTES_MAX,
    SOFTMAX,
    SOFTMAX_Q,
    TABLE,
    UNARY,
    Alias,
    Layer,
    NotAChainError,
    Program,
    Room,
    Step,
    check,
)  # fmt: skip
from .onnx_graph import FLOAT, INT8, INT32, Model, Node

OPSETS = range(9, 27)  # versions whose operators are known here to mean the same
AXIS_MAX = 1 << 20  # of an activation; a sensor's window is far below
PRODUCTS_MAX = 32_000  # of one quantized output: 255 * 255 * 32000 fits an int32
GROUPS_MAX = 4096  # of a convolution that is not depthwise: each is packed alone
SPREAD_MAX = 1 << 20  # elements of a constant that differs over positions
TABLES_MAX = 1024  # channels of a quantized Add or Mul

_UNARY = {"Relu": 0, "Sigmoid": 1, "Tanh": 2}
_BINARY = {"Add": (0, 0), "Sub": (1, 2), "Mul": (3, 3), "Div": (4, 5)}  # x op c, c op x


def plan(model: Model) -> Program:
    """Return the program of a model's graph.

    Raises:
        NotAChainError: It is not a chain of layers that the micro engine has.
        OnnxFormatError: A constant's bytes do not fit its shape.
    """
    return Chain(model).follow()


class Chain:
    """Follows a graph from its input to its output and makes a step of each layer."""

    def __init__(self, model: Model) -> None:
        graph = model.graph
        check(not model.external, "its weights are in another file")
        check(not model.functions, "it defines functions")
        check(not graph.sparse, "it has sparse weights")
        inputs = [each for each in graph.inputs if each.name not in graph.initializers]
        check(len(inputs) == 1, f"it has {len(inputs)} inputs, the kernel path takes one")
        check(len(graph.outputs) == 1, f"it has {len(graph.outputs)} outputs, not one")
        self._opset = model.opsets.get("", 0)
        check(self._opset in OPSETS, f"opset {self._opset} is not known")
        self._input, self._output = inputs[0], graph.outputs[0]
        self._users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in dict.fromkeys(node.inputs):
                self._users.setdefault(name, []).append(node)
        self._nodes = len(graph.nodes)
        self._constants = Constants(graph)
        self._steps: list[Step] = []
        self._quant: Quant | None = None
        self._raw = False  # the quantized values themselves are the graph's value here
        self._quantized = False
        self._shape: tuple[int, ...] = ()
        self._room = Room(1, 1, 1)

    def follow(self) -> Program:
        """Make the program."""
        shape = self._input.shape
        check(self._input.type == FLOAT, "its input is not float32")
        if shape is None or not 2 <= len(shape) <= 4:
            raise NotAChainError("its input has not 2 to 4 axes")
        sizes = [dim if isinstance(dim, int) else -1 for dim in shape]
        for axis, dim in enumerate(sizes[1:], 1):
            check(0 < dim <= AXIS_MAX, f"axis {axis} of its input is free or out of range")
        self._shape = tuple(sizes[1:])
        self._room = self._make_room(self._shape)
        if self._room.h * self._room.w == 1:
            self._room.call = INPUT
        else:
            source = Room(self._room.h, self._room.w, self._room.c, call=INPUT)
            self._steps.append(Step(CHANNELS, source, self._room))
        name = self._input.name
        for _ in range(self._nodes):
            if name == self._output.name:
                break
            node = self._user(name)
            if node is None:
                count = len(self._users.get(name, ()))
                raise NotAChainError(f"value {name!r} has {count} consumers, not one")
            name = self._layer(node, name)
        check(name == self._output.name, "it has a cycle")
        check(not self._raw, "its output is quantized")
        self._real()
        self._finish()
        check(self._output.type == FLOAT, "its output is not float32")
        outputs = ((self._output.name, FLOAT, (sizes[0], *self._shape)),)
        inputs = ((self._input.name, FLOAT, tuple(sizes)),)
        return Program(inputs, outputs, self._steps, self._quantized)

    # ---- the graph -----------------------------------------------------------------------

    def _user(self, name: str) -> Node | None:
        """Return the one node that reads a value; None if it is read more often, or goes out."""
        users = self._users.get(name, ())
        return users[0] if len(users) == 1 and name != self._output.name else None

    def _next(self, name: str, *ops: str) -> Node | None:
        """Return the one reader of a value if it is one of `ops` and reads it first."""
        node = self._user(name)
        if node is None or node.op not in ops or node.domain or node.inputs[0] != name:
            return None
        return node if len(node.outputs) == 1 and _arity(node) else None

    # ---- steps ---------------------------------------------------------------------------

    def _make_room(self, shape: tuple[int, ...], *, item: int = 4) -> Room:
        check(all(0 < dim <= AXIS_MAX for dim in shape), f"an activation of shape {shape}")
        c, h, w = (*shape, 1, 1)[:3] if len(shape) != 2 else (shape[0], 1, shape[1])
        room = Room(h, w, c, item)
        check(h * w * c * item <= SCRATCH_BYTES_MAX, f"an activation of shape {shape}")
        return room

    def _add(self, kind: int, shape: tuple[int, ...], *, item: int = 4, **more: Any) -> Step:
        """Append a step into a new room, which becomes the current one."""
        room = self._make_room(shape, item=item)
        step = Step(kind, self._room, room, **more)
        self._steps.append(step)
        self._room, self._shape = room, shape
        return step

    def _change(self, kind: int, **more: Any) -> Step:
        """Append a step that changes the current room in place; the call's input is not ours."""
        if self._room.call:
            return self._add(kind, self._shape, **more)
        step = Step(kind, self._room, self._room, **more)
        self._steps.append(step)
        return step

    def _real(self) -> None:
        """Make the current value float."""
        if self._quant is not None:
            self._add(DEQUANT, self._shape, step=self._quant.scale)
            self._quant = None

    def _finish(self) -> None:
        """Put the current value where the call wants its output."""
        room = self._room
        if room.h * room.w > 1 or room.call:
            target = Room(room.h, room.w, room.c, call=OUTPUT)
            self._steps.append(Step(PLANAR, room, target))
        else:
            room.call = OUTPUT

    def _layer(self, node: Node, name: str) -> str:
        """Make the steps of a node that reads `name`; return the name of what it makes."""
        check(not node.domain, f"op {node.domain}.{node.op} is not in the kernel path")
        made = getattr(self, "_op_" + _OPS.get(node.op, ("none", 0, 0))[0], None)
        if made is None:
            raise NotAChainError(f"op {node.op} is not in the kernel path")
        check(
            sum(bool(each) for each in node.outputs) == 1 and node.outputs[0],
            f"op {node.op} has several outputs",
        )
        check(_arity(node), f"op {node.op} has {len(node.inputs)} inputs")
        for at, each in enumerate(node.inputs):
            if each and each != name:
                held = self._constants.get(each) is not None
                check(held, f"input {at} of op {node.op} is not constant: not a chain")
        check(node.inputs.count(name) == 1, f"op {node.op} reads its input twice")
        left = node.inputs[0] == name or node.op in _LEFT
        check(left, f"op {node.op} has its constant on the left")
        if node.op != "DequantizeLinear":
            check(not self._raw, f"op {node.op} reads quantized values")
        out: str = made(node)
        return out

    def _op_quantize(self, node: Node) -> str:
        quant = self._constants.quant_of(node)
        if self._quant != quant:  # (q * s) / s rounds to q: the same again changes nothing
            self._real()
            self._add(QUANT, self._shape, item=2, step=quant.scale, low=quant.low, high=quant.high)
        self._quant, self._raw = quant, True
        return node.outputs[0]

    def _op_dequantize(self, node: Node) -> str:
        check(self._raw, "op DequantizeLinear does not follow a QuantizeLinear")
        check(self._quant == self._constants.quant_of(node), "an activation's two scales differ")
        self._raw = False
        return node.outputs[0]

    def _op_same(self, node: Node) -> str:
        return node.outputs[0]

    def _op_unary(self, node: Node) -> str:
        follower = self._requant(node) if node.op == "Sigmoid" else None
        if follower is not None:
            source, quant = self._quant, self._constants.quant_of(follower)
            assert source is not None  # _requant has looked
            reals = [single(q * source.scale) for q in range(source.low, source.high + 1)]
            sigmoids = [single(1 / (1 + math.exp(-min(max(x, -100), 100)))) for x in reals]
            return self._table([quant.nearest(single(y / quant.scale)) for y in sigmoids], follower)
        self._real()
        last = self._steps[-1] if self._steps else None
        layer = last is not None and last.kind in (GEMM_F, DEPTH_F)
        if node.op == "Relu" and last is not None and layer and not last.flag:
            last.flag = 1
        else:
            self._change(UNARY, flag=_UNARY[node.op])
        return node.outputs[0]

    def _op_binary(self, node: Node) -> str:
        first = self._constants.get(node.inputs[0]) is not None
        constant = self._constants.get(node.inputs[0 if first else 1])
        assert constant is not None  # _layer has looked
        follower = self._requant(node) if node.op in ("Add", "Mul") else None
        if follower is not None and constant.scales:
            return self._quantized_binary(node, constant, follower, first)
        self._real()
        values = self._spread(constant, constant.real(), node.op)
        self._change(BINARY, flag=_BINARY[node.op][first], constants=values)
        return node.outputs[0]

    def _requant(self, node: Node) -> Node | None:
        """Return the QuantizeLinear behind a node that reads quantized values.

        Onnxruntime then has one integer operator for the three, if both types are the same.
        """
        follower = self._next(node.outputs[0], "QuantizeLinear")
        if self._quant is None or follower is None:
            return None
        return follower if self._constants.quant_of(follower).type == self._quant.type else None

    def _table(self, table: Sequence[int], follower: Node) -> str:
        """Map each quantized value by a table, one or one for each channel."""
        assert self._quant is not None
        self._add(TABLE, self._shape, item=2, constants=array("h", table), low=self._quant.low)
        self._quant, self._raw = self._constants.quant_of(follower), True
        return follower.outputs[0]

    def _quantized_binary(self, node: Node, constant: Constant, follower: Node, first: bool) -> str:
        """Add or multiply by a quantized constant; the order of roundings is onnxruntime's."""
        source, quant = self._quant, self._constants.quant_of(follower)
        assert source is not None
        good = constant.type == source.type and len(constant.scales) == 1
        check(good, f"quantized {node.op} of a constant of another type, or per channel")
        values = self._spread(constant, constant.values, node.op)
        count = len(values)
        check(
            count in (1, self._room.c) and self._room.c <= TABLES_MAX,
            f"quantized {node.op} of a constant that differs over positions",
        )
        scale, table = constant.scales[0], array("h")
        own, other = single(source.scale / quant.scale), single(scale / quant.scale)
        ratio = single(single(source.scale * scale) / quant.scale)
        # What onnxruntime rounds where it has a fused multiply-add: each sum, and the second zero
        # point's product. A product of 8 and 24 bits is exact here.
        ours, theirs = (own, source.zero), (other, constant.zero)
        (gain, zero), (gain2, zero2) = (theirs, ours) if first else (ours, theirs)
        fixed = single(quant.zero - single(gain * zero + single(gain2 * zero2)))
        for value in values:
            for q in range(source.low, source.high + 1):
                if node.op == "Mul":
                    y = single(single(q * value * ratio) + quant.zero)
                else:
                    pair = (q + source.zero, value + constant.zero)
                    left, right = pair[::-1] if first else pair
                    y = single(single(fixed + right * gain2) + left * gain)
                table.append(quant.nearest(y, minus=quant.zero))
        return self._table(table, follower)

    def _spread(self, constant: Constant, values: array[Any], op: str) -> array[Any]:
        """Return a constant as one number, one for each channel, or one for each element."""
        rank = len(self._shape) + 1
        check(len(constant.shape) <= rank, f"a constant of {op} has more axes than the value")
        shape = (1,) * (rank - len(constant.shape)) + constant.shape
        check(shape[0] == 1, f"a constant of {op} differs over the batch")
        pairs = zip(shape[1:], self._shape, strict=True)
        check(all(a in (1, b) for a, b in pairs), f"a constant of {op} does not fit the value")
        if len(values) == 1:
            return values
        # The axes as C, H, W, with the missing ones in the middle or at the end.
        room, own = self._room, shape[1:]
        c, h, w = (own[0], 1, own[1]) if len(own) == 2 else (*own, 1, 1)[:3]
        if h == w == 1:
            return values
        check(room.h * room.w * room.c <= SPREAD_MAX, f"a constant of {op} is too large")
        return array(
            values.typecode,
            [
                values[(channel % c * h + y % h) * w + x % w]
                for y in range(room.h)
                for x in range(room.w)
                for channel in range(room.c)
            ],
        )

    def _op_softmax(self, node: Node) -> str:
        rank = len(self._shape) + 1
        axis = int_of(node, "axis", -1 if self._opset >= 13 else 1)
        check(
            axis in (1, 1 - rank) and (rank == 2 or self._opset >= 13),
            "Softmax is not over the channels",
        )
        follower = self._requant(node)
        if follower is None:
            self._real()
            self._change(SOFTMAX)
            return node.outputs[0]
        source, quant = self._quant, self._constants.quant_of(follower)
        assert source is not None
        check(quant.scale >= 1 / 256 and quant.low <= 0, "a quantized Softmax of another range")
        factor = min((2**32 - 1) / self._shape[0], 0x7FFFFF)
        table = [round(factor * math.exp((i - 255) * source.scale)) for i in range(256)]
        check(quant.low == 0, "a quantized Softmax whose zero point is not the smallest value")
        self._add(
            SOFTMAX_Q, self._shape, item=2, constants=array("I", table), high=quant.high,
            step=math.floor(single(1 / quant.scale)),
        )  # fmt: skip
        self._quant, self._raw = quant, True
        return follower.outputs[0]

    def _op_batch_norm(self, node: Node) -> str:
        check(not int_of(node, "training_mode", 0), "BatchNormalization in training mode")
        self._real()
        held = [self._constants.get(name) for name in node.inputs[1:5]]
        count = self._shape[0]
        parts = [each.real() for each in held if each is not None]
        check(len(parts) == 4 and {len(part) for part in parts} == {count}, "BatchNormalization")
        epsilon = float_of(node, "epsilon", 1e-5)
        check(all(v + epsilon > 0 for v in parts[3]), "BatchNormalization of a variance <= 0")
        gains = [g / math.sqrt(v + epsilon) for g, v in zip(parts[0], parts[3], strict=True)]
        shifts = [b - m * g for b, m, g in zip(parts[1], parts[2], gains, strict=True)]
        last = self._steps[-1] if self._steps else None
        if last is not None and last.kind in (GEMM_F, DEPTH_F) and not last.flag:
            layer = last.layer
            assert layer is not None
            each = len(layer.weights) // count
            weights = [value * gains[i // each] for i, value in enumerate(layer.weights)]
            layer.weights = array("f", weights)
            pairs = zip(layer.bias, gains, shifts, strict=True)
            layer.bias = array("f", [b * g + s for b, g, s in pairs])
        else:
            self._change(BINARY, flag=_BINARY["Mul"][0], constants=array("f", gains))
            self._change(BINARY, flag=_BINARY["Add"][0], constants=array("f", shifts))
        return node.outputs[0]

    def _op_instance_norm(self, node: Node) -> str:
        self._norm(node, self._shape[0])
        return node.outputs[0]

    def _norm(self, node: Node, groups: int) -> None:
        self._real()
        gain, bias = (self._constants.get(name) for name in node.inputs[1:3])
        assert gain is not None and bias is not None
        check(len(gain.values) == len(bias.values) == groups, "InstanceNormalization")
        check(len(self._shape) > 1, "InstanceNormalization of a flat value")
        room = self._room
        size = 2 * room.c + room.c // groups * room.h * room.w
        self._change(
            NORM, groups=groups, scale=gain.real(), constants=bias.real(),
            step=single(float_of(node, "epsilon", 1e-5)), room=Room(1, 1, size),
        )  # fmt: skip

    # ---- shapes --------------------------------------------------------------------------

    def _op_flatten(self, node: Node) -> str:
        check(int_of(node, "axis", 1) == 1, "Flatten of another axis than 1")
        self._reshape((math.prod(self._shape),))
        return node.outputs[0]

    def _op_reshape(self, node: Node) -> str:
        target = self._constants.ints(node.inputs[1])
        shape = self._target(target, bool(int_of(node, "allowzero", 0)))
        norm = self._next(node.outputs[0], "InstanceNormalization")
        if norm is not None and shape[0] > 1 and self._shape[0] % shape[0] == 0:
            back = self._next(norm.outputs[0], "Reshape")
            known = all(self._constants.get(name) is not None for name in norm.inputs[1:])
            if back is not None and known and self._constants.get(back.inputs[1]) is not None:
                before, self._shape = self._shape, shape
                after = self._target(self._constants.ints(back.inputs[1]), False)
                self._shape = before
                if after == before:  # group normalisation
                    self._norm(norm, shape[0])
                    return back.outputs[0]
        self._reshape(shape)
        return node.outputs[0]

    def _target(self, target: Sequence[int], zero: bool) -> tuple[int, ...]:
        """Return the shape that a Reshape makes of one sample; the batch must stay in front."""
        total = math.prod(self._shape)
        old = (0, *self._shape)
        check(2 <= len(target) <= 4 and not zero, f"Reshape to {tuple(target)}")
        rest = [old[i] if dim == 0 and i < len(old) else dim for i, dim in enumerate(target)]
        batch, sizes = target[0], rest[1:]
        check(all(dim > 0 or dim == -1 for dim in sizes), f"Reshape to {tuple(target)}")
        known = math.prod(dim for dim in sizes if dim > 0)
        fixed = self._input.shape[0] if self._input.shape else None
        if -1 in sizes:
            # With a free batch, only 0 keeps it; a fixed one may be named.
            check(batch == 0 or batch == fixed, f"Reshape to {tuple(target)} mixes the batch")
            check(sizes.count(-1) == 1 and total % known == 0, f"Reshape to {tuple(target)}")
            sizes = [total // known if dim == -1 else dim for dim in sizes]
        else:
            good = batch in (0, -1) or batch == fixed
            check(good and known == total, f"Reshape to {tuple(target)} mixes the batch")
        return tuple(sizes)

    def _op_squeeze(self, node: Node) -> str:
        axes = self._axes(node, [i for i, dim in enumerate((0, *self._shape)) if dim == 1])
        check(0 not in axes and all((0, *self._shape)[axis] == 1 for axis in axes), "Squeeze")
        self._reshape(tuple(dim for i, dim in enumerate(self._shape, 1) if i not in axes))
        return node.outputs[0]

    def _op_unsqueeze(self, node: Node) -> str:
        sizes = list(self._shape)
        for axis in sorted(self._axes(node, [], extra=True)):
            check(axis > 0, "Unsqueeze in front of the batch")
            sizes.insert(axis - 1, 1)
        check(len(sizes) <= 3, "Unsqueeze to more than 4 axes")
        self._reshape(tuple(sizes))
        return node.outputs[0]

    def _reshape(self, shape: tuple[int, ...]) -> None:
        """Give the same planar order of elements another shape."""
        check(0 < len(shape) <= 3, f"a value of shape {shape}")
        if shape == self._shape:
            return
        old, item = self._room, self._room.item
        new = self._make_room(shape, item=item)
        if old.h * old.w == new.h * new.w == 1:
            self._shape = shape
            return
        flag = int(item == 2)
        if old.h * old.w > 1:
            self._add(PLANAR, (old.h * old.w * old.c,), item=item, flag=flag)
        self._shape = shape
        if new.h * new.w > 1:
            # CHANNELS reads its source as planar, whatever that room's own h, w, c.
            source = self._room
            self._room = new
            planar = Room(new.h, new.w, new.c, item, call=source.call)
            if source.call:
                self._steps.append(Step(CHANNELS, planar, new, flag))
            else:
                self._steps.append(Step(CHANNELS, Alias(source, new), new, flag))

    def _axes(self, node: Node, default: Sequence[int], *, extra: bool = False) -> list[int]:
        """Return a node's axes, from its attribute or second input, counted from 0."""
        given = node.attributes.get("axes")
        axes: Sequence[int] = default
        if isinstance(given, tuple):
            axes = [int(axis) for axis in given if isinstance(axis, int)]
        elif len(node.inputs) > 1 and node.inputs[1]:
            axes = self._constants.ints(node.inputs[1])
        rank = len(self._shape) + 1 + (len(axes) if extra else 0)
        check(all(-rank <= axis < rank for axis in axes), f"axes of {node.op}")
        return [axis % rank for axis in axes]

    # ---- pools ---------------------------------------------------------------------------

    def _window(
        self, node: Node, kernel: Sequence[int]
    ) -> tuple[dict[str, Any], list[int], tuple[int, ...]]:
        """Return kernel, stride, dilation, pad as (h, w), the pads, and the output's sizes."""
        axes = len(self._shape) - 1
        check(axes in (1, 2) and len(kernel) == axes, f"{node.op} of {axes + 2} axes")
        stride = ints_of(node, "strides", (1,) * axes)
        dilation = ints_of(node, "dilations", (1,) * axes)
        pads = list(ints_of(node, "pads", (0,) * 2 * axes))
        good = len(stride) == len(dilation) == axes and len(pads) == 2 * axes
        check(good, f"a window of {node.op} has other axes than the value")
        everything = (*kernel, *stride, *dilation)
        check(all(0 < each <= 4096 for each in everything), f"a window of {node.op}")
        check(all(0 <= pad <= 4096 for pad in pads), f"pads of {node.op}")
        auto = bytes_of(node, "auto_pad", b"NOTSET")
        check(auto in (b"NOTSET", b"VALID", b"SAME_UPPER", b"SAME_LOWER"), "auto_pad")
        check(not int_of(node, "ceil_mode", 0), "ceil_mode is not in the kernel path")
        sizes: list[int] = []
        for i, size in enumerate(self._shape[1:]):
            reach = (kernel[i] - 1) * dilation[i] + 1
            if auto == b"VALID":
                pads[i] = pads[i + axes] = 0
            elif auto != b"NOTSET":
                need = max((-(-size // stride[i]) - 1) * stride[i] + reach - size, 0)
                first = need // 2 if auto == b"SAME_UPPER" else need - need // 2
                pads[i], pads[i + axes] = first, need - first
            sizes.append((size + pads[i] + pads[i + axes] - reach) // stride[i] + 1)
        check(min(sizes) > 0, f"a window of {node.op} is larger than the value")
        if axes == 1:
            pads = [0, pads[0], 0, pads[1]]
        two = {
            key: (1, value[0]) if axes == 1 else (value[0], value[1])
            for key, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation))
        }
        return {**two, "pad": (pads[0], pads[1])}, pads, (self._shape[0], *sizes)

    def _op_pool(self, node: Node) -> str:
        window, pads, shape = self._window(node, ints_of(node, "kernel_shape", ()))
        most = node.op == "MaxPool"
        check(not int_of(node, "storage_order", 0), "storage_order")
        reach = [(k - 1) * d for k, d in zip(window["kernel"], window["dilation"], strict=True)]
        inside = all(pads[i] <= reach[i % 2] for i in range(4))
        check(inside, f"a window of {node.op} lies in its padding alone")
        if most and self._quant is not None:  # the order of quantized values is that of the real
            self._add(MAX_Q, shape, item=2, **window)
            return node.outputs[0]
        if not most:
            check(window["dilation"] == (1, 1), "AveragePool with dilation")
        self._real()
        flag = 0 if most else int_of(node, "count_include_pad", 0)
        self._add(MAX_F if most else MEAN_F, shape, flag=flag, **window)
        return node.outputs[0]

    def _op_global(self, node: Node) -> str:
        rank = len(self._shape) + 1
        check(rank > 2, f"{node.op} of a flat value")
        shape: tuple[int, ...] = (self._shape[0],) + (1,) * (rank - 2)
        follower = self._next(node.outputs[0], "QuantizeLinear")
        if node.op == "ReduceMean":
            axes = self._axes(node, [])
            check(sorted(axes) == list(range(2, rank)), "ReduceMean over other axes than time")
            if not int_of(node, "keepdims", 1):
                shape = shape[:1]
            follower = None
        if follower is not None and self._quant is not None:
            quant = self._constants.quant_of(follower)
            if quant.type == self._quant.type:
                count = self._room.h * self._room.w
                factor = single(self._quant.scale / single(quant.scale * count))
                self._add(GLOBAL_Q, shape, item=2, step=factor, low=quant.low, high=quant.high)
                self._quant, self._raw = quant, True
                return follower.outputs[0]
        self._real()
        self._add(GLOBAL_F, shape, room=Room(1, 1, 4 * self._shape[0]))
        return node.outputs[0]

    # ---- layers of weights ---------------------------------------------------------------

    def _op_conv(self, node: Node) -> str:
        weights = self._constants.get(node.inputs[1])
        bias = self._constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
        assert weights is not None  # _layer has looked
        axes, groups = len(self._shape) - 1, int_of(node, "group", 1)
        check(len(weights.shape) == axes + 2, "a Conv's weights have other axes than its input")
        outs, inside, *kernel = weights.shape
        fits = groups > 0 and inside * groups == self._shape[0] and outs % groups == 0 and outs
        check(fits, "a Conv's weights do not fit its channels")
        given = ints_of(node, "kernel_shape", tuple(kernel))
        check(tuple(given) == tuple(kernel), "a Conv's kernel_shape is not that of its weights")
        window, pads, (_, *sizes) = self._window(node, kernel)
        taps = math.prod(kernel)
        shape = (outs, *sizes)
        check(groups <= GROUPS_MAX or inside == 1, f"a Conv of {groups} groups")
        depth = inside == 1 and outs == groups and groups > 1
        found = self._fused(node, weights, bias, outs, 0)

        def ordered(values: array[Any]) -> array[Any]:
            """Return (O, C, taps) as (O, taps, C)."""
            if taps == 1 or inside == 1:
                return values
            made = array(values.typecode, values)
            for o in range(outs):
                start = o * inside * taps
                for tap in range(taps):
                    to = start + tap * inside
                    made[to : to + inside] = values[start + tap : start + inside * taps : taps]
            return made

        self._border(pads, real=found is None)
        if found is None:
            layer = Layer(ordered(weights.real()), _bias(bias, outs))
            kind = DEPTH_F if depth else GEMM_F
            self._add(kind, shape, layer=layer, groups=groups, **window)
            return node.outputs[0]
        layer, quant, out = found
        check(inside * taps <= PRODUCTS_MAX, "a quantized Conv sums too many products")
        layer.weights = ordered(layer.weights)
        self._add(
            DEPTH_Q if depth else GEMM_Q, shape, item=2, layer=layer, groups=groups,
            low=quant.low, high=quant.high, **window,
        )  # fmt: skip
        self._quant, self._raw = quant, True
        return out

    def _border(self, pads: Sequence[int], *, real: bool) -> None:
        """Give the current room a border; a convolution never reads the call's own memory."""
        if real:
            self._real()
        if self._room.call:
            source, self._room = self._room, self._make_room(self._shape)
            self._steps.append(Step(CHANNELS, source, self._room))
        border = self._room.border
        border[:] = [max(a, b) for a, b in zip(border, pads, strict=True)]

    def _op_gemm(self, node: Node) -> str:
        weights = self._constants.get(node.inputs[1])
        assert weights is not None  # _layer has looked
        bias, out = None, node.outputs[0]
        if node.op == "Gemm":
            check(not int_of(node, "transA", 0), "Gemm with transA")
            bias = self._constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
        check(len(self._shape) == 1, f"{node.op} of a value that is not flat")
        check(len(weights.shape) == 2, f"{node.op} of weights that are no matrix")
        turned = node.op == "Gemm" and bool(int_of(node, "transB", 0))
        outs, products = weights.shape if turned else weights.shape[::-1]
        check(products == self._shape[0] and outs > 0, f"{node.op} of weights that do not fit")
        alpha, beta = float_of(node, "alpha", 1.0), float_of(node, "beta", 1.0)

        def ordered(values: array[Any]) -> array[Any]:
            """Return (O, K)."""
            if turned:
                return values
            made = array(values.typecode)
            for o in range(outs):
                made.extend(values[o::outs])
            return made

        found = None
        if alpha == beta == 1:
            found = self._fused(node, weights, bias, outs, 0 if turned else 1)
        if found is None:
            self._real()
            values = ordered(weights.real())
            if alpha != 1:
                values = array("f", [alpha * value for value in values])
            shift = _bias(bias, outs)
            if beta != 1:
                shift = array("f", [beta * value for value in shift])
            add = self._next_add(out, outs) if node.op == "MatMul" else None
            if add is not None:
                shift, out = add
            self._add(GEMM_F, (outs,), layer=Layer(values, shift))
            return out
        layer, quant, out = found
        check(products <= PRODUCTS_MAX, "a quantized layer sums too many products")
        layer.weights = ordered(layer.weights)
        if quant.type:
            low, high = quant.low, quant.high
            self._add(GEMM_Q, (outs,), item=2, layer=layer, low=low, high=high)
            self._quant, self._raw = quant, True
        else:
            self._add(GEMM_Q, (outs,), flag=1, layer=layer)
            self._quant = None
        return out

    def _next_add(self, name: str, outs: int) -> tuple[array[float], str] | None:
        """Return the bias that an Add behind a MatMul adds, and the name of the sum."""
        node = self._user(name)
        if node is None or node.op != "Add" or node.domain or len(node.inputs) != 2:
            return None
        other = self._constants.get(node.inputs[1 - node.inputs.index(name)])
        if other is None or other.shape not in ((outs,), (1, outs)) or other.scales:
            return None
        return other.real(), node.outputs[0]

    def _fused(
        self, node: Node, weights: Constant, bias: Constant | None, outs: int, axis: int
    ) -> tuple[Layer, Quant, str] | None:
        """Return the int8 form of a layer, if onnxruntime would make one of it.

        The third is the name behind its QuantizeLinear; a Quant of type 0 says that the output
        is float (a Gemm or MatMul without a QuantizeLinear behind it).
        """
        source = self._quant
        if source is None or not weights.scales or weights.type == INT32:
            return None
        out = node.outputs[0]
        follower = self._next(out, "QuantizeLinear")
        relu = self._next(out, "Relu") if follower is None else None
        if relu is not None:
            follower = self._next(relu.outputs[0], "QuantizeLinear")
            if follower is None or self._constants.quant_of(follower).low != 0:
                return None  # a Relu that the clamp does not do stays, and so does the float layer
        if len(weights.scales) > 1 and weights.axis != axis:
            return None
        if bias is not None and (bias.type != INT32 or not bias.scales):
            return None
        if source.type == INT8 and weights.type != INT8:
            return None
        quant = Quant(1.0, 0, 0)
        if follower is not None:
            quant, out = self._constants.quant_of(follower), follower.outputs[0]
            if quant.type != source.type:
                return None
        elif node.op == "Conv":
            return None
        scales = weights.scales * (outs if len(weights.scales) == 1 else 1)
        factors = array("f", [source.scale * scale for scale in scales])
        factors = array("f", [factor / quant.scale for factor in factors])
        shift = array("i", bytes(4 * outs)) if bias is None else array("i", bias.values)
        check(len(shift) == outs, f"a bias of {node.op} does not fit")
        self._quantized = True
        return Layer(array("h", weights.values), shift, factors), quant, out


# The method that makes the steps, and the least and most inputs.
_OPS: Mapping[str, tuple[str, int, int]] = {
    "QuantizeLinear": ("quantize", 2, 3), "DequantizeLinear": ("dequantize", 2, 3),
    "Identity": ("same", 1, 1), "Dropout": ("same", 1, 3), "Relu": ("unary", 1, 1),
    "Sigmoid": ("unary", 1, 1), "Tanh": ("unary", 1, 1), "Add": ("binary", 2, 2),
    "Sub": ("binary", 2, 2), "Mul": ("binary", 2, 2), "Div": ("binary", 2, 2),
    "Softmax": ("softmax", 1, 1), "BatchNormalization": ("batch_norm", 5, 5),
    "InstanceNormalization": ("instance_norm", 3, 3), "Flatten": ("flatten", 1, 1),
    "Reshape": ("reshape", 2, 2), "Squeeze": ("squeeze", 1, 2), "Unsqueeze": ("unsqueeze", 1, 2),
    "MaxPool": ("pool", 1, 1), "AveragePool": ("pool", 1, 1),
    "GlobalAveragePool": ("global", 1, 1), "ReduceMean": ("global", 1, 2), "Conv": ("conv", 2, 3),
    "Gemm": ("gemm", 2, 3), "MatMul": ("gemm", 2, 2),
}  # fmt: skip
_LEFT = frozenset(("Add", "Sub", "Mul", "Div"))  # these may have their constant on the left


def _arity(node: Node) -> bool:
    """Whether a node has as many inputs as its operator takes, the needed ones named."""
    _, least, most = _OPS.get(node.op, ("", 0, 0))
    return least <= len(node.inputs) <= most and all(node.inputs[:least])


def _bias(bias: Constant | None, outs: int) -> array[float]:
    if bias is None:
        return array("f", bytes(4 * outs))
    values = bias.real()
    check(len(values) in (1, outs), "a bias does not fit its layer")
    return values if len(values) == outs else array("f", list(values) * outs)
