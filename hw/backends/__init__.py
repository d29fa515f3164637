"""Ways to run a model on this machine: one file each, with probe, prepare and placement."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from ..tree import Tree
from . import cuda, tensorrt
from .base import (
    Backend,
    BackendError,
    BackendMissingError,
    Engine,
    Found,
    Placed,
    Placement,
)
from .coral import CoralBackend
from .cpu import CpuBackend
from .kernel import KernelBackend
from .litert import LiteRtBackend
from .openvino import OpenVinoBackend
from .qnn import QnnBackend
from .vela import Compiled, VelaBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "BackendMissingError",
    "Compiled",
    "Engine",
    "Found",
    "Placed",
    "Placement",
    "VelaBackend",
    "probe_all",
]

PROBES_MAX: Final = 4  # at once; each child imports a library of some 100 MB

BACKENDS: Final[dict[str, Backend]] = {
    "ort": CpuBackend(),
    "kernel": KernelBackend(),
    "litert": LiteRtBackend(),
    "openvino": OpenVinoBackend(),
    "qnn": QnnBackend(),
    "vela": VelaBackend(),
    "cuda": cuda.make_backend(),
    "tensorrt": tensorrt.make_backend(),
    "coral": CoralBackend(),
}


def probe_all(tree: Tree | None = None) -> list[Found]:
    """Probe every backend, in the order of ``BACKENDS``; takes as long as the libraries' imports.

    Args:
        tree: Where to look for device nodes; None = this machine.
    """
    root = tree.root if tree else Path("/")
    with ThreadPoolExecutor(PROBES_MAX) as pool:  # each waits for a child; a tree is for one thread
        return list(pool.map(lambda backend: backend.probe(Tree(root)), BACKENDS.values()))
