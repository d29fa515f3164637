# ruff: noqa: D102 - the contract stands in grpc_front.Core, method by method
"""Simulate the local core: one model, "echo", that gives back what it gets; regions in memory.

It keeps the contract of ``grpc_front.Core`` and decides nothing else, so that the tests of the
gRPC face see that face alone.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.agent.errors import AgentError, ModelInputError
from shoal.agent.local.oip import InferOutput, InferRequest, InferResponse, Region


class UnknownModelError(AgentError):
    """There is no such model."""

    code = "agent.local.model.unknown"


class OverloadError(AgentError):
    """The model's queue is full."""

    code = "agent.local.overload"
    retry = True


class DeadlineError(AgentError):
    """Nobody waits for this any more."""

    code = "agent.local.deadline"
    retry = True


class EchoCore:
    """Answers by echo; ``hold`` makes calls wait until it is set, as a slow model would."""

    def __init__(self) -> None:
        self.names = {"echo": True}
        self.requests: list[InferRequest] = []
        self.left_s: list[float | None] = []
        self.regions: dict[str, dict[str, Any]] = {}
        self.memory: dict[str, mmap.mmap] = {}
        self.error: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.running = threading.Semaphore(0)

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return all(self.names.values())

    def model_ready(self, name: str, version: str) -> bool:
        self._check(name, version)
        return self.names[name]

    def server_metadata(self) -> Mapping[str, Any]:
        return {"name": "shoal", "version": "0", "extensions": ["statistics"]}

    def model_metadata(self, name: str, version: str) -> Mapping[str, Any]:
        self._check(name, version)
        tensor = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
        return {
            "name": name, "versions": ["1"], "platform": "echo", "inputs": tensor,
            "outputs": tensor,
        }  # fmt: skip

    def model_config(self, name: str, version: str) -> Mapping[str, Any]:
        self._check(name, version)
        return {
            "name": name, "platform": "echo", "max_batch_size": 4, "unheard_of": 1,
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}],
            "output": [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}],
        }  # fmt: skip

    def statistics(self, name: str, version: str) -> Mapping[str, Any]:
        if name:
            self._check(name, version)
        count = {"count": len(self.requests), "ns": 5}
        return {
            "model_stats": [
                {
                    "name": each, "version": "1", "inference_count": len(self.requests),
                    "inference_stats": {"success": count}, "last_inference": 1 << 41,
                }
                for each in self.names if name in ("", each)
            ]
        }  # fmt: skip

    def repository_index(self, *, ready: bool) -> list[Mapping[str, Any]]:
        return [
            {"name": name, "version": "1", "state": "READY" if loaded else "UNAVAILABLE"}
            for name, loaded in self.names.items()
            if loaded or not ready
        ]

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        self._check(name, "")
        self.names[name] = True

    def unload(self, name: str) -> None:
        self._check(name, "")
        self.names[name] = False

    def shm_status(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        return {each: facts for each, facts in self.regions.items() if name in ("", each)}

    def shm_register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        self.regions[name] = {"name": name, "key": key, "offset": offset, "byte_size": byte_size}
        with Path("/dev/shm", key.lstrip("/")).open("r+b") as file:
            self.memory[name] = mmap.mmap(file.fileno(), 0)

    def shm_unregister(self, name: str) -> None:
        for each in [name] if name else list(self.regions):
            if self.regions.pop(each, None):
                self.memory.pop(each).close()

    def infer(self, request: InferRequest, *, left_s: float | None) -> InferResponse:
        self.running.release()
        self.requests.append(request)
        self.left_s.append(left_s)
        if not self.hold.wait(30.0):
            raise TimeoutError("the test never let go")
        if self.error is not None:
            raise self.error
        self._check(request.model, request.version)
        wanted = {each.name: each.region for each in request.outputs}
        outputs = []
        for each in request.inputs:
            data = each.data if each.data is not None else self._read(each.region)
            region = wanted.get(each.name)
            if region is not None:
                start = self._start(region)
                self.memory[region.name][start : start + len(data)] = data
            out = None if region is not None else data
            outputs.append(InferOutput(each.name, each.datatype, each.shape, out, region))
        return InferResponse(request.model, "1", tuple(outputs))

    def _read(self, region: Region | None) -> bytes:
        assert region is not None, "an input has bytes or a region"
        start = self._start(region)
        return self.memory[region.name][start : start + region.byte_size]

    def _start(self, region: Region) -> int:
        if region.name not in self.regions:
            raise ModelInputError(f"Unable to find shared memory region: '{region.name}'")
        return int(self.regions[region.name]["offset"]) + region.offset

    def _check(self, name: str, version: str) -> None:
        if name not in self.names or version not in ("", "1"):
            raise UnknownModelError(f"Request for unknown model: '{name}' is not found")
