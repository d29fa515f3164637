"""Google's Coral Edge TPU, for .tflite files that edgetpu_compiler made.

The compiler is a program for x86 Debian, run where models are built: a device only runs what it
wrote. Without options.
"""

from __future__ import annotations

from typing import Any, Final

from ..accelerators import Accelerator
from ..tree import Tree
from . import interpreters
from .base import (
    BackendError,
    BackendMissingError,
    Engine,
    Found,
    Options,
    Placement,
    ask_in_child,
    choose_options,
    devices,
)

LIBRARY: Final = "libedgetpu.so.1"
CUSTOM: Final = "edgetpu-custom-op"
DEVICES: Final = "a Coral Edge TPU (/dev/apex_0, or USB 1a6e:089a or 18d1:9302)"


def _look(tree: Tree | None) -> tuple[list[Accelerator], list[str]]:
    """Return the devices, and what is needed to use them."""
    found, needs = devices(tree, "coral", need=DEVICES)
    if interpreters.installed() is None:
        needs.append("the package ai-edge-litert")
    return found, needs


class CoralBackend:
    """See the module's head."""

    name = "coral"
    suffixes = (".tflite",)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``."""
        package = interpreters.installed()
        version = package.version if package else ""
        found, needs = _look(tree)
        if needs:
            detail = f"needs {' and '.join(needs)}"
            return Found(name=self.name, state="missing", detail=detail, version=version)
        try:
            ask_in_child(self.name)
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=version)
        return Found(
            name=self.name,
            state="ready",
            detail=f"for models with {CUSTOM}, which edgetpu_compiler makes",
            version=version,
            devices=tuple(each.node for each in found),
        )

    def ask(self) -> dict[str, Any]:
        """Open the delegate, which opens the device; see ``Backend``."""
        interpreters.load_delegate(LIBRARY)
        return {}

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """See ``Backend``."""
        choose_options(self.name, options, {})
        placement = interpreters.custom_placement(model, CUSTOM, "edgetpu")
        if CUSTOM not in {each.op for each in placement.nodes}:
            raise BackendError(
                f"the model was not compiled for the Edge TPU: it has no operator {CUSTOM}",
                hint="compile the int8 .tflite with edgetpu_compiler where models are built",
            )
        _, needs = _look(None)
        if needs:
            raise BackendMissingError(f"needs {' and '.join(needs)}")
        package = interpreters.installed()
        return interpreters.load(
            model,
            backend=self.name,
            version=package.version if package else "",
            threads=threads,
            delegate=interpreters.load_delegate(LIBRARY),
            attest=lambda: placement,
        )

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``."""
        from .engines import attest

        return attest(engine)
