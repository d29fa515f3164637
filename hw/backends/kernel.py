"""shoal's own kernels, for the small networks of sensors.

Options:
    variant: Which build of the kernels: "generic", "v3", "v4", "v4vnni"; default: the best here.
"""

from __future__ import annotations

from typing import Any

from ... import __version__
from ..tree import Tree
from .base import CPU, BackendError, Engine, Found, Options, Placement, ask_in_child, choose_options
from .cpu import onnx_placement


class KernelBackend:
    """See the module's head."""

    name = "kernel"
    suffixes = (".onnx",)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``."""
        try:
            answer = ask_in_child(self.name)
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=__version__)
        return Found(
            name=self.name, state="ready", version=__version__, devices=tuple(answer["devices"])
        )

    def ask(self) -> dict[str, Any]:
        """Name the instructions that the kernels use on this processor; see ``Backend``."""
        from ...ext import micro

        return {"devices": [f"{CPU}: {each}" for each in micro.variants()]}

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """See ``Backend``."""
        from ...ext import micro

        chosen = choose_options(self.name, options, {"variant": ""})
        try:
            return micro.compile(model, variant=chosen["variant"] or None)
        except micro.MicroError as exc:
            raise BackendError(str(exc), hint=exc.hint) from exc

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``."""
        return onnx_placement(model)
