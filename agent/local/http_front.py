"""Speak the Open Inference Protocol v2 over HTTP, so that unmodified Triton clients work.

    Request --route--> http_codec --InferRequest--> Core.submit --InferResponse--> Response

``_ROUTES`` below is the whole service. Models, queues, deadlines and shared memory are the core's;
sockets are ``http_server.py``'s. What the core raises becomes a status by ``STATUS``, by its code;
any other error is 500, is logged, and the server lives.

Nothing here blocks the loop: what takes long (loading, large JSON, compression) goes to a lane, a
thread with a bounded queue; what finds it full is 503.

Source: kserve/open-inference-protocol; Triton's extension documents.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Protocol
from urllib.parse import unquote_to_bytes

from ... import ShoalError
from . import http_codec as codec
from .errors import OverloadError, RequestError
from .facts import Facts
from .http_parser import Request
from .http_server import Answer, HttpConfig, HttpServer, Response
from .oip import InferRequest, InferResponse

_log = logging.getLogger(__name__)

STATUS: Final[Mapping[str, int]] = {
    "agent.local.model.unknown": 404,
    "agent.local.request": 400,
    "agent.local.request.oversize": 413,
    "agent.model.input": 400,
    "agent.local.overload": 503,
    "agent.model.closed": 503,
    "agent.local.deadline": 503,
}

INLINE_BYTES: Final = 64 << 10
"""Up to here JSON is read and written on the spot: 1 ms; more would hold up other clients."""

COMPRESS_BYTES: Final = 512
"""Smaller answers are not compressed: they do not become smaller."""

_HEAVY_MAX: Final = 64  # large requests that may wait; their bytes are bounded by the server
_LOAD_MAX: Final = 16  # loads and unloads that may wait
_HEADER_SIZE: Final = b"inference-header-content-length"
_UNSUPPORTED: Final = {
    "cudasharedmemory": "CUDA shared memory is not supported; use system shared memory",
    "trace": "tracing is not supported by this server",
    "logging": "log settings cannot be changed over the network",
}


class Core(Facts, Protocol):
    """What this face needs of the local core."""

    def submit(
        self,
        request: InferRequest,
        done: Callable[[InferResponse | ShoalError], None],
        *,
        left_s: float | None = None,
    ) -> None:
        """Run a model in another thread and tell ``done``; what is refused at once is raised."""


class Lane:
    """A thread that does one thing after the other, of a bounded number; starts when needed."""

    def __init__(self, name: str, count_max: int) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._count_max = count_max
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock = threading.Lock()

    def put(self, act: Callable[[], None], *, refusable: bool = True) -> None:
        """Do ``act`` soon; it must not raise.

        Raises:
            OverloadError: Too much waits already, and ``refusable``.
        """
        with self._lock:
            if refusable and self._queue.qsize() >= self._count_max:
                raise OverloadError(
                    f"{self._count_max} requests wait in '{self._thread.name}' already",
                    hint="try again later",
                )
            self._queue.put(act)
            if self._thread.ident is None:
                self._thread.start()

    def close(self, wait_s: float) -> None:
        """Do what waits, for at most ``wait_s`` seconds."""
        with self._lock:
            if self._thread.ident is None:
                return
            self._queue.put(None)
        self._thread.join(wait_s)

    def _run(self) -> None:
        while (act := self._queue.get()) is not None:
            act()


class HttpFront:
    """The HTTP face of a core. States: new -> serving -> stopped; each once.

    Args:
        core: Answers the calls, from several threads at once.
        config: Where to listen, and the limits.

    Raises:
        ListenError: An address is taken, or is none; nothing was started.
    """

    def __init__(self, core: Core, config: HttpConfig) -> None:
        self._core = core
        self._limits = config.message
        self._heavy = Lane("http-large", _HEAVY_MAX)
        self._loads = Lane("http-load", _LOAD_MAX)
        self._server = HttpServer(self._handle, config)
        self.address = self._server.address
        """``HOST:PORT`` with the port that was chosen; None: not on TCP."""

    def start(self) -> None:
        """Take requests from now on."""
        self._server.start()

    def stop(self, drain_s: float) -> None:
        """Take no more clients, let requests under way end for ``drain_s`` s, then cut them."""
        self._server.stop(drain_s)
        self._heavy.close(drain_s)
        self._loads.close(drain_s)

    # ---- routing

    def _handle(self, request: Request, answer: Answer) -> None:
        try:
            self._route(request, answer)
        except Exception as exc:
            answer(refusal(exc))

    def _route(self, request: Request, answer: Answer) -> None:
        path = request.target.partition(b"?")[0].partition(b"#")[0].rstrip(b"/").decode("latin-1")
        if not path.startswith("/v2"):
            path = re.sub(r"^https?://[^/]*", "", path)  # the absolute form, RFC 9112 3.2.2
        for pattern, method, name in _ROUTES:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            if request.method != method and (method, request.method) != ("GET", "HEAD"):
                allowed = "GET, HEAD" if method == "GET" else method
                answer(_error(405, f"{path} takes {allowed}, not {request.method}", Allow=allowed))
                return
            named = {key: _segment(value or "") for key, value in found.groupdict().items()}
            getattr(self, name)(request, answer, **named)
            return
        for part, why in _UNSUPPORTED.items():
            if path.startswith(f"/v2/{part}"):
                answer(_error(501, why))
                return
        answer(_error(404, f"there is no {path:.200}"))

    # ---- the plain questions

    def _live(self, _: Request, answer: Answer) -> None:
        live = self._core.live()
        answer(_json({"live": live}, 200 if live else 503))

    def _ready(self, _: Request, answer: Answer) -> None:
        ready = self._core.ready()
        answer(_json({"ready": ready}, 200 if ready else 503))

    def _model_ready(self, _: Request, answer: Answer, model: str, version: str) -> None:
        ready = self._core.model_ready(model, version)
        answer(_json({"name": model, "ready": ready}, 200 if ready else 503))

    def _server_metadata(self, _: Request, answer: Answer) -> None:
        answer(_json(self._core.server_metadata()))

    def _model_metadata(self, _: Request, answer: Answer, model: str, version: str) -> None:
        answer(_json(self._core.model_metadata(model, version)))

    def _model_config(self, _: Request, answer: Answer, model: str, version: str) -> None:
        answer(_json(self._core.model_config(model, version)))

    def _stats(self, _: Request, answer: Answer, model: str = "", version: str = "") -> None:
        answer(_json(self._core.statistics(model, version)))

    def _index(self, request: Request, answer: Answer) -> None:
        ready = self._object(request).get("ready", False)
        if not isinstance(ready, bool):
            raise RequestError("'ready' must be true or false")
        answer(_json(self._core.repository_index(ready=ready)))

    def _load(self, request: Request, answer: Answer, model: str) -> None:
        parameters = self._object(request).get("parameters") or {}
        if not isinstance(parameters, dict):
            raise RequestError("'parameters' must be an object")
        self._loads.put(_told(answer, lambda: self._core.load(model, parameters)))

    def _unload(self, _: Request, answer: Answer, model: str) -> None:
        self._loads.put(_told(answer, lambda: self._core.unload(model)))

    def _shm_status(self, _: Request, answer: Answer, region: str = "") -> None:
        answer(_json(list(self._core.shm_status(region).values())))

    def _shm_register(self, request: Request, answer: Answer, region: str) -> None:
        given = self._object(request)
        key, offset, size = given.get("key"), given.get("offset", 0), given.get("byte_size")
        if not isinstance(key, str) or type(offset) is not int or type(size) is not int:
            raise RequestError(
                "a region needs 'key', a string, and 'byte_size', and may have 'offset', whole "
                "numbers of bytes"
            )
        self._core.shm_register(region, key, offset, size)
        answer(_json({}))

    def _shm_unregister(self, _: Request, answer: Answer, region: str = "") -> None:
        self._core.shm_unregister(region)
        answer(_json({}))

    # ---- inference

    def _infer(self, request: Request, answer: Answer, model: str, version: str) -> None:
        text = request.headers.get(_HEADER_SIZE)
        if text is not None and (len(text) > 18 or not text.isdigit()):
            raise RequestError("Inference-Header-Content-Length must be a number of bytes")
        header_size = None if text is None else int(text)
        json_size = len(request.body) if header_size is None else header_size
        if json_size > INLINE_BYTES or b"content-encoding" in request.headers:
            self._heavy.put(lambda: self._ask(request, answer, model, version, header_size))
        else:
            self._ask(request, answer, model, version, header_size)

    def _ask(
        self, request: Request, answer: Answer, model: str, version: str, header_size: int | None
    ) -> None:
        coding = codec.accepted(request.headers.get(b"accept-encoding", b""))
        values_max = self._limits.json_values_max

        def done(result: InferResponse | ShoalError) -> None:
            if isinstance(result, ShoalError):
                answer(refusal(result))
                return
            size = sum(len(each.data) for each in result.outputs if each.data is not None)
            if size > INLINE_BYTES and (coding or not wishes.binary):
                tell = partial(_tell, answer, result, wishes, coding, values_max)
                self._heavy.put(tell, refusable=False)
            else:
                _tell(answer, result, wishes, coding, values_max)

        try:
            body = self._body(request, self._limits.body_bytes_max)
            asked, wishes = codec.infer_request(
                model, version, body, header_size, values_max=values_max
            )
            self._core.submit(asked, done)
        except Exception as exc:
            answer(refusal(exc))

    def _body(self, request: Request, bytes_max: int) -> bytes:
        coding = request.headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
        if coding == "identity":
            return request.body
        if coding not in ("gzip", "deflate"):
            raise _CodingError(f"Content-Encoding '{coding:.40}' is not gzip or deflate")
        return codec.decompress(coding, request.body, bytes_max)

    def _object(self, request: Request) -> dict[str, Any]:
        """Return the object that a request without tensors has as its body."""
        if len(request.body) > INLINE_BYTES:
            raise codec.OversizeError(f"the body has more than {INLINE_BYTES} bytes")
        body = self._body(request, INLINE_BYTES)
        return codec.parse(body, values_max=self._limits.json_values_max)


class _CodingError(RequestError):
    """The body is compressed in a way that is not ours."""

    code = "agent.local.request.coding"


def refusal(error: Exception) -> Response:
    """Return the answer that says an error; one that is not ours is logged and told as internal."""
    if not isinstance(error, ShoalError):
        _log.error("an HTTP request failed", exc_info=error)
        return _error(500, f"internal error: {type(error).__name__}; see the log")
    text = f"{error}; {error.hint}" if error.hint else str(error)
    if isinstance(error, _CodingError):
        return _error(415, text, **{"Accept-Encoding": "gzip, deflate"})
    status = STATUS.get(error.code, 503 if error.retry else 500)
    return _error(status, text, **({"Retry-After": "1"} if status == 503 else {}))


def _tell(
    answer: Answer, result: InferResponse, wishes: codec.Wishes, coding: str, values_max: int
) -> None:
    """Answer with what a model said. Runs in any thread; raises nothing."""
    try:
        parts, header_size = codec.infer_response(result, wishes, values_max=values_max)
        headers = [("Content-Type", "application/json")]
        if header_size is not None:
            headers = [
                ("Content-Type", "application/octet-stream"),
                ("Inference-Header-Content-Length", str(header_size)),
            ]
        if coding and sum(map(len, parts)) >= COMPRESS_BYTES:
            parts = [codec.compress(coding, parts)]
            headers += [("Content-Encoding", coding), ("Vary", "Accept-Encoding")]
        made = Response(200, parts, tuple(headers))
    except Exception as exc:
        made = refusal(exc)
    answer(made)


def _told(answer: Answer, act: Callable[[], None]) -> Callable[[], None]:
    """Return ``act`` as one that answers when it is over, and raises nothing."""

    def run() -> None:
        try:
            act()
        except Exception as exc:
            answer(refusal(exc))
        else:
            answer(_json({}))

    return run


def _json(facts: Any, status: int = 200) -> Response:
    return Response(status, (codec.dumps(facts),))


def _error(status: int, text: str, **headers: str) -> Response:
    made = Response(status, (codec.dumps({"error": text}),))
    return Response(status, made.body, (*made.headers, *headers.items()))


def _segment(text: str) -> str:
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError as exc:
        raise RequestError("the path is not UTF-8") from exc


_MODEL: Final = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_REPOSITORY: Final = r"/v2/repository/models/(?P<model>[^/]+)"
_SHM: Final = r"/v2/systemsharedmemory"
_REGION: Final = _SHM + r"/region/(?P<region>[^/]+)"

_ROUTES: Final = [
    (re.compile(pattern), method, name)
    for pattern, method, name in (
        (_MODEL + "/infer", "POST", "_infer"),
        ("/v2/health/live", "GET", "_live"),
        ("/v2/health/ready", "GET", "_ready"),
        ("/v2", "GET", "_server_metadata"),
        ("/v2/models/stats", "GET", "_stats"),
        (_MODEL, "GET", "_model_metadata"),
        (_MODEL + "/ready", "GET", "_model_ready"),
        (_MODEL + "/config", "GET", "_model_config"),
        (_MODEL + "/stats", "GET", "_stats"),
        ("/v2/repository/index", "POST", "_index"),
        (_REPOSITORY + "/load", "POST", "_load"),
        (_REPOSITORY + "/unload", "POST", "_unload"),
        (_SHM + "/status", "GET", "_shm_status"),
        (_REGION + "/status", "GET", "_shm_status"),
        (_REGION + "/register", "POST", "_shm_register"),
        (_REGION + "/unregister", "POST", "_shm_unregister"),
        (_SHM + "/unregister", "POST", "_shm_unregister"),
    )
]
