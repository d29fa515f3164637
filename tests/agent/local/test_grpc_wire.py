"""Vectors: our messages are Triton's on the wire, field by field and byte by byte.

``golden/`` was recorded from ``tritonclient`` by ``golden/make_triton.py``; never edit it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from shoal.proto import inference_pb2 as pb

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, Any] = json.loads((GOLDEN / "triton_cases.json").read_text(encoding="utf-8"))
FIELDS: dict[str, Any] = json.loads((GOLDEN / "triton_fields.json").read_text(encoding="utf-8"))

OURS: dict[str, list[str]] = {
    "Empty": [
        "ServerLiveRequest", "ServerReadyRequest", "ServerMetadataRequest",
        "SystemSharedMemoryRegisterResponse", "SystemSharedMemoryUnregisterResponse",
    ],
    "ServerLiveResponse": ["ServerLiveResponse"],
    "ServerReadyResponse": ["ServerReadyResponse"],
    "ModelRequest": [
        "ModelReadyRequest", "ModelMetadataRequest", "ModelConfigRequest", "ModelStatisticsRequest",
    ],
    "ModelReadyResponse": ["ModelReadyResponse"],
    "ServerMetadataResponse": ["ServerMetadataResponse"],
    "ModelMetadataResponse": ["ModelMetadataResponse"],
    "ModelMetadataResponse.Tensor": ["ModelMetadataResponse.TensorMetadata"],
    "Parameter": ["InferParameter"],
    "Contents": ["InferTensorContents"],
    "ModelInferRequest": ["ModelInferRequest"],
    "ModelInferRequest.Input": ["ModelInferRequest.InferInputTensor"],
    "ModelInferRequest.Output": ["ModelInferRequest.InferRequestedOutputTensor"],
    "ModelInferResponse": ["ModelInferResponse"],
    "ModelInferResponse.Output": ["ModelInferResponse.InferOutputTensor"],
    "ModelStreamInferResponse": ["ModelStreamInferResponse"],
    "ModelConfig": ["ModelConfig"],
    "ModelConfig.Input": ["ModelInput"],
    "ModelConfig.Output": ["ModelOutput"],
    "ModelConfig.Latest": ["ModelVersionPolicy.Latest"],
    "ModelConfig.VersionPolicy": ["ModelVersionPolicy"],
    "ModelConfig.InstanceGroup": ["ModelInstanceGroup"],
    "ModelConfig.QueuePolicy": ["ModelQueuePolicy"],
    "ModelConfig.DynamicBatching": ["ModelDynamicBatching"],
    "ModelConfig.Text": ["ModelParameter"],
    "ModelConfigResponse": ["ModelConfigResponse"],
    "Duration": ["StatisticDuration"],
    "ModelStatistics": ["ModelStatistics"],
    "ModelStatistics.Inference": ["InferStatistics"],
    "ModelStatistics.Batch": ["InferBatchStatistics"],
    "ModelStatistics.Memory": ["MemoryUsage"],
    "ModelStatisticsResponse": ["ModelStatisticsResponse"],
    "RepositoryIndexRequest": ["RepositoryIndexRequest"],
    "RepositoryIndexResponse": ["RepositoryIndexResponse"],
    "RepositoryIndexResponse.Model": ["RepositoryIndexResponse.ModelIndex"],
    "RepositoryParameter": ["ModelRepositoryParameter"],
    "RepositoryModelRequest": ["RepositoryModelLoadRequest", "RepositoryModelUnloadRequest"],
    "SharedMemoryRequest": [
        "SystemSharedMemoryStatusRequest", "SystemSharedMemoryUnregisterRequest",
    ],
    "SharedMemoryRegisterRequest": ["SystemSharedMemoryRegisterRequest"],
    "SharedMemoryStatusResponse": ["SystemSharedMemoryStatusResponse"],
    "SharedMemoryStatusResponse.Region": ["SystemSharedMemoryStatusResponse.RegionStatus"],
}  # fmt: skip
NOT_TRITON = {"RepositoryModelResponse", "HealthCheckRequest", "HealthCheckResponse"}
THEIRS = {theirs: ours for ours, names in OURS.items() for theirs in names}


def message(path: str) -> Any:
    """Return our class by its path inside the package."""
    found: Any = pb
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_every_message_is_compared() -> None:
    """A message that is added must be compared, or be said not to be Triton's."""
    paths: set[str] = set()

    def walk(descriptor: Any) -> None:
        if not descriptor.GetOptions().map_entry:
            paths.add(descriptor.full_name.removeprefix("shoal.inference."))
        for nested in descriptor.nested_types:
            walk(nested)

    for descriptor in pb.DESCRIPTOR.message_types_by_name.values():
        walk(descriptor)
    assert paths == set(OURS) | NOT_TRITON


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ours, theirs) for ours, names in OURS.items() for theirs in names]
)
def test_fields_have_the_protocols_numbers(ours: str, theirs: str) -> None:
    """Number, type and repetition of every field that we know are Triton's."""
    known = FIELDS["messages"][theirs]
    for field in message(ours).DESCRIPTOR.fields:
        assert [field.number, field.type, field.is_repeated] == known[field.name], field.full_name


def test_datatypes_have_the_protocols_numbers() -> None:
    """An enum is a number on the wire."""
    ours = dict(pb.DataType.items())
    ours["TYPE_INVALID"] = ours.pop("TYPE_UNSPECIFIED")
    assert ours == FIELDS["types"]


@pytest.mark.parametrize("name", CASES)
def test_golden_message(name: str) -> None:
    """What the client wrote we read, and what we write it reads: the same bytes."""
    raw = (GOLDEN / f"triton_{name}.bin").read_bytes()
    made = message(THEIRS[CASES[name]["type"]]).FromString(raw)
    told = json_format.MessageToDict(made, preserving_proto_field_name=True)
    assert told == CASES[name]["json"]
    assert made.SerializeToString(deterministic=True) == raw
    made.DiscardUnknownFields()
    assert made.SerializeToString(deterministic=True) == raw, "a field is not in our messages"


def test_kserve_names_the_model_in_field_one() -> None:
    """KServe's load request has no repository: its model_name is field 1."""
    read = pb.RepositoryModelRequest.FromString(b"\x0a\x01m")
    assert (read.repository_name, read.model_name) == ("m", "")
