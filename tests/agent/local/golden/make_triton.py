"""Record what ``tritonclient`` puts on the wire: messages, and the numbers of every field.

    pip install 'tritonclient[grpc]'
    python tests/agent/local/golden/make_triton.py tests/agent/local/golden

Each ``triton_*.bin`` is one serialized message; ``triton_cases.json`` says what is in it, as
protobuf's JSON; ``triton_fields.json`` is the table of fields. None of the product's code is used.
Made with tritonclient 2.73.0, which generated its code from the protocol's own files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as client  # type: ignore[import-not-found]
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.grpc._utils import (  # type: ignore[import-not-found]
    _get_inference_request,
)


def request(inputs: list[Any], outputs: list[Any] | None = None, **rest: Any) -> Any:
    """Return the message that the client would send."""
    given: dict[str, Any] = {
        "model_name": "m",
        "model_version": "",
        "request_id": "",
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "priority": 0,
        "timeout": None,
        "parameters": None,
    }
    return _get_inference_request(inputs=inputs, outputs=outputs, **{**given, **rest})


def tensor(name: str, datatype: str, value: Any) -> Any:
    """Return one input with its elements as raw bytes."""
    made = client.InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(value)
    return made


def shared(name: str) -> Any:
    """Return one input whose elements are in shared memory."""
    made = client.InferInput(name, [2], "FP32")
    made.set_shared_memory("frames", 8, 16)
    return made


def wanted(name: str, *, classes: int = 0, region: str = "") -> Any:
    """Return one requested output."""
    made = client.InferRequestedOutput(name, class_count=classes)
    if region:
        made.set_shared_memory(region, 64, 32)
    return made


def cases() -> dict[str, Any]:
    """Return every recorded message by name."""
    one = np.array([[1.5, -2.0]], np.float32)
    text = np.array([b"ab", b"", "ü".encode()], np.object_)
    service = service_pb2
    typed = service.ModelInferRequest(model_name="m", model_version="3", id="t")
    for datatype, field, values in (
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("UINT16", "uint_contents", [0, 65535]),
        ("UINT64", "uint64_contents", [2**64 - 1]),
        ("FP32", "fp32_contents", [0.5]),
        ("FP64", "fp64_contents", [-0.1]),
        ("BYTES", "bytes_contents", [b"\x00\xff", b""]),
    ):
        entry = typed.inputs.add(name=datatype.lower(), datatype=datatype, shape=[len(values)])
        getattr(entry.contents, field).extend(values)
    answer = service.ModelInferResponse(model_name="m", model_version="1", id="q")
    answer.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    answer.outputs.add(name="z", datatype="FP32", shape=[4])
    answer.outputs[1].parameters["shared_memory_region"].string_param = "frames"
    answer.raw_output_contents.extend([one.tobytes(), b""])
    config = model_config_pb2.ModelConfig(
        name="m",
        platform="onnxruntime_onnx",
        backend="onnxruntime",
        max_batch_size=8,
    )
    config.input.add(name="x", data_type="TYPE_FP32", dims=[2])
    config.output.add(name="y", data_type="TYPE_STRING", dims=[-1])
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(name="m", count=1, kind="KIND_CPU")
    config.dynamic_batching.max_queue_delay_microseconds = 500
    config.dynamic_batching.default_queue_policy.max_queue_size = 64
    config.parameters["threads"].string_value = "1"
    stats = service.ModelStatistics(
        name="m", version="1", last_inference=5, inference_count=7, execution_count=6
    )
    for number, part in enumerate(
        ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    ):
        getattr(stats.inference_stats, part).count = 7
        getattr(stats.inference_stats, part).ns = 1000 + number
    stats.batch_stats.add(batch_size=2).compute_infer.ns = 9
    stats.memory_usage.add(type="CPU", byte_size=1 << 20)
    regions = service.SystemSharedMemoryStatusResponse()
    region = regions.regions["frames"]
    region.name, region.key, region.offset, region.byte_size = "frames", "/frames", 8, 1 << 33
    load = service.RepositoryModelLoadRequest(model_name="m")
    load.parameters["config"].string_param = "{}"
    unload = service.RepositoryModelUnloadRequest(model_name="m")
    unload.parameters["unload_dependents"].bool_param = False
    model = {"name": "m", "version": "1"}
    tensors = service.ModelMetadataResponse.TensorMetadata
    return {
        "infer_raw": request([tensor("x", "FP32", one)], [wanted("y")], request_id="q"),
        "infer_bytes": request([tensor("x", "BYTES", text)], priority=1),
        "infer_shared": request([shared("a"), tensor("b", "INT64", np.arange(3))],
                                [wanted("y", region="frames")]),
        "infer_classes": request([tensor("x", "FP32", one)], [wanted("y", classes=3)]),
        "infer_timeout": request([tensor("x", "FP16", one.astype(np.float16))], timeout=1500),
        "infer_typed": typed,
        "answer": answer,
        "stream_error": service.ModelStreamInferResponse(error_message="no"),
        "stream_answer": service.ModelStreamInferResponse(infer_response=answer),
        "live": service.ServerLiveResponse(live=True),
        "ready": service.ServerReadyResponse(ready=True),
        "model_ready": service.ModelReadyResponse(ready=True),
        "model": service.ModelReadyRequest(**model),
        "server": service.ServerMetadataResponse(name="s", version="1", extensions=["a", "b"]),
        "metadata": service.ModelMetadataResponse(
            name="m", versions=["1", "2"], platform="p",
            inputs=[tensors(name="x", datatype="FP32", shape=[-1, 2])],
            outputs=[tensors(name="y", datatype="INT8", shape=[3])],
        ),
        "config": service.ModelConfigResponse(config=config),
        "statistics": service.ModelStatisticsResponse(model_stats=[stats]),
        "index_request": service.RepositoryIndexRequest(repository_name="r", ready=True),
        "index": service.RepositoryIndexResponse(models=[
            service.RepositoryIndexResponse.ModelIndex(state="READY", reason="", **model)]),
        "load": load,
        "unload": unload,
        "register": service.SystemSharedMemoryRegisterRequest(
            name="frames", key="/frames", offset=8, byte_size=1 << 33),
        "unregister": service.SystemSharedMemoryUnregisterRequest(name="frames"),
        "regions": regions,
    }  # fmt: skip


def fields(descriptor: Any, found: dict[str, Any]) -> None:
    """Add the fields of a message and of those inside it: name -> [number, type, repeated]."""
    path = descriptor.full_name.removeprefix("inference.")
    found[path] = {
        field.name: [field.number, field.type, field.is_repeated] for field in descriptor.fields
    }
    for nested in descriptor.nested_types:
        fields(nested, found)


def main(folder: Path) -> None:
    """Write the files."""
    facts = {}
    for name, message in cases().items():
        (folder / f"triton_{name}.bin").write_bytes(message.SerializeToString(deterministic=True))
        facts[name] = {
            "type": message.DESCRIPTOR.name,
            "json": json_format.MessageToDict(message, preserving_proto_field_name=True),
        }
    table: dict[str, Any] = {}
    for module in (service_pb2, model_config_pb2):
        for descriptor in module.DESCRIPTOR.message_types_by_name.values():
            fields(descriptor, table)
    enum = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    types = {value.name: value.number for value in enum.values}
    for stem, value in (("cases", facts), ("fields", {"messages": table, "types": types})):
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / f"triton_{stem}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
