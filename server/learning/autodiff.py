"""Turn an inference graph into a training step that plain onnxruntime runs.

    (params, [global], [state], x, y, w, lr, [mu]) --> (new params, [new state], loss)

The result is an ordinary ONNX graph of a few dozen kilobytes. A device runs it with the package
it already has for inference; the server runs the same graph. Its metadata say how to call it, so
that a device needs no onnx package:

    metadata_props["shoal.training"] = {"version": 1, x, y, w, lr, mu, loss: names,
      "params": [{"name", "shape", "input", "output", "global"}],   the order of every vector
      "state":  [{"input", "output", "shape", "kind"}]}             optimizer or statistics

A BatchNormalization on a trained path uses the batch's own statistics and moves the running ones,
which are state of kind "statistics": buffers that travel with the parameters. One that no trained
value reaches stays as it is in inference; so does all that is frozen. Dropout does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .errors import LearningError, UnsupportedOperatorError
from .normalise import FORWARD
from .prepare import arrays, prepared, shapes
from .rules import RULES
from .tape import Tape, refuse

METADATA_KEY: Final = "shoal.training"
IR_VERSION: Final = 8
FLAT: Final = frozenset({"Shape", "Size"})  # no gradient goes through what only reads sizes
LABEL, WEIGHT, RATE, MU, LOSS = (f"train.{name}" for name in ("y", "w", "lr", "mu", "loss"))
ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8  # Kingma, Ba (2015), section 2
MOMENTUM: Final = 0.9

Loss = Literal["cross_entropy", "mse"]
Optimizer = Literal["sgd", "momentum", "adam"]


@dataclass(slots=True)
class _Step:
    """What the training graph takes and gives beside the parameters."""

    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    state: list[dict[str, Any]]


def training_graph(
    model: onnx.ModelProto,
    *,
    trainable: Sequence[str],
    loss: Loss = "cross_entropy",
    optimizer: Optimizer = "sgd",
    proximal: bool = False,
) -> onnx.ModelProto:
    """Return the graph of one optimizer step.

    Args:
        model: Inference graph of the default operator set; one float32 input whose first axis is
            the batch, one float32 output (batch, outputs). An older opset than 18 is converted,
            a newer one kept. Cross entropy takes logits: a Softmax at the end is left out.
        trainable: Names of the float32 initializers to train, in the order of every vector.
        loss: ``cross_entropy`` takes ``y`` int64 (batch,); ``mse`` takes ``y`` float32 of the
            output's shape. Both average over the batch by the weights ``w``.
        optimizer: ``sgd``: p - lr g. ``momentum``: v = 0.9 v + g, p - lr v. ``adam``: Kingma, Ba.
        proximal: Add ``mu (p - global)`` to the gradient (FedProx, Li et al. 2020).

    Returns:
        A model whose metadata say how to call it; see the module head.

    Raises:
        UnsupportedOperatorError: A trained path meets an operator without a rule; names the node.
        LearningError: The graph has another form than described, or a name is no initializer.
    """
    source = prepared(model, trainable=trainable, keep_softmax=loss != "cross_entropy")
    graph = source.graph
    values = arrays(graph)
    _check_trainable(trainable, values)
    x, out = graph.input[0].name, graph.output[0].name
    known = shapes(graph) | {name: value.shape for name, value in values.items()}
    if known.get(out, (0,))[0] is not None:
        raise LearningError(
            f"the output {out!r} has a fixed batch size inside the graph",
            hint="export the model with a dynamic batch",
        )
    reached = _reached(graph, trainable)
    statistics = list(
        dict.fromkeys(
            name
            for node in graph.node
            if node.op_type == "BatchNormalization" and node.output[0] in reached
            for name in node.input[3:5]
        )
    )
    moving = {*trainable, *statistics}
    tape = Tape(known, {name: value for name, value in values.items() if name not in moving})

    moved = _forward(tape, graph, reached)
    step = _Step([_info(x, TensorProto.FLOAT, [None, *known[x][1:]])], [], [])
    grads: dict[str, list[str]] = {out: [_loss(tape, out, loss, step)]}
    _backward(tape, graph, reached, grads)

    shape_of = {name: list(values[name].shape) for name in moving}
    step.inputs.append(_info(RATE, TensorProto.FLOAT, []))
    if proximal:
        step.inputs.append(_info(MU, TensorProto.FLOAT, []))
    params = []
    for name in trainable:
        if name not in grads:
            raise LearningError(f"the loss does not depend on {name!r}; do not train it")
        grad = _total(tape, grads[name])
        if proximal:
            pull = tape.op("Sub", [name, f"global.{name}"])
            grad = tape.op("Add", [grad, tape.op("Mul", [MU, pull])])
        _update(tape, name, grad, optimizer, shape_of[name], step)
        params.append(
            {
                "name": name,
                "shape": shape_of[name],
                "input": name,
                "output": f"new.{name}",
                "global": f"global.{name}" if proximal else None,
            }
        )
    if optimizer == "adam":
        _count(tape, step)
    for name in statistics:
        tape.op("Identity", [moved[name]], out=f"new.{name}")
        _keep(step, name, f"new.{name}", shape_of[name], "statistics")
    facts = {
        "version": 1, "x": x, "y": LABEL, "w": WEIGHT, "lr": RATE, "mu": MU if proximal else None,
        "loss": LOSS, "params": params, "state": step.state,
    }  # fmt: skip
    return _assembled(tape, step, params, facts, opset=source.opset_import[0].version)


def training_facts(model: onnx.ModelProto) -> Mapping[str, Any]:
    """Return the facts that a training graph says about itself.

    Raises:
        LearningError: It is no training graph.
    """
    for each in model.metadata_props:
        if each.key == METADATA_KEY:
            found: dict[str, Any] = json.loads(each.value)
            return found
    raise LearningError("the graph carries no training facts")


# --- forward ---------------------------------------------------------------------------------


def _check_trainable(trainable: Sequence[str], values: Mapping[str, np.ndarray]) -> None:
    missing = [name for name in trainable if name not in values]
    if missing or not trainable:
        raise LearningError(f"the graph has no initializers {missing} to train")
    if len(set(trainable)) < len(trainable):
        raise LearningError("a name stands twice among those to train")
    for name in trainable:
        if values[name].dtype != np.float32:
            raise LearningError(f"{name!r} is {values[name].dtype}; only float32 can be trained")


def _reached(graph: onnx.GraphProto, trainable: Sequence[str]) -> set[str]:
    """Return the names of all that a trained value changes.

    Raises:
        UnsupportedOperatorError: A node on the way has no rule.
    """
    reached = set(trainable)
    for node in graph.node:
        if node.op_type in FLAT or reached.isdisjoint(node.input):
            continue
        if node.op_type not in RULES:
            raise refuse(node, "there is no gradient rule for this operator")
        reached.update(name for name in node.output if name)
    return reached


def _forward(tape: Tape, graph: onnx.GraphProto, reached: set[str]) -> dict[str, str]:
    """Write the forward nodes; return {running statistic: its new value}."""
    moved: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Dropout":
            tape.op("Identity", [node.input[0]], out=node.output[0])
        elif node.op_type in FORWARD and node.output[0] in reached:
            moved |= FORWARD[node.op_type](tape, node)
        else:
            tape.nodes.append(node)
    return moved


# --- backward --------------------------------------------------------------------------------


def _loss(tape: Tape, out: str, loss: Loss, step: _Step) -> str:
    """Write the loss and return the gradient of the output."""
    shape = tape.shape(out)
    share = tape.op("Div", [WEIGHT, tape.op("ReduceSum", [WEIGHT], keepdims=0)])
    weights = _info(WEIGHT, TensorProto.FLOAT, [None])
    if loss == "mse":
        step.inputs += [_info(LABEL, TensorProto.FLOAT, list(shape)), weights]
        size = int(np.prod(tape.sizes(out, range(1, len(shape)))))
        error = tape.op("Sub", [out, LABEL])
        wide = tape.reshape(
            tape.op("Div", [share, tape.constant(size)]), [None, *[1] * (len(shape) - 1)]
        )
        weighted = tape.op("Mul", [error, wide])
        tape.op("ReduceSum", [tape.op("Mul", [error, weighted])], keepdims=0, out=LOSS)
        return tape.op("Mul", [weighted, tape.constant(2.0)])
    if len(shape) != 2:
        raise UnsupportedOperatorError(f"cross entropy takes (batch, classes), not {shape}")
    step.inputs += [_info(LABEL, TensorProto.INT64, [None]), weights]
    logs = tape.op("LogSoftmax", [out], axis=1)
    column = tape.op("Unsqueeze", [LABEL, tape.ints(1)])
    picked = tape.reshape(tape.op("GatherElements", [logs, column], axis=1), [None])
    total = tape.op("ReduceSum", [tape.op("Mul", [picked, share])], keepdims=0)
    tape.op("Neg", [total], out=LOSS)
    classes = tape.constant(tape.sizes(out, [1])[0], np.int64)
    truth = tape.op("OneHot", [LABEL, classes, tape.constant([0.0, 1.0])], axis=-1)
    error = tape.op("Sub", [tape.op("Exp", [logs]), truth])
    return tape.op("Mul", [error, tape.op("Unsqueeze", [share, tape.ints(1)])])


def _backward(
    tape: Tape, graph: onnx.GraphProto, reached: set[str], grads: dict[str, list[str]]
) -> None:
    for node in reversed(graph.node):
        if node.output[0] not in grads:
            continue
        need = [name in reached for name in node.input]
        if not any(need):
            continue
        grad = _total(tape, grads[node.output[0]])
        found = RULES[node.op_type](tape, node, grad, need)
        for name, wanted, each in zip(node.input, need, found, strict=True):
            if wanted and each is not None:
                grads.setdefault(name, []).append(each)


def _total(tape: Tape, parts: list[str]) -> str:
    """Return the sum of the gradients that came along several paths."""
    while len(parts) > 1:
        parts[:2] = [tape.op("Add", parts[:2])]
    return parts[0]


# --- optimizers ------------------------------------------------------------------------------


def _update(
    tape: Tape, name: str, grad: str, optimizer: Optimizer, shape: list[int], step: _Step
) -> None:
    if optimizer == "momentum":
        speed = tape.op("Mul", [f"state.velocity.{name}", tape.constant(MOMENTUM)])
        grad = tape.op("Add", [speed, grad], out=f"new.state.velocity.{name}")
        _keep(step, f"state.velocity.{name}", grad, shape, "optimizer")
    elif optimizer == "adam":
        grad = _adam(tape, name, grad, shape, step)
    tape.op("Sub", [name, tape.op("Mul", [RATE, grad])], out=f"new.{name}")


def _adam(tape: Tape, name: str, grad: str, shape: list[int], step: _Step) -> str:
    """Return the direction of Adam's step (Kingma, Ba 2015, algorithm 1, without lr)."""
    hats = []
    square = tape.op("Mul", [grad, grad])
    for label, beta, value in (("mean", ADAM_BETA1, grad), ("square", ADAM_BETA2, square)):
        held = f"state.{label}.{name}"
        old = tape.op("Mul", [held, tape.constant(beta)])
        new = tape.op("Mul", [value, tape.constant(1 - beta)])
        tape.op("Add", [old, new], out=f"new.{held}")
        _keep(step, held, f"new.{held}", shape, "optimizer")
        decay = tape.op("Pow", [tape.constant(beta), "new.state.step"])
        hats.append(tape.op("Div", [f"new.{held}", tape.op("Sub", [tape.constant(1.0), decay])]))
    root = tape.op("Add", [tape.op("Sqrt", [hats[1]]), tape.constant(ADAM_EPSILON)])
    return tape.op("Div", [hats[0], root])


def _count(tape: Tape, step: _Step) -> None:
    """Count Adam's steps; the node goes first, for every parameter reads it."""
    tape.op("Add", ["state.step", tape.constant(1.0)], out="new.state.step")
    tape.nodes.insert(0, tape.nodes.pop())
    _keep(step, "state.step", "new.state.step", [], "optimizer")


def _keep(step: _Step, held: str, new: str, shape: list[int], kind: str) -> None:
    step.inputs.append(_info(held, TensorProto.FLOAT, list(shape)))
    step.outputs.append(_info(new, TensorProto.FLOAT, list(shape)))
    step.state.append({"input": held, "output": new, "shape": shape, "kind": kind})


# --- assembly --------------------------------------------------------------------------------


def _info(name: str, kind: int, shape: Sequence[int | None]) -> onnx.ValueInfoProto:
    sizes = ["batch" if size is None else size for size in shape]
    return helper.make_tensor_value_info(name, kind, sizes)


def _assembled(
    tape: Tape,
    step: _Step,
    params: list[dict[str, Any]],
    facts: dict[str, Any],
    *,
    opset: int,
) -> onnx.ModelProto:
    inputs, outputs = [], []
    for each in params:
        inputs.append(_info(each["input"], TensorProto.FLOAT, each["shape"]))
        outputs.append(_info(each["output"], TensorProto.FLOAT, each["shape"]))
        if each["global"]:
            inputs.append(_info(each["global"], TensorProto.FLOAT, each["shape"]))
    inputs += step.inputs
    outputs += [*step.outputs, _info(LOSS, TensorProto.FLOAT, [])]
    needed = {each.name for each in outputs}
    kept = []
    for node in reversed(tape.nodes):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
    constants = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in tape.constants.items()
        if name in needed
    ]
    graph = helper.make_graph(kept[::-1], "training", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph, opset_imports=opsets, producer_name="shoal",
        ir_version=max(IR_VERSION, helper.find_min_ir_version_for(opsets)),
    )  # fmt: skip
    helper.set_model_props(model, {METADATA_KEY: json.dumps(facts, sort_keys=True)})
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as exc:
        raise LearningError(f"the training graph is not valid: {exc!s:.300}") from exc
    return model
