"""The client's face: one class, whichever way the server is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ...ext.ring import SHM
from . import tensors
from .errors import ClientInputError
from .tensors import OIP_NAMES, Typed

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Answer(Protocol):
    """A way to the server; ``ring.RingWay`` and ``http.HttpWay``."""

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        outputs: tuple[str, ...],
        version: str,
        timeout_s: float,
        priority: int,
    ) -> dict[str, Any]:
        """Run a model on arrays."""

    def infer_typed(
        self,
        model: str,
        inputs: Mapping[str, Typed],
        outputs: tuple[str, ...],
        version: str,
        timeout_s: float,
        priority: int,
    ) -> dict[str, tuple[int, tuple[int, ...], bytearray]]:
        """Run a model on bytes."""

    def models(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return what the server has."""

    def metadata(self, model: str, version: str, timeout_s: float) -> dict[str, Any]:
        """Return what a model takes and gives."""

    def close(self) -> None:
        """Let go."""


class Client:
    """A connection to a local server, made at the first call and again after the server restarts.

    Any number of threads may use it; their calls go one after another. For calls at the same time
    make a client for each. After a fork, the child connects for itself.

    Args:
        address: Name of a shared-memory ring, ``unix:PATH`` of an HTTP socket, or
            ``http://HOST:PORT``.
        timeout_s: How long a call may take, seconds, if it does not say itself.
        spin_us: How long a call over a ring looks for its answer before it sleeps, microseconds;
            None is 50, or 0 where there is one core.
        folder: Where rings are.

    Raises:
        ClientInputError: The address is none.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 10.0,
        spin_us: int | None = None,
        folder: Path = SHM,
    ) -> None:
        if not timeout_s > 0:
            raise ClientInputError(f"timeout_s must be above 0, not {timeout_s}")
        self._timeout_s = timeout_s
        self._way: Answer
        if address.startswith(("unix:", "http://")):
            from .http import HttpWay  # http.client is 10 ms to import: only who needs it

            self._way = HttpWay(address)
        else:
            from .ring import RingWay

            self._way = RingWay(address, spin_us, folder)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] = (),
        *,
        version: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> dict[str, Any]:
        """Run a model.

        Args:
            model: Its name on the server.
            inputs: A C-contiguous array, or another buffer with a format, for each input.
            outputs: Names of the wanted ones; empty is all.
            version: Of the model; empty is whichever serves.
            timeout_s: How long it may take, seconds; None is the client's.
            priority: For the server's queue; 0 is the default.

        Returns:
            A writable array of the caller's own for each output; strings are objects of bytes.

        Raises:
            ClientInputError: The request is not what the model or the ring takes.
            UnknownModelError: The server has no such model.
            OverloadedError: The server's queue is full; it refused at once.
            DeadlineError: No answer came in time.
            ServerFailedError: The model failed.
            ServerGoneError: No server is there, or it died meanwhile.
            RingFullError: Every slot of the ring is taken.
        """
        left_s = self._timeout_s if timeout_s is None else timeout_s
        return self._way.infer(model, inputs, tuple(outputs), version, left_s, priority)

    def infer_raw(
        self,
        model: str,
        inputs: Mapping[str, tuple[str, Sequence[int], Buffer]],
        outputs: Sequence[str] = (),
        *,
        version: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> dict[str, tuple[str, tuple[int, ...], bytearray]]:
        """Run a model without NumPy.

        Args:
            model: As ``infer``, and so the rest.
            inputs: (datatype of the Open Inference Protocol, shape, little-endian bytes) each;
                BYTES are each string's length, 4 bytes, and the string.
            outputs: Names of the wanted ones; empty is all.
            version: Of the model.
            timeout_s: How long it may take, seconds.
            priority: For the server's queue.

        Returns:
            (datatype, shape, bytes) for each output, in the same form.

        Raises:
            ClientError: As ``infer``.
        """
        left_s = self._timeout_s if timeout_s is None else timeout_s
        given = {name: tensors.raw(name, value) for name, value in inputs.items()}
        found = self._way.infer_typed(model, given, tuple(outputs), version, left_s, priority)
        return {
            name: (OIP_NAMES.get(number, f"ONNX{number}"), shape, data)
            for name, (number, shape, data) in found.items()
        }

    def models(self, *, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """Return name, version and state of each model, as the protocol's repository index.

        Raises:
            ClientError: As ``infer``.
        """
        return self._way.models(self._timeout_s if timeout_s is None else timeout_s)

    def metadata(
        self, model: str, *, version: str = "", timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Return name, versions, platform, inputs and outputs of a model, as the protocol's.

        Raises:
            ClientError: As ``infer``.
        """
        left_s = self._timeout_s if timeout_s is None else timeout_s
        return self._way.metadata(model, version, left_s)

    def close(self) -> None:
        """Give the slot or the connection back; a later call would connect again."""
        self._way.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
