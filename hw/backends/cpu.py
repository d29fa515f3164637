"""ONNX Runtime's CPU kernels through its C API: what every other backend is compared with.

Options:
    arena: "on" keeps memory between calls; "off" is a little faster for tiny models and lets one
        session serve several threads at once; "auto" (default) goes by the model's size.
"""

from __future__ import annotations

from typing import Any, Final

from ...ext.errors import KernelError
from ..tree import Tree
from . import sessions
from .base import (
    CPU,
    BackendError,
    BackendMissingError,
    Engine,
    Found,
    Options,
    Placed,
    Placement,
    ask_in_child,
    choose_options,
    switch,
)

OPTIONS: Final = {"arena": "auto"}


class CpuBackend:
    """See the module's head."""

    name = "ort"
    suffixes = (".onnx",)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``; the devices are those of ONNX Runtime and of plugins built into it."""
        found = sessions.installed()
        if found is None:
            return Found(name=self.name, state="missing", detail="needs the package onnxruntime")
        try:
            answer = ask_in_child(self.name)
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=found.version)
        return Found(
            name=self.name,
            state="ready",
            detail="through its Python module: slower" if answer["python"] else "",
            version=found.version,
            devices=tuple(answer["devices"]),
            variants={"": {}, "no-arena": {"arena": "off"}},
        )

    def ask(self) -> dict[str, Any]:
        """Run a model through the C API, and list the EP devices; see ``Backend``."""
        engine = self.prepare(sessions.SMALLEST)
        python = engine.backend != self.name
        import onnxruntime as ort

        seen = [sessions.describe(each) for each in sessions.ep_devices(ort)]
        return {"devices": seen or [CPU], "python": python}

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """See ``Backend``."""
        chosen = choose_options(self.name, options, OPTIONS)
        if sessions.installed() is None:
            raise BackendMissingError("needs the package onnxruntime")
        from ...ext import ort

        auto = chosen["arena"] == "auto"
        arena = None if auto else switch(self.name, chosen, "arena")
        try:
            return ort.load(model, threads=threads, arena=arena)
        except ort.OrtMissingError as exc:
            raise BackendMissingError(str(exc), hint=exc.hint) from exc
        except KernelError as exc:
            raise BackendError(str(exc), hint=exc.hint) from exc

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``; the nodes are the model's own, before ONNX Runtime fused them."""
        return onnx_placement(model)


def onnx_placement(model: bytes) -> Placement:
    """Return the placement of an ONNX model that has only the CPU to run on."""
    from ...ext.onnx_graph import read_model

    graph = read_model(model).graph
    nodes = tuple(Placed(node.name, node.op, CPU) for node in graph.nodes)
    return Placement(nodes=nodes, cpu_share=0.0)
