"""Reach the server over HTTP: Open Inference Protocol v2 with binary tensors.

One connection, kept alive; a request whose connection the server closed meanwhile is sent once
more, because nothing of it was answered. Source: KServe's protocol, Triton's binary data extension.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from math import prod
from typing import Any, Final, cast
from urllib.parse import quote, urlsplit

from .errors import (
    ClientError,
    ClientInputError,
    DeadlineError,
    OverloadedError,
    ServerFailedError,
    ServerGoneError,
    UnknownModelError,
)
from .tensors import OIP_NAMES, OIP_NUMBERS, Typed, array, typed

ANSWER_BYTES_MAX: Final = 1 << 30  # a server that sends more is broken
HEADER: Final = "Inference-Header-Content-Length"

_ERRORS: Final[Mapping[int, type[ClientError]]] = {
    400: ClientInputError,
    404: UnknownModelError,
    413: ClientInputError,
    429: OverloadedError,
    503: OverloadedError,
    504: DeadlineError,
}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            self.sock = None
            raise


class HttpWay:
    """One connection; see ``Client`` for what is said of it.

    Args:
        address: ``unix:PATH`` or ``http://HOST:PORT``.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        if address.startswith("unix:"):
            self._connection: http.client.HTTPConnection = _UnixConnection(address[5:])
            if not address[5:]:
                raise ClientInputError(f"{address!r} has no path", hint="unix:/run/shoal.sock")
            return
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError as exc:
            raise ClientInputError(f"{address!r} is no address: {exc}") from exc
        if not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
            raise ClientInputError(f"{address!r} is no address", hint="http://HOST:PORT")
        self._connection = http.client.HTTPConnection(parts.hostname, port or 80)

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
        given = {name: typed(name, value) for name, value in inputs.items()}
        found = self.infer_typed(model, given, outputs, version, timeout_s, priority)
        return {name: array(name, *value) for name, value in found.items()}

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
        parameters: dict[str, Any] = {"binary_data_output": True, "timeout": int(timeout_s * 1e6)}
        if priority:
            parameters["priority"] = priority
        head: dict[str, Any] = {
            "inputs": [
                {
                    "name": name,
                    "datatype": OIP_NAMES[t.type],
                    "shape": list(t.shape),
                    "parameters": {"binary_data_size": t.size},
                }
                for name, t in inputs.items()
            ],
            "parameters": parameters,
        }
        if outputs:
            head["outputs"] = [
                {"name": name, "parameters": {"binary_data": True}} for name in outputs
            ]
        text = json.dumps(head).encode()
        body = b"".join([text, *(bytes(t.data) for t in inputs.values())])
        headers = {HEADER: str(len(text)), "Content-Type": "application/octet-stream"}
        path = f"{_path(model, version)}/infer"
        answer, length = self._call("POST", path, body, headers, timeout_s)
        return _outputs(answer, length)

    def models(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return what the server has."""
        headers = {"Content-Type": "application/json"}
        answer, _ = self._call("POST", "/v2/repository/index", b"{}", headers, timeout_s)
        return cast("list[dict[str, Any]]", _json(answer, list))

    def metadata(self, model: str, version: str, timeout_s: float) -> dict[str, Any]:
        """Return what a model takes and gives."""
        answer, _ = self._call("GET", _path(model, version), None, {}, timeout_s)
        return cast("dict[str, Any]", _json(answer, dict))

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> tuple[bytes, int | None]:
        """Return the answer's body and the length of its JSON, if the rest is tensors."""
        until = time.monotonic() + timeout_s
        with self._lock:
            connection = self._connection
            fresh = connection.sock is None
            while True:
                try:
                    connection.timeout = max(0.001, until - time.monotonic())
                    if connection.sock is not None:
                        connection.sock.settimeout(connection.timeout)
                    connection.request(method, path, body, dict(headers))
                    response = connection.getresponse()
                    answer = response.read(ANSWER_BYTES_MAX + 1)
                    break
                except TimeoutError as exc:
                    connection.close()
                    raise DeadlineError(
                        "no answer came in time", hint="raise timeout_s, or see the server"
                    ) from exc
                except (http.client.HTTPException, OSError) as exc:
                    connection.close()
                    stale = isinstance(exc, http.client.RemoteDisconnected | BrokenPipeError)
                    if fresh or not stale:
                        raise ServerGoneError(
                            f"{self._address} does not answer: {exc or type(exc).__name__}",
                            hint="is the server running?",
                        ) from exc
                    fresh = True  # the server closed an idle connection: once more
                except BaseException:
                    connection.close()  # half a request or answer is in it
                    raise
            if len(answer) > ANSWER_BYTES_MAX:
                connection.close()
                raise ServerFailedError(f"the answer has more than {ANSWER_BYTES_MAX} bytes")
        if response.status != 200:
            raise _ERRORS.get(response.status, ServerFailedError)(_reason(answer, response))
        length = response.headers.get(HEADER)
        try:
            return answer, None if length is None else int(length)
        except ValueError as exc:
            raise ServerFailedError(f"the server answered {HEADER}: {length!r}") from exc


def _path(model: str, version: str) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _reason(answer: bytes, response: http.client.HTTPResponse) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status} {response.reason}"


def _json(answer: bytes, kind: type) -> Any:
    try:
        found = json.loads(answer)
    except ValueError as exc:
        raise ServerFailedError(f"the server answered what is no JSON: {exc}") from exc
    if not isinstance(found, kind):
        raise ServerFailedError(f"the server answered a {type(found).__name__}")
    return found


def _outputs(
    answer: bytes, length: int | None
) -> dict[str, tuple[int, tuple[int, ...], bytearray]]:
    """Return the tensors of an answer; all were asked for in binary."""
    found = {}
    at = len(answer) if length is None else length
    try:
        for each in _json(answer[:at], dict)["outputs"]:
            size = each["parameters"]["binary_data_size"]
            shape = tuple(int(axis) for axis in each["shape"])
            data = bytearray(answer[at : at + size])
            if len(data) != size or prod(shape) < 0:
                raise ServerFailedError(f"the output {each['name']!r} is cut short")
            found[str(each["name"])] = OIP_NUMBERS[each["datatype"]], shape, data
            at += size
    except (KeyError, TypeError, ValueError) as exc:
        raise ServerFailedError(f"the answer is none of the protocol: {exc!r}") from exc
    return found
