"""A core without models, behind a real ring, in this process or in one of its own.

python -m tests.sims.ring_server NAME [FIELD=VALUE ...]     until SIGTERM or SIGKILL
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Mapping
from typing import Any

from shoal.agent.errors import ModelClosedError, ModelInputError
from shoal.agent.local.errors import OverloadError, UnknownModelError
from shoal.agent.local.oip import InferOutput, InferRequest, InferResponse
from shoal.agent.local.ring_front import RingConfig, RingFront
from shoal.ext.ring import SHM


class DoublerLane:
    """A request of the doubler that comes again; it ends when the doubler's generation does."""

    datatypes: Mapping[str, str]

    def __init__(self, core: Doubler, request: InferRequest) -> None:
        self._core, self._request, self._generation = core, request, core.generation
        same = {each.name: each.datatype for each in request.inputs}
        names = {"echo": same, "large": {"y": "UINT8"}}
        self.datatypes = names.get(request.model, {"y": "FP32"})

    def run(self) -> dict[str, tuple[tuple[int, ...], Any]] | None:
        """Run it, unless something is before it."""
        if self._generation != self._core.generation:
            raise ModelClosedError("it was taken out")
        if self._core.busy:
            return None
        self._core.lane_runs += 1
        found = self._core.run(self._request)
        return {each.name: (each.shape, each.data) for each in found.outputs}


class Doubler:
    """Model "m" gives y = 2 x of float32; the others do one thing that a core does each.

    echo: gives its inputs. slow: as m, after x[0] seconds. full: refuses. broken: raises. large:
    gives x[0] MiB. wait: as m, once ``go`` is set.
    """

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[InferRequest] = []
        self.lanes = self.lane_runs = self.generation = 0
        self.busy = False

    def infer(self, request: InferRequest, *, left_s: float | None) -> InferResponse:
        """Do what the model does."""
        self.asked.append(request)
        return self.run(request)

    def lane(self, request: InferRequest) -> DoublerLane:
        """Check the name, and return how to do it again."""
        if request.model == "nobody":
            raise UnknownModelError(f"no model {request.model!r}")
        self.lanes += 1
        return DoublerLane(self, request)

    def run(self, request: InferRequest) -> InferResponse:
        """Do what the model does, uncounted."""
        name = request.model
        if name not in ("m", "echo", "slow", "full", "broken", "large", "wait"):
            raise UnknownModelError(f"no model {name!r}")
        if name == "echo":
            outputs = [
                InferOutput(each.name, each.datatype, each.shape, each.data, None)
                for each in request.inputs
            ]
            return InferResponse(name, "1", tuple(outputs))
        if name == "full":
            raise OverloadError("the queue is full", hint="ask later")
        if name == "broken":
            raise RuntimeError("as a bug would")
        if [each.datatype for each in request.inputs] != ["FP32"]:
            raise ModelInputError("m takes one FP32 input")
        data = request.inputs[0].data
        assert data is not None
        values = array("f", bytes(data))
        if name == "slow":
            time.sleep(values[0])
        if name == "wait":
            assert self.go.wait(30)
        if name == "large":
            large = bytes(int(values[0]) << 20)
            output = InferOutput("y", "UINT8", (len(large),), large, None)
            return InferResponse(name, "1", (output,))
        y = array("f", [2 * value for value in values]).tobytes()
        output = InferOutput("y", "FP32", request.inputs[0].shape, y, None)
        return InferResponse(name, "1", (output,))

    def repository_index(self, *, ready: bool) -> list[Mapping[str, Any]]:
        """Return the one that a user would see."""
        return [{"name": "m", "version": "1", "state": "READY", "reason": ""}]

    def model_metadata(self, name: str, version: str) -> Mapping[str, Any]:
        """Return that of m."""
        if name != "m":
            raise UnknownModelError(f"no model {name!r}")
        tensor = {"datatype": "FP32", "shape": [-1]}
        return {
            "name": name,
            "versions": ["1"],
            "inputs": [{"name": "x", **tensor}],
            "outputs": [{"name": "y", **tensor}],
        }


class ServerProcess:
    """The doubler behind a ring in a process of its own; a context manager that kills it."""

    def __init__(self, name: str, **fields: float) -> None:
        self.path = SHM / name
        words = [f"{key}={value}" for key, value in fields.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sims.ring_server", name, *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        """End it as a crash would; its process is a zombie until ``__exit__``."""
        self.process.kill()

    def end(self) -> None:
        """End it as an operator would."""
        self.process.terminate()
        assert self.process.wait(20) == 0

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.path.unlink(missing_ok=True)  # what a killed server leaves


def main(name: str, *words: str) -> None:
    """Serve until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    fields: dict[str, Any] = {
        key: float(value) if "." in value else int(value)
        for key, value in (word.split("=") for word in words)
    }
    front = RingFront(Doubler(), name, RingConfig(**fields))
    front.start()
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
    front.stop(5.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
