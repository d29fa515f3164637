"""Intel's CPUs, GPUs and NPUs through OpenVINO.

Its own package, not ONNX Runtime's provider: that one was seen to answer wrongly with one thread.

Options:
    device: "CPU" (default), "GPU", "NPU", or several as OpenVINO writes them ("HETERO:NPU,CPU").
        "AUTO" is refused: it starts on the CPU and moves on its own.
    precision: "f32" (default: answers as ONNX Runtime does), "bf16" or "f16". A CPU with AMX would
        choose bf16 by itself, with 8 bits of mantissa.
    profile: "on" measures the time of each operator; default "off".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ..tree import Tree
from .base import (
    CPU,
    BackendError,
    BackendMissingError,
    Engine,
    Found,
    Options,
    Package,
    Placed,
    Placement,
    Port,
    ask_in_child,
    check_onnx,
    choose_options,
    package,
    short,
    switch,
)

if TYPE_CHECKING:
    from .engines import Arrays

OPTIONS: Final = {"device": "CPU", "precision": "f32", "profile": "off"}
PRECISIONS: Final = ("f32", "bf16", "f16")
_TYPES: Final = {  # OpenVINO's names; what has no NumPy type cannot be offered
    "f32": 1, "u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6, "i64": 7, "boolean": 9, "f16": 10,
    "f64": 11, "u32": 12, "u64": 13,
}  # fmt: skip
_NOT_RUN: Final = {"Const", "Input", "Output", "Parameter", "Constant", "Result"}


def _package() -> Package | None:
    return package("openvino", "openvino")


class OpenVinoBackend:
    """See the module's head."""

    name = "openvino"
    suffixes = (".onnx",)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``."""
        found = _package()
        if found is None:
            return Found(name=self.name, state="missing", detail="needs the package openvino")
        try:
            seen = ask_in_child(self.name)["devices"]
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=found.version)
        if not seen:
            return Found(
                name=self.name,
                state="broken",
                detail="openvino finds no device it could run on",
                version=found.version,
            )
        kinds = {device.partition(".")[0] for device in seen}  # GPU.0, GPU.1
        variants: dict[str, Options] = {"": {}} if "CPU" in kinds else {}
        variants |= {kind.lower(): {"device": kind} for kind in sorted(kinds - {"CPU"})}
        return Found(
            name=self.name,
            state="ready",
            version=found.version,
            devices=tuple(f"{device}: {title}" for device, title in seen.items()),
            variants=variants,
        )

    def ask(self) -> dict[str, Any]:
        """List the devices; see ``Backend``."""
        core = _core()
        seen = core.available_devices
        return {"devices": {each: core.get_property(each, "FULL_DEVICE_NAME") for each in seen}}

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """See ``Backend``."""
        chosen = choose_options(self.name, options, OPTIONS)
        if chosen["precision"] not in PRECISIONS or chosen["device"].startswith(("AUTO", "MULTI")):
            raise BackendError(
                f"openvino: no precision {chosen['precision']!r} or device {chosen['device']!r}",
                hint=f"precision is one of {', '.join(PRECISIONS)}; AUTO moves on its own",
            )
        found = _package()
        if found is None:
            raise BackendMissingError("needs the package openvino", hint="pip install openvino")
        profile = switch(self.name, chosen, "profile")
        check_onnx(model)
        from .engines import make_engine

        loaded = _Loaded(model, chosen["device"], _settings(chosen, threads, profile), profile)
        return make_engine(
            self.name,
            found.version,
            loaded.inputs,
            loaded.outputs,
            loaded.call,
            attest=loaded.attest,
            stateful=loaded.stateful,
        )

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``."""
        from .engines import attest

        return attest(engine)


def _core() -> Any:
    from openvino import Core  # type: ignore[import-not-found]

    return Core()


def _settings(chosen: Mapping[str, str], threads: int, profile: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": profile}
    if chosen["device"] == "CPU":
        settings |= {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": chosen["precision"],
        }
    return settings


class _Loaded:
    """A compiled model. Requests are not for two threads, so each call borrows one."""

    def __init__(
        self, model: bytes, device: str, settings: Mapping[str, Any], profile: bool
    ) -> None:
        core = _core()
        try:
            graph = core.read_model(model)
            self.inputs = tuple(_port(each, "input") for each in graph.inputs)
            self.outputs = tuple(_port(each, "output") for each in graph.outputs)
            self._compiled = core.compile_model(graph, device, dict(settings))
            # Which device of several takes an operator is only asked for while the graph is here.
            supported = dict(core.query_model(graph, device)) if ":" in device else {}
        except RuntimeError as exc:
            raise BackendError(f"openvino refuses the model on {device}: {_cause(exc)}") from exc
        self.stateful = bool(graph.get_sinks() or graph.get_variables())
        self._split = [
            Placed(op.get_friendly_name(), op.get_type_name(), _name(where))
            for op in graph.get_ops()
            if (where := supported.get(op.get_friendly_name()))
            and op.get_type_name() not in _NOT_RUN
        ]
        self._device = device
        self._profile = profile
        self._requests: deque[Any] = deque([self._compiled.create_infer_request()])
        self._last: Any = None  # for the profile

    def call(self, arrays: Arrays) -> Arrays:
        """Run once."""
        try:
            request = self._requests.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            # Inputs are read where they are; outputs are copied, because the request is reused.
            found = request.infer(dict(enumerate(arrays)), share_inputs=True, share_outputs=False)
            if self._profile:
                self._last = request.profiling_info
            return [found[index] for index in range(len(self.outputs))]
        finally:
            self._requests.append(request)

    def attest(self) -> Placement:
        """Say where the operators of the compiled graph run, as OpenVINO tells."""
        executed = {
            each.partition(".")[0] for each in self._compiled.get_property("EXECUTION_DEVICES")
        }
        if self._split:
            return Placement.of(self._split, "as OpenVINO plans it, by the graph's nodes")
        if len(executed) != 1:
            seen = ", ".join(sorted(executed))
            return Placement(nodes=(), cpu_share=None, reason=f"it runs on several: {seen}")
        (where,) = executed
        found = Placement.of(self._nodes(_name(where)))
        if self._device == "CPU":  # as was asked for
            return replace(found, cpu_share=0.0, cpu_time_share=None)
        return found

    def _nodes(self, device: str) -> list[Placed]:
        if self._last is not None:
            return [
                Placed(each.node_name, each.node_type, device, each.real_time.total_seconds() * 1e6)
                for each in self._last
                if each.status == each.Status.EXECUTED
            ]
        nodes = []
        for each in self._compiled.get_runtime_model().get_ordered_ops():
            about = each.get_rt_info()
            op = about["layerType"].astype(str) if "layerType" in about else each.get_type_name()
            if op not in _NOT_RUN:
                nodes.append(Placed(each.get_friendly_name(), op, device))
        return nodes


def _name(device: str) -> str:
    return CPU if device.startswith("CPU") else device.lower()


def _port(found: Any, kind: str) -> Port:
    name = found.get_any_name() if found.get_names() else found.get_node().get_friendly_name()
    type_name = found.get_element_type().get_type_name()
    if type_name not in _TYPES or found.get_partial_shape().rank.is_dynamic:
        raise BackendError(f"openvino: {kind} {name!r} is of type {type_name} or of any rank")
    shape = tuple(-1 if each.is_dynamic else each.get_length() for each in found.partial_shape)
    return name, _TYPES[type_name], shape


def _cause(exc: Exception) -> str:
    """Return the message without the places in OpenVINO's source that it passed."""
    lines = [line.strip() for line in str(exc).splitlines()]
    told = [line for line in lines if line and not line.startswith("Exception from")]
    return short(" ".join(told) or exc)
