"""Make an inference graph ready to be trained: one form, whatever exporter it comes from.

Opset 18 or newer, local functions inlined, a free batch axis, logits at the end, all that is
constant computed, all shapes known. torch's exporter needs this: it writes the shapes of a group
normalisation as some ten nodes of arithmetic. What cannot be brought into this form is refused
before any gradient is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, shape_inference, version_converter
from onnx.reference import ReferenceEvaluator

from .errors import LearningError
from .tape import Shape, refuse

OPSET: Final = 18  # the first in which every operator that the rules write takes axes as input
RESERVED: Final = ("grad.", "train.", "new.", "state.", "global.")
"""Names of a training graph start with these, so those of the model may not."""
RANDOM: Final = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike"}
)  # fmt: skip


def prepared(
    model: onnx.ModelProto, *, trainable: Sequence[str], keep_softmax: bool
) -> onnx.ModelProto:
    """Return a copy of a model with a free batch, of opset 18 at least, its shapes inferred.

    Args:
        model: Inference graph.
        trainable: Initializers that are no constants.
        keep_softmax: Leave a Softmax at the end where it is.

    Raises:
        LearningError: The graph is no graph that can be trained, whatever its operators.
    """
    source = onnx.ModelProto()
    source.CopyFrom(model)
    try:
        if source.functions:
            source = inliner.inline_local_functions(source)
        used = [each for each in source.opset_import if each.domain in ("", "ai.onnx")]
        if used and used[0].version < OPSET:
            source = version_converter.convert_version(source, OPSET)
            used = [each for each in source.opset_import if each.domain in ("", "ai.onnx")]
        for node in source.graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise refuse(node, f"operators of {node.domain} have no rule")
        del source.opset_import[:]
        source.opset_import.extend(used)
        _opened(source.graph, keep_softmax=keep_softmax)
        _fold(_inferred(source).graph, used, trainable)
        return _inferred(source)
    except (
        shape_inference.InferenceError,
        version_converter.ConvertError,
        onnx.checker.ValidationError,
    ) as exc:
        raise LearningError(f"the model is not valid ONNX: {exc!s:.300}") from exc


def _inferred(source: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the shapes of all tensors.

    onnx infers nothing behind a GroupNormalization, so for this question it is an Identity.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(source)
    for node in plain.graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    found = shape_inference.infer_shapes(plain, strict_mode=True, data_prop=True).graph
    del source.graph.output[:]
    source.graph.output.extend(found.output)
    source.graph.value_info.extend(found.value_info)
    return source


def _fold(
    graph: onnx.GraphProto, opsets: Sequence[onnx.OperatorSetIdProto], trainable: Sequence[str]
) -> None:
    """Compute what depends on constants alone, and turn CastLike into Cast."""
    kinds = {
        each.name: each.type.tensor_type.elem_type
        for each in (*graph.value_info, *graph.input, *graph.output)
    } | {each.name: each.data_type for each in graph.initializer}
    held = {each.name for each in graph.initializer}
    known = {"", *held} - set(trainable)
    chosen, rest = [], []
    for node in graph.node:
        if node.op_type == "CastLike":
            node.CopyFrom(
                helper.make_node(
                    "Cast", node.input[:1], node.output, name=node.name, to=kinds[node.input[1]]
                )
            )
        sized = node.op_type == "Shape" and node.input[0] in held
        if sized or (known.issuperset(node.input) and node.op_type not in RANDOM):
            chosen.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    used = {name for node in rest for name in node.input}
    names = [name for node in chosen for name in node.output if name in used]
    outputs = [helper.make_empty_tensor_value_info(name) for name in names]
    part = helper.make_graph(chosen, "constants", [], outputs, graph.initializer)
    values = ReferenceEvaluator(helper.make_model(part, opset_imports=opsets)).run(None, {})
    for name, value in zip(names, values, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(rest)


def _opened(graph: onnx.GraphProto, *, keep_softmax: bool) -> None:
    """Free the batch, and let the graph end in logits."""
    held = {each.name for each in graph.initializer}
    inputs = [each for each in graph.input if each.name not in held]
    ends = [*inputs, *graph.output]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise LearningError("a trainable graph has one input and one output")
    for each in ends:
        kind = each.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT or not kind.shape.dim:
            raise LearningError(f"{each.name!r} must be a float32 tensor with a batch axis")
    del graph.input[:]
    graph.input.extend(inputs)
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    for name in sorted(names | held):
        if name.startswith(RESERVED):
            raise LearningError(f"the name {name!r} is reserved", hint="rename it in the model")
    out = graph.output[0]
    last = next((node for node in graph.node if out.name in node.output), None)
    if last is None:
        raise LearningError(f"no node gives the output {out.name!r}")
    if last.op_type == "Softmax" and not keep_softmax:
        out.name = last.input[0]
        graph.node.remove(last)
    for each in (graph.input[0], graph.output[0]):
        batch = each.type.tensor_type.shape.dim[0]
        batch.Clear()
        batch.dim_param = "batch"
    del graph.value_info[:]


def shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Return the inferred shapes by name; None is the batch."""
    found: dict[str, Shape] = {}
    for each in (*graph.value_info, *graph.input, *graph.output):
        if each.type.tensor_type.HasField("shape"):
            found[each.name] = tuple(
                int(d.dim_value) if d.HasField("dim_value") else None
                for d in each.type.tensor_type.shape.dim
            )
    return found


def arrays(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Return the initializers by name."""
    return {each.name: numpy_helper.to_array(each) for each in graph.initializer}
