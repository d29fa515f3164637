"""A connection to the operator's socket: calls, their errors as ours, waiting for an end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import grpc

from ...proto import operator_pb2 as pb
from ...proto.operator_pb2_grpc import OperatorServiceStub
from .failure import CommandError, Status

CHUNK_BYTES: Final = 256 << 10
TIMEOUT_S: Final = 60.0  # of one call; the longest one verifies the audit log
UPLOAD_TIMEOUT_S: Final = 3600.0
DOCUMENT_BYTES_MAX: Final = 64 << 20
PREFIX_MIN: Final = 6

_STATUS: Final = {
    grpc.StatusCode.NOT_FOUND: Status.NOT_FOUND,
    grpc.StatusCode.DEADLINE_EXCEEDED: Status.TIMEOUT,
}


class Operator:
    """The operator's side of a running server. A context manager; for one thread."""

    def __init__(self, socket: Path) -> None:
        """Take the path of the socket; nothing is opened before it is entered."""
        self._socket = socket

    def __enter__(self) -> Self:
        """Open the connection.

        Raises:
            CommandError: There is no such socket.
        """
        if not self._socket.exists():
            raise self._absent()
        self._channel = grpc.insecure_channel(
            f"unix:{self._socket.absolute()}",
            options=[("grpc.max_receive_message_length", DOCUMENT_BYTES_MAX)],
        )
        self._stub = OperatorServiceStub(self._channel)
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._channel.close()

    def call(self, method: str, request: Any, *, timeout_s: float = TIMEOUT_S) -> Any:
        """Make a call and return its response.

        Raises:
            CommandError: The server does not answer, or refused; with its words and hint.
        """
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as exc:
            raise self._error(exc) from exc

    def json(self, method: str, request: Any) -> Any:
        """Make a call and return the document of its response."""
        return json.loads(self.call(method, request).json)

    def upload(self, path: Path) -> str:
        """Send a file and return the SHA-256 under which it is stored."""

        def chunks() -> Iterator[pb.UploadArtefactRequest]:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield pb.UploadArtefactRequest(chunk=chunk)

        if not path.stat().st_size:
            raise CommandError(f"{path} is empty")
        return str(self.call("UploadArtefact", chunks(), timeout_s=UPLOAD_TIMEOUT_S).sha256)

    def model(self, text: str) -> dict[str, Any]:
        """Return the registered model that a text names.

        Args:
            text: A digest or at least 6 digits of its beginning, ``name`` (its newest version), or
                ``name:version``.

        Raises:
            CommandError: There is none, or more than one.
        """
        return self.versions(text)[-1]

    def versions(self, text: str) -> list[dict[str, Any]]:
        """Return all registered models that a text means, the newest last.

        Args:
            text: As for :meth:`model`; a name alone means all its versions.

        Raises:
            CommandError: There is none, or a digest is that of more than one.
        """
        models = self.json("ListModels", pb.ListModelsRequest())["models"]
        name, _, version = text.partition(":")
        named = [each for each in models if each["name"] == name]
        if version:
            found = [each for each in named if str(each["version"]) == version]
        elif named:
            return sorted(named, key=lambda each: int(each["version"]))
        else:
            long_enough = len(text) >= PREFIX_MIN
            found = [each for each in models if long_enough and each["sha256"].startswith(text)]
        if len(found) != 1:
            what = "more than one model" if found else "no model"
            raise CommandError(
                f"{what} is meant by {text!r:.80}",
                hint="use a name, name:version, or a digest: shoal models list",
                status=Status.ERROR if found else Status.NOT_FOUND,
            )
        return found

    def wait(
        self,
        look: Callable[[], dict[str, Any]],
        *,
        until: Callable[[dict[str, Any]], bool],
        show: Callable[[dict[str, Any]], None],
        timeout_s: float,
        every_s: float = 0.5,
    ) -> dict[str, Any]:
        """Look again and again until the end, and return what was seen last.

        Args:
            look: Asks the server.
            until: Whether that is the end.
            show: Tells progress, each time something changed.
            timeout_s: Give up after this long, s; 0 = never.
            every_s: Time between two looks, s.

        Raises:
            CommandError: It took too long.
        """
        start_s, last = time.monotonic(), None
        while True:
            found = look()
            if found != last:
                show(found)
                last = found
            if until(found):
                return found
            if timeout_s and time.monotonic() - start_s > timeout_s:
                raise CommandError(
                    f"gave up after {timeout_s:g} s; it goes on without this command",
                    hint="look again later, or wait longer with --timeout",
                    status=Status.TIMEOUT,
                )
            time.sleep(every_s)

    def _error(self, exc: Any) -> CommandError:
        code = exc.code()
        trailers = dict(exc.trailing_metadata() or ())
        if code is grpc.StatusCode.UNAVAILABLE and "shoal-code" not in trailers:
            return self._absent()
        hint = trailers.get("shoal-hint-bin", b"")
        return CommandError(
            exc.details() or code.name.lower(),
            hint=hint.decode() if isinstance(hint, bytes) else hint,
            status=_STATUS.get(code, Status.ERROR),
        )

    def _absent(self) -> CommandError:
        return CommandError(
            f"no server answers at {self._socket}",
            hint="start one with: shoal server run; or name its state folder with --state",
        )
