"""Qualcomm's NPU (Hexagon, HTP) through ONNX Runtime's plugin ``onnxruntime-qnn``.

On x86-64 the package has a simulator of the HTP, bit for bit but slow: there a model can be
compiled and its numbers compared, and its times mean nothing. int8 answers differ from ONNX
Runtime's CPU by a quantization step here and there; the trial's vectors decide whether that is
good enough.

Options:
    cpu_fallback: "off" (default): the NPU takes every operator or the model is refused. "on": also
        those that it lacks run, on the CPU, and so does the quantization of inputs and outputs.
    profile: "on" measures the time of each part until the placement is asked for; default "off".
"""

from __future__ import annotations

import platform
import sys
import threading
from typing import Any, Final

from ..tree import Tree
from . import sessions
from .base import (
    BackendError,
    BackendMissingError,
    Engine,
    Found,
    Options,
    Package,
    Placement,
    ask_in_child,
    choose_options,
    devices,
    package,
    short,
    switch,
)

PROVIDER: Final = "QNNExecutionProvider"
PLUGIN: Final = "libonnxruntime_providers_qnn.so"
HTP: Final = "libQnnHtp.so"
NODES: Final = "/dev/fastrpc-cdsp or /dev/adsprpc-smd"
OPTIONS: Final = {"cpu_fallback": "off", "profile": "off"}

_register_lock = threading.Lock()


def _package() -> Package | None:
    return package("onnxruntime_qnn", "onnxruntime-qnn")


def _simulated() -> bool:
    return platform.machine() == "x86_64" and sys.platform == "linux"


def _ep_devices(ort: Any, found: Package) -> tuple[Any, ...]:
    """Return the plugin's devices; it stays registered until the process ends."""
    with _register_lock:  # a second registration under the name is an error
        if not sessions.ep_devices(ort, PROVIDER):
            ort.register_execution_provider_library(PROVIDER, str(found.folder / PLUGIN))
        return tuple(sessions.ep_devices(ort, PROVIDER))


class QnnBackend:
    """See the module's head."""

    name = "qnn"
    suffixes = (".onnx",)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``."""
        found, runtime = _package(), sessions.installed()
        _, device_needs = devices(tree, "hexagon", need=f"a Hexagon NPU ({NODES})")
        simulated = _simulated() and (tree is None or tree.live)
        needs = []
        if found is None:
            needs.append("the package onnxruntime-qnn")
        if runtime is None:
            needs.append("the package onnxruntime")
        if not simulated:
            needs += device_needs
        version = found.version if found else ""
        if needs:
            detail = "needs " + " and ".join(needs)
            return Found(name=self.name, state="missing", detail=detail, version=version)
        try:
            answer = ask_in_child(self.name)
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=version)
        return Found(
            name=self.name,
            state="ready",
            detail="a simulator of the HTP: its times are not the NPU's" if simulated else "",
            version=version,
            devices=tuple(answer["devices"]),
            variants={"": {}, "split": {"cpu_fallback": "on"}},
            simulated=simulated,
        )

    def ask(self) -> dict[str, Any]:
        """Load the smallest model there is; see ``Backend``."""
        import onnxruntime as ort

        found = _package()
        assert found is not None  # probe looked
        self._load(sessions.SMALLEST, found, threads=1, cpu_fallback=False, profile=False)
        return {"devices": [sessions.describe(each) for each in _ep_devices(ort, found)]}

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """See ``Backend``."""
        chosen = choose_options(self.name, options, OPTIONS)
        found = _package()
        if found is None or sessions.installed() is None:
            raise BackendMissingError(
                "needs the packages onnxruntime and onnxruntime-qnn",
                hint="pip install onnxruntime-qnn, and the onnxruntime that it was made for",
            )
        return self._load(
            model,
            found,
            threads=threads,
            cpu_fallback=switch(self.name, chosen, "cpu_fallback"),
            profile=switch(self.name, chosen, "profile"),
        )

    def _load(
        self, model: bytes, found: Package, *, threads: int, cpu_fallback: bool, profile: bool
    ) -> Engine:
        import onnxruntime as ort

        try:
            ep_devices = _ep_devices(ort, found)
        except Exception as exc:  # not this version of ONNX Runtime, or not this processor
            raise BackendError(f"ONNX Runtime cannot load onnxruntime-qnn: {short(exc)}") from exc
        if not ep_devices:
            raise BackendError("onnxruntime-qnn sees no device that it could run on")
        provider = sessions.Provider(
            name=PROVIDER,
            device="htp-simulator" if _simulated() else "htp",
            options={"backend_path": str(found.folder / HTP)},
            version=found.version,
            ep_devices=ep_devices[:1],
        )
        return sessions.load(
            model,
            backend=self.name,
            provider=provider,
            threads=threads,
            cpu_fallback=cpu_fallback,
            profile=profile,
        )

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``."""
        from .engines import attest

        return attest(engine)
