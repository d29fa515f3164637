"""Engines that call a vendor's Python API, and know how to attest themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ...ext._pyengine import PyEngine
from .base import BackendError, Engine, Placement, Port

Arrays = list[NDArray[Any]]


class VendorEngine(PyEngine):
    """One model loaded by a vendor's library. As thread-safe as its ``call``: any thread may.

    Attributes:
        attest: Says where the operators of this very engine run.
    """

    attest: Callable[[], Placement]


def make_engine(
    backend: str,
    version: str,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    call: Callable[[Arrays], Arrays],
    *,
    attest: Callable[[], Placement],
    stateful: bool = False,
) -> VendorEngine:
    """Return an engine around `call`, which takes and returns arrays in the order of the ports."""
    engine = VendorEngine(backend, version, inputs, outputs, call, stateful=stateful)
    engine.attest = attest
    return engine


def attest(engine: Engine) -> Placement:
    """Return the placement of an engine that `make_engine` made.

    Raises:
        BackendError: It is another backend's.
    """
    if not isinstance(engine, VendorEngine):
        raise BackendError(f"this engine is of {engine.backend}, and was not loaded here")
    return engine.attest()
