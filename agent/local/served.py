"""Serve one loaded model: check requests, run them one by one or together, count.

    InferRequest --check--> Work --Scheduler--> run: gather, infer_raw, hand out --> InferResponse

Requests are checked before they wait, so that what cannot run is refused at once. Bytes in shared
memory are read when it is their turn. Where a batch fails, its requests run one by one: nobody
pays for the input of another.

Source: Triton's texts of errors; its extensions for model configuration and statistics.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ... import ShoalError
from ..errors import ModelError, ModelFormatError, ModelInputError
from .config import ModelLimits
from .errors import DeadlineError, RequestError
from .oip import (
    CONFIG_TYPES,
    DATATYPES,
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    Region,
    Value,
    WantedOutput,
    bytes_ends,
    classify,
    split_rows,
)
from .scheduler import Outcome, Scheduler, Work
from .shm import SharedMemory
from .statistics import Statistics

_log = logging.getLogger(__name__)

VERSION: Final = "1"
DIM_MAX: Final = 1 << 62  # of a shape; engines count in int64

_PLATFORMS: Final[Mapping[str, tuple[str, str]]] = {
    "ort": ("onnxruntime", "onnxruntime_onnx"),  # these two are Triton's names
    "ort-python": ("onnxruntime", "onnxruntime_onnx"),
}


class Spec(Protocol):
    """What one input or output is; -1 in ``shape`` is a free axis."""

    @property
    def name(self) -> str:
        """How requests call it."""

    @property
    def type(self) -> str:
        """ONNX's name of its type, in lower case."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""


class Runnable(Protocol):
    """What is needed of a model; ``agent/runtime.py``'s has it. Thread-safe."""

    backend: str
    version: str
    stateful: bool

    @property
    def inputs(self) -> Sequence[Spec]:
        """What it takes."""

    @property
    def outputs(self) -> Sequence[Spec]:
        """What it gives, in order."""

    def infer_raw(
        self,
        inputs: Mapping[str, tuple[Sequence[int], bytes | bytearray | memoryview]],
        outputs: Sequence[str] | None = None,
    ) -> Mapping[str, tuple[tuple[int, ...], bytes]]:
        """Run it on bytes."""

    def close(self) -> None:
        """Refuse further calls; one that runs ends first."""


@dataclass(frozen=True, slots=True)
class _Port:
    datatype: str
    element_size: int
    shape: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Job:
    request: InferRequest
    wanted: tuple[str, ...] | None
    """Names of outputs; None: all."""


class Lane:
    """A request that was checked once; its inputs are views whose bytes may change between runs.

    Attributes:
        datatypes: Of each output.
    """

    def __init__(
        self,
        model: Runnable,
        inputs: Mapping[str, tuple[Sequence[int], bytes | memoryview]],
        wanted: tuple[str, ...] | None,
        datatypes: Mapping[str, str],
        scheduler: Scheduler,
        statistics: Statistics,
        *,
        rows: int,
    ) -> None:
        self._model, self._inputs, self._wanted, self._rows = model, inputs, wanted, rows
        self._scheduler, self._statistics = scheduler, statistics
        self.datatypes = datatypes

    def run(self) -> Mapping[str, tuple[tuple[int, ...], bytes]] | None:
        """Run it in this thread; None where it must wait its turn.

        Raises:
            ModelClosedError: The model is being taken out; nothing ran.
            ModelError: The model failed.
        """
        if not self._scheduler.enter():
            return None
        start_ns = time.monotonic_ns()
        try:
            found = self._model.infer_raw(self._inputs, self._wanted)
        except ShoalError:
            self._statistics.failed(time.monotonic_ns() - start_ns)
            raise
        finally:
            self._scheduler.leave()
        ran_ns = time.monotonic_ns()
        self._statistics.ran((start_ns,), self._rows, start_ns, start_ns, ran_ns, ran_ns)
        return found


class ServedModel:
    """One loaded model with its queue. Thread-safe. States: open -> closed.

    Args:
        name: How clients call it.
        model: Runs; closed with this.
        limits: How it is run.
        memory: Regions that requests may name; None: there is no shared memory.
        statistics: Where it counts; survives a reload.
        queued: Told that a request waits (``Watch.wake``).

    Raises:
        ModelFormatError: A tensor has a type that the protocol does not know, or batches are
            wanted of a model that cannot have any. The model is still open.
    """

    def __init__(
        self,
        name: str,
        model: Runnable,
        limits: ModelLimits,
        memory: SharedMemory | None,
        statistics: Statistics,
        *,
        queued: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._model, self._limits, self._memory = name, model, limits, memory
        self._statistics = statistics
        self._inputs = {each.name: _port(name, each) for each in model.inputs}
        self._outputs = {each.name: _port(name, each) for each in model.outputs}
        self._batched = limits.batch_max > 1  # what the configuration says
        if self._batched:
            _check_batches(name, model)
        self._joins = self._batched  # until the model shows that its rows are none
        self.scheduler = Scheduler(name, limits, self._run, refused=self._refused, queued=queued)
        self.metadata: Mapping[str, Any] = self._metadata()
        self.config: Mapping[str, Any] = self._config()

    def infer(self, request: InferRequest, left_s: float | None) -> InferResponse:
        """Run a request; see ``LocalCore.infer``."""
        outcome = self.scheduler.call(self._work(request, left_s, _nobody), left_s)
        if isinstance(outcome, InferResponse):
            return outcome
        raise outcome

    def submit(
        self, request: InferRequest, left_s: float | None, done: Callable[[Outcome], None]
    ) -> None:
        """Run a request in another thread; see ``LocalCore.submit``."""
        self.scheduler.submit(self._work(request, left_s, done))

    def lane(self, request: InferRequest) -> Lane:
        """Check a request that will come again with other bytes; see ``LocalCore.lane``."""
        job: _Job = self._work(request, None, _nobody).payload
        return Lane(
            self._model,
            {each.name: (each.shape, self._data(each)) for each in request.inputs},
            job.wanted,
            {name: port.datatype for name, port in self._outputs.items()},
            self.scheduler,
            self._statistics,
            rows=self._rows(request.inputs) if self._batched else 1,
        )

    def close(self, seconds: float) -> None:
        """Take nothing more, run what waits for at most ``seconds``, then free the model."""
        self.scheduler.close(seconds)
        self._model.close()

    # ---- before it waits -----------------------------------------------------------------------

    def _work(
        self, request: InferRequest, left_s: float | None, done: Callable[[Outcome], None]
    ) -> Work:
        given = request.inputs
        if len(given) != len(self._inputs):
            raise ModelInputError(
                f"expected {len(self._inputs)} inputs but got {len(given)} inputs for model "
                f"'{self._name}'",
                hint=f"it takes {', '.join(self._inputs)}",
            )
        size = 0
        for each in given:
            size += self._check_input(each)
        if len(given) > 1 and len({each.name for each in given}) != len(given):
            raise ModelInputError("an input is given twice in the request")
        rows, key = 1, None
        wanted = self._wanted(request.outputs)
        if self._batched:
            rows = self._rows(given)
            if self._joins and rows:
                key = (wanted, *sorted((each.name, each.shape[1:]) for each in given))
        now_ns = time.monotonic_ns()
        priority, wait_s = self._schedule(request.parameters, left_s)
        if wait_s <= 0:
            raise DeadlineError("Request timeout expired before it was taken")
        until_ns = now_ns + int(wait_s * 1e9)
        return Work(_Job(request, wanted), key, rows, size, priority, now_ns, until_ns, done)

    def _check_input(self, given: InferInput) -> int:
        port = self._inputs.get(given.name)
        if port is None:
            raise ModelInputError(
                f"unexpected inference input '{given.name}' for model '{self._name}'",
                hint=f"it takes {', '.join(self._inputs)}",
            )
        if given.datatype != port.datatype:
            raise ModelInputError(
                f"inference input '{given.name}' data-type is '{given.datatype}', but model "
                f"'{self._name}' expects '{port.datatype}'"
            )
        shape, count = given.shape, 1
        fits = len(shape) == len(port.shape)
        if fits:
            for have, want in zip(shape, port.shape, strict=True):
                if not 0 <= have < DIM_MAX or (want >= 0 and have != want):
                    fits = False
                    break
                count *= have
        if not fits:
            raise ModelInputError(
                f"unexpected shape for input '{given.name}' for model '{self._name}'. Expected "
                f"{_listed(port.shape)}, got {_listed(shape)}"
            )
        if given.region is not None:
            self._shared().check(given.region)
            size = given.region.byte_size
        elif given.data is not None:
            size = len(given.data)
        else:
            raise ModelInputError(f"input '{given.name}' has no data")
        if port.element_size and size != count * port.element_size:
            raise ModelInputError(
                f"input '{given.name}' got unexpected byte size {size}, expected "
                f"{count * port.element_size}"
            )
        return 0 if given.region is not None else size

    def _wanted(self, outputs: tuple[WantedOutput, ...]) -> tuple[str, ...] | None:
        if not outputs:
            return None
        for each in outputs:
            port = self._outputs.get(each.name)
            if port is None:
                raise ModelInputError(
                    f"unexpected inference output '{each.name}' for model '{self._name}'",
                    hint=f"it gives {', '.join(self._outputs)}",
                )
            if each.classes > 0 and port.datatype == "BYTES":
                raise ModelInputError(f"output '{each.name}' is text and cannot be classified")
            if each.region is not None:
                self._shared().check(each.region)
        names = tuple(each.name for each in outputs)
        if len(set(names)) != len(names):
            raise ModelInputError("an output is asked for twice")
        return names

    def _rows(self, given: Sequence[InferInput]) -> int:
        rows = given[0].shape[0]
        if any(each.shape[0] != rows for each in given):
            raise ModelInputError(
                f"input '{given[0].name}' batch size does not match other inputs for '{self._name}'"
            )
        if rows > self._limits.batch_max:
            raise ModelInputError(
                f"inference request batch-size must be <= {self._limits.batch_max} for "
                f"'{self._name}'"
            )
        return rows

    def _schedule(self, parameters: Mapping[str, Value], left_s: float | None) -> tuple[int, float]:
        """Return priority, and seconds that a request may wait."""
        limits = self._limits
        priority, wait_s = 0, limits.wait_s_max
        if parameters:
            priority = _whole(parameters, "priority")
            timeout_us = _whole(parameters, "timeout")
            if timeout_us:
                wait_s = min(wait_s, timeout_us / 1e6)
        if not 1 <= priority <= limits.priorities:
            priority = (limits.priorities + 1) // 2
        return priority, wait_s if left_s is None else min(wait_s, left_s)

    def _shared(self) -> SharedMemory:
        if self._memory is None:
            raise RequestError("system shared memory is not enabled on this server")
        return self._memory

    def _refused(self, work: Work, error: ShoalError) -> None:
        self._statistics.failed(time.monotonic_ns() - work.since_ns)

    # ---- its turn ------------------------------------------------------------------------------

    def _run(self, batch: Sequence[Work]) -> Sequence[Outcome]:
        if len(batch) == 1:
            return (self._run_one(batch[0]),)
        try:
            return self._run_many(batch)
        except ShoalError as error:
            _log.debug("a batch of model %s failed, its requests run alone: %s", self._name, error)
            return [self._run_one(work) for work in batch]

    def _run_one(self, work: Work) -> Outcome:
        job: _Job = work.payload
        start_ns = time.monotonic_ns()
        try:
            inputs = {each.name: (each.shape, self._data(each)) for each in job.request.inputs}
            ready_ns = time.monotonic_ns()
            found = self._model.infer_raw(inputs, job.wanted)
            ran_ns = time.monotonic_ns()
            response = self._response(job.request, found)
        except ShoalError as error:
            self._statistics.failed(time.monotonic_ns() - work.since_ns)
            return error
        self._statistics.ran(
            (work.since_ns,), work.rows, start_ns, ready_ns, ran_ns, time.monotonic_ns()
        )
        return response

    def _run_many(self, batch: Sequence[Work]) -> Sequence[Outcome]:
        """Run requests of one key as one.

        Raises:
            ShoalError: It did not work together; nobody was told anything.
        """
        start_ns = time.monotonic_ns()
        rows = [work.rows for work in batch]
        total = sum(rows)
        jobs: list[_Job] = [work.payload for work in batch]
        inputs = {}
        for name, port in self._inputs.items():
            given = [_named(job.request.inputs, name) for job in jobs]
            data = [self._data(each) for each in given]
            if not port.element_size:
                self._check_texts(given, data)
            inputs[name] = ((total, *given[0].shape[1:]), b"".join(data))
        ready_ns = time.monotonic_ns()
        found = self._model.infer_raw(inputs, jobs[0].wanted)
        ran_ns = time.monotonic_ns()
        shares: list[dict[str, tuple[tuple[int, ...], memoryview]]] = [{} for _ in batch]
        for name, (shape, whole) in found.items():
            if not shape or shape[0] != total:
                self._joins = False
                _log.warning(
                    "model %s gave output %s of shape %s for %d rows: it is not run in batches "
                    "any more", self._name, name, shape, total,
                )  # fmt: skip
                raise ModelError(f"the rows of output {name} are not those of the inputs")
            parts = split_rows(self._outputs[name].element_size, shape, whole, rows)
            for share, count, part in zip(shares, rows, parts, strict=True):
                share[name] = ((count, *shape[1:]), part)
        outcomes: list[Outcome] = []
        good = []
        for work, job, share in zip(batch, jobs, shares, strict=True):
            try:
                outcomes.append(self._response(job.request, share))
                good.append(work.since_ns)
            except ShoalError as error:  # its shared memory has gone
                outcomes.append(error)
                self._statistics.failed(time.monotonic_ns() - work.since_ns)
        self._statistics.ran(good, total, start_ns, ready_ns, ran_ns, time.monotonic_ns())
        return outcomes

    def _data(self, given: InferInput) -> bytes | memoryview:
        if given.region is not None:
            return self._shared().read(given.region)
        assert given.data is not None, "checked before it waited"
        return given.data

    def _check_texts(self, given: Sequence[InferInput], data: Sequence[bytes | memoryview]) -> None:
        """See that each has its own count of elements: joined, one's would become another's."""
        for each, part in zip(given, data, strict=True):
            count = len(bytes_ends(part))
            if count != math.prod(each.shape):
                raise ModelInputError(
                    f"input '{each.name}' got {count} elements, expected {math.prod(each.shape)}"
                )

    def _response(
        self,
        request: InferRequest,
        found: Mapping[str, tuple[tuple[int, ...], bytes | memoryview]],
    ) -> InferResponse:
        if not request.outputs:
            outputs = [
                InferOutput(name, self._outputs[name].datatype, shape, data, None)
                for name, (shape, data) in found.items()
            ]
        else:
            outputs = [self._output(each, *found[each.name]) for each in request.outputs]
        return InferResponse(self._name, VERSION, tuple(outputs))

    def _output(
        self, wanted: WantedOutput, shape: tuple[int, ...], data: bytes | memoryview
    ) -> InferOutput:
        datatype = self._outputs[wanted.name].datatype
        if wanted.classes > 0:
            batch = shape[0] if self._batched else None
            shape, data = classify(datatype, data, batch, wanted.classes)
            datatype = "BYTES"
        if wanted.region is None:
            return InferOutput(wanted.name, datatype, shape, data, None)
        self._shared().write(wanted.region, data)
        region = Region(wanted.region.name, wanted.region.offset, len(data))
        return InferOutput(wanted.name, datatype, shape, None, region)

    # ---- what it says of itself ----------------------------------------------------------------

    def _metadata(self) -> Mapping[str, Any]:
        def tensors(ports: Mapping[str, _Port]) -> list[dict[str, Any]]:
            return [
                {"name": name, "datatype": port.datatype, "shape": list(port.shape)}
                for name, port in ports.items()
            ]

        return {
            "name": self._name,
            "versions": [VERSION],
            "platform": _PLATFORMS.get(self._model.backend, ("", self._model.backend))[1],
            "inputs": tensors(self._inputs),
            "outputs": tensors(self._outputs),
        }

    def _config(self) -> Mapping[str, Any]:
        limits, backend = self._limits, self._model.backend
        default = (limits.priorities + 1) // 2
        first = 1 if self._batched else 0

        def tensors(ports: Mapping[str, _Port]) -> list[dict[str, Any]]:
            return [
                {
                    "name": name,
                    "data_type": CONFIG_TYPES[port.datatype],
                    "dims": list(port.shape[first:]),
                }
                for name, port in ports.items()
            ]

        scheduling: dict[str, Any] = {}
        if self._batched:
            scheduling["dynamic_batching"] = {
                "preferred_batch_size": [limits.batch_max],
                "max_queue_delay_microseconds": limits.batch_wait_us,
                "priority_levels": limits.priorities,
                "default_priority_level": default,
                "default_queue_policy": {
                    "timeout_action": "REJECT",
                    "default_timeout_microseconds": int(limits.wait_s_max * 1e6),
                    "allow_timeout_override": True,
                    "max_queue_size": limits.queue_max,
                },
            }
        return {
            "name": self._name,
            "platform": _PLATFORMS.get(backend, ("", backend))[1],
            "backend": _PLATFORMS.get(backend, (backend, ""))[0],
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": limits.batch_max if self._batched else 0,
            "input": tensors(self._inputs),
            "output": tensors(self._outputs),
            "instance_group": [
                {"name": f"{self._name}_0", "kind": "KIND_CPU", "count": limits.workers}
            ],
            **scheduling,
        }


def _port(model: str, spec: Spec) -> _Port:
    if spec.type not in DATATYPES:
        raise ModelFormatError(
            f"model {model}: {spec.name} has the type {spec.type}, which the protocol has no name "
            "for",
            hint="convert it inside the model, for example to int8 or float",
        )
    datatype, size = DATATYPES[spec.type]
    return _Port(datatype, size, tuple(spec.shape))


def _check_batches(name: str, model: Runnable) -> None:
    fixed = [
        each.name
        for each in (*model.inputs, *model.outputs)
        if not each.shape or each.shape[0] >= 0
    ]
    if fixed or model.stateful:
        why = "it keeps state" if model.stateful else f"the first axis of {fixed[0]} is not free"
        raise ModelFormatError(
            f"model {name} cannot run in batches: {why}",
            hint="serve it with batch_max 1, or export it with a free batch axis",
        )


def _named(inputs: Sequence[InferInput], name: str) -> InferInput:
    return next(each for each in inputs if each.name == name)


def _listed(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _whole(parameters: Mapping[str, Value], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(
            f"parameter '{name}' must be a whole number, at least 0, not {value!r:.80}"
        )
    return value


def _nobody(outcome: Outcome) -> None:
    """Take the outcome of a call that returns it."""
