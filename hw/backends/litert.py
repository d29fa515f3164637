"""LiteRT on the CPU for .tflite files, with XNNPACK's kernels. Without options."""

from __future__ import annotations

from typing import Any

from ...ext.errors import KernelError
from ..tree import Tree
from . import interpreters
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
)


class LiteRtBackend:
    """See the module's head."""

    name = "litert"
    suffixes = (".tflite",)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``."""
        found = interpreters.installed()
        if found is None:
            detail = "needs the package ai-edge-litert"
            return Found(name=self.name, state="missing", detail=detail)
        try:
            answer = ask_in_child(self.name)
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=found.version)
        return Found(
            name=self.name,
            state="ready",
            detail=answer["detail"],
            version=found.version,
            devices=(CPU,),
        )

    def ask(self) -> dict[str, Any]:
        """Open the library, or else the Python interpreter; see ``Backend``."""
        from ...ext import litert

        try:
            litert.library()
        except litert.LiteRtMissingError as exc:
            interpreters.interpreter_module()
            return {"detail": f"through its Python interpreter: {exc}"}
        return {"detail": ""}

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """See ``Backend``."""
        from ...ext import litert

        choose_options(self.name, options, {})
        try:
            return litert.engine(model, threads=threads)
        except litert.LiteRtMissingError as exc:
            raise BackendMissingError(str(exc), hint=exc.hint) from exc
        except KernelError as exc:
            raise BackendError(str(exc), hint=exc.hint) from exc

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``."""
        nodes = tuple(
            Placed(graph.tensors[each.outputs[0]].name if each.outputs else "", op, CPU)
            for graph in interpreters.read_graph(model).subgraphs
            for each in graph.operators
            for op in (each.custom or f"builtin {each.code}",)
        )
        return Placement(nodes=nodes, cpu_share=0.0)
