"""Run a model on an execution provider of ONNX Runtime, through its Python API.

For the processors that are not the CPU: their providers are configured in ways the C face of
``ext`` does not know. ONNX Runtime itself falls back to the CPU without an error when a provider
cannot be loaded or does not take a node; here the first is refused, and the second is counted.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .base import (
    CPU,
    BackendError,
    Package,
    Placed,
    Placement,
    Port,
    check_onnx,
    package,
    short,
)

if TYPE_CHECKING:
    from .engines import Arrays, VendorEngine

CPU_PROVIDER: Final = "CPUExecutionProvider"
DISTRIBUTIONS: Final = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-openvino")
ASSIGNMENT_KEY: Final = "session.record_ep_graph_assignment_info"  # from 1.24 on
NO_FALLBACK_KEY: Final = "session.disable_cpu_ep_fallback"
SEVERITY_ERROR: Final = 3  # providers warn at every load of what is not supported in general

_TYPES: Final = {  # what NumPy has, and an engine of Python can pass on
    "float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7,
    "bool": 9, "float16": 10, "double": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip

# y = x + x, float [1], IR version 7, opset 13: the smallest model that a provider must load.
SMALLEST: Final = bytes.fromhex(
    "080712003a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a02080162"
    "0f0a0179120a0a08080112040a02080142040a00100d"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An execution provider and how it is to be set up."""

    name: str
    """As ONNX Runtime calls it."""
    device: str
    """What its nodes run on, for the placement."""
    options: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    """Of its own package; empty: ONNX Runtime's."""
    ep_devices: tuple[Any, ...] = ()
    """OrtEpDevice of a plugin; empty: the provider is built in."""


def installed() -> Package | None:
    """Return ONNX Runtime's package, not imported."""
    return package("onnxruntime", *DISTRIBUTIONS)


def ep_devices(ort: Any, provider: str = "") -> list[Any]:
    """Return the EP devices that ONNX Runtime sees (from 1.23 on), all or a provider's."""
    seen: list[Any] = getattr(ort, "get_ep_devices", list)()
    return [each for each in seen if provider in ("", each.ep_name)]


def describe(ep_device: Any) -> str:
    """Return an OrtEpDevice in words: provider, vendor, kind of the hardware."""
    kind = str(ep_device.device.type).rpartition(".")[2]
    vendor = ep_device.device.vendor or ep_device.ep_vendor
    return f"{ep_device.ep_name} on {vendor} {kind}".replace("  ", " ")


def load(
    model: bytes,
    *,
    backend: str,
    provider: Provider,
    threads: int,
    cpu_fallback: bool,
    profile: bool,
) -> VendorEngine:
    """Load a model on a provider.

    Args:
        model: ONNX.
        backend: Name of the engine's backend.
        provider: Where it shall run.
        threads: Of the CPU, for the nodes that fall back.
        cpu_fallback: Whether nodes may run on the CPU; if not, one that would is an error.
        profile: Whether each node's time is measured, until the placement is asked for.

    Raises:
        BackendError: ONNX Runtime or the provider refuses; the text has its message.
    """
    check_onnx(model)
    import onnxruntime as ort

    from .engines import make_engine

    version = f"{provider.version} on onnxruntime {ort.__version__}".removeprefix(" on ")
    folder = tempfile.mkdtemp(prefix="shoal-") if profile else ""
    try:
        session = _session(ort, model, provider, threads, cpu_fallback, folder)
        inputs = tuple(_port(each, "input") for each in session.get_inputs())
        outputs = tuple(_port(each, "output") for each in session.get_outputs())
    except BackendError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    names, wanted = [each[0] for each in inputs], [each[0] for each in outputs]

    def call(arrays: Arrays) -> Arrays:
        found: Arrays = session.run(wanted, dict(zip(names, arrays, strict=True)))
        return found

    attest = _attester(session, provider, folder)
    engine = make_engine(backend, version, inputs, outputs, call, attest=attest)
    weakref.finalize(engine, shutil.rmtree, folder, True)
    return engine


def _session(
    ort: Any, model: bytes, provider: Provider, threads: int, cpu_fallback: bool, folder: str
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = SEVERITY_ERROR
    options.add_session_config_entry(ASSIGNMENT_KEY, "1")  # older versions ignore what is unknown
    if not cpu_fallback:
        options.add_session_config_entry(NO_FALLBACK_KEY, "1")
    if folder:
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
    try:
        if provider.ep_devices:
            options.add_provider_for_devices(list(provider.ep_devices), dict(provider.options))
            session = ort.InferenceSession(model, options)
        else:
            listed = [(provider.name, dict(provider.options))]
            session = ort.InferenceSession(model, options, providers=listed)
    except Exception as exc:  # ONNX Runtime has a class for each status, all of Exception
        raise BackendError(f"{provider.name} refuses the model: {short(exc)}") from exc
    session.disable_fallback()  # else a failed call makes a new session on the CPU
    if provider.name not in session.get_providers():
        raise BackendError(
            f"ONNX Runtime did not load {provider.name} and would run the model on the CPU",
            hint="its standard error says which library is missing",
        )
    # A plugin that cannot open its own libraries takes no node, and is in the list all the same.
    nodes = _assigned(session)
    if nodes and all(each.device != provider.name for each in nodes):
        raise BackendError(
            f"{provider.name} takes no operator of the model; all would be on the CPU"
        )
    return session


def _port(found: Any, kind: str) -> Port:
    match = re.fullmatch(r"tensor\((\w+)\)", found.type)
    if match is None or match[1] not in _TYPES:
        raise BackendError(
            f"{kind} {found.name!r} is of type {found.type}, which cannot be passed on"
        )
    shape = tuple(each if isinstance(each, int) else -1 for each in found.shape)
    return found.name, _TYPES[match[1]], shape


def _attester(session: Any, provider: Provider, folder: str) -> Callable[[], Placement]:
    kept: list[Placement] = []  # a profile ends when it is read

    def attest() -> Placement:
        if not kept:
            kept.append(_placement(session, provider, _read_profile(session) if folder else []))
        return kept[0]

    return attest


def _placement(session: Any, provider: Provider, profiled: list[Placed]) -> Placement:
    """Return the placement. A provider fuses nodes, so the profile's are not those of the graph."""
    nodes = _assigned(session)
    timed = Placement.of(_named(profiled, provider), "of those that ran, fused ones as one")
    if nodes:
        return replace(Placement.of(_named(nodes, provider)), cpu_time_share=timed.cpu_time_share)
    if profiled:
        return timed
    reason = "this ONNX Runtime tells it only of a model that was prepared with profile=on"
    return Placement(nodes=(), cpu_share=None, reason=reason)


def _assigned(session: Any) -> list[Placed]:
    """Return the graph's nodes, with providers as devices; none before ONNX Runtime 1.24."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [
        Placed(node.name, node.op_type, group.ep_name)
        for group in session.get_provider_graph_assignment_info()
        for node in group.get_nodes()
    ]


def _named(nodes: list[Placed], provider: Provider) -> list[Placed]:
    """Return the nodes with devices instead of providers."""
    names = {CPU_PROVIDER: CPU, provider.name: provider.device}
    return [replace(each, device=names.get(each.device, each.device)) for each in nodes]


def _read_profile(session: Any) -> list[Placed]:
    """End the profile and return its nodes, with the provider as the device."""
    events = json.loads(Path(session.end_profiling()).read_bytes())
    runs = sum(event["name"] == "model_run" for event in events)
    times: dict[tuple[str, str, str], float] = {}
    for event in events:
        about = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in about:
            name = event["name"].removesuffix("_kernel_time")
            key = name, about["op_name"], about["provider"]
            times[key] = times.get(key, 0.0) + event["dur"]
    return [Placed(*key, us / runs) for key, us in times.items()]
