"""Run gRPC methods on a bounded number of threads; refuse what is too much, at once.

    call --> Gate.service --under calls_max--> a thread of its own --> method
                          --at calls_max-----> refused: UNAVAILABLE, on threads kept for that

Invariants:
    a call that was accepted has a thread: none waits behind another for one;
    health methods and refusals have threads that no other call can take;
    a refused call's message is not read, so refusing costs the same for any size.

Nothing here knows the protocol: the methods are ``grpc_front.py``'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from .errors import ListenError


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcConfig:
    """Where the gRPC face listens, and how much it takes at once."""

    address: str = "127.0.0.1:8001"
    """``HOST:PORT`` (port 0: any free one) or ``unix:PATH``."""

    message_bytes_max: int = 64 << 20
    """Size of one message after decompression, in bytes; a larger one is RESOURCE_EXHAUSTED."""

    calls_max: int = 64
    """Calls under way at once, each on its own thread; one more is UNAVAILABLE."""

    streams_max: int = 16
    """Streams among them: a stream holds its thread until the client ends it."""

    refusals_max: int = 1024
    """Refused calls whose answer is under way; beyond them grpc says RESOURCE_EXHAUSTED itself."""

    keepalive_s: float = 60.0
    """A silent connection is probed after this many seconds, and cut if that is not answered."""

    keepalive_answer_s: float = 20.0
    """Seconds that a probe may remain unanswered."""

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("message_bytes_max", "calls_max", "streams_max", "refusals_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.streams_max > self.calls_max:
            raise ValueError("streams_max must not be above calls_max: streams are calls")
        if min(self.keepalive_s, self.keepalive_answer_s) <= 0:
            raise ValueError("keepalive_s and keepalive_answer_s must be above 0 seconds")


@dataclass(frozen=True, slots=True)
class Method:
    """One method: bytes in, bytes out. Only ``run`` of a stream takes an iterator and is one."""

    run: Callable[[Any, grpc.ServicerContext], Any]
    stream: bool = False
    health: bool = False
    """Answered even when every thread is taken."""


class _Pool(ThreadPoolExecutor):
    """Threads that count what is under way; grpc asks its one serving thread to submit."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.busy = 0
        self._lock = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._lock:
            self.busy += 1
        try:
            made = super().submit(fn, *args, **kwargs)
        except RuntimeError:  # shut down: the call is lost with the server
            self._done(None)
            raise
        made.add_done_callback(self._done)
        return made

    def _done(self, _: Future[Any] | None) -> None:
        with self._lock:
            self.busy -= 1


class Gate(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    """Finds the method of a call, or the refusal. Used by grpc's serving thread only."""

    def __init__(self, methods: Mapping[str, Method], config: GrpcConfig) -> None:
        self.calls = _Pool(config.calls_max, "grpc-call")
        self._streams = _Pool(config.streams_max, "grpc-stream")
        self._spare = _Pool(4, "grpc-spare")  # health and refusals are over in microseconds
        self._config = config
        self._streaming = {name for name, method in methods.items() if method.stream}
        self._health = {name for name, method in methods.items() if method.health}
        self._handlers = {name: self._handler(method) for name, method in methods.items()}
        self._refusal = grpc.stream_stream_rpc_method_handler(self._on(self._spare, _refuse))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return what answers this call; None lets grpc say UNIMPLEMENTED."""
        name = handler_call_details.method
        handler = self._handlers.get(name)
        if handler is None or name in self._health:
            return handler
        streams = self._streams.busy
        if name in self._streaming and streams >= self._config.streams_max:
            return self._refusal
        return self._refusal if self.calls.busy + streams >= self._config.calls_max else handler

    def close(self) -> None:
        """Give the threads back; they end when what they do has ended."""
        for pool in (self.calls, self._streams, self._spare):
            pool.shutdown(wait=False)

    def _handler(self, method: Method) -> Any:
        if method.stream:
            return grpc.stream_stream_rpc_method_handler(self._on(self._streams, method.run))
        pool = self._spare if method.health else self.calls
        return grpc.unary_unary_rpc_method_handler(self._on(pool, method.run))

    @staticmethod
    def _on(pool: _Pool, run: Callable[..., Any]) -> Callable[..., Any]:
        def behaviour(request: Any, context: grpc.ServicerContext) -> Any:
            return run(request, context)

        # grpc looks for this name on the function; without it calls run on the default pool, and
        # what is lost is only that health answers under overload.
        behaviour.experimental_thread_pool = pool  # type: ignore[attr-defined]
        return behaviour


def _refuse(_: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.UNAVAILABLE, "server is at its limit of calls; try again later")
    yield b""  # pragma: no cover - abort raises; this makes it a generator, as a stream must be


class GrpcServer:
    """A listening gRPC server. States: new -> serving -> stopped; each once.

    Raises:
        ListenError: From the constructor: the address is taken or is none.
    """

    def __init__(self, methods: Mapping[str, Method], config: GrpcConfig) -> None:
        self._gate = Gate(methods, config)
        self._server = grpc.server(
            self._gate.calls,
            handlers=(self._gate,),
            options=(
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                ("grpc.max_receive_message_length", config.message_bytes_max),
                ("grpc.max_send_message_length", -1),  # outputs are as large as the model's are
                ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", int(config.keepalive_answer_s * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.max_metadata_size", 16 << 10),  # bytes; no method here reads any
            ),
            maximum_concurrent_rpcs=config.calls_max + config.refusals_max,
        )
        try:
            port = self._server.add_insecure_port(config.address)
        except RuntimeError as exc:
            port, reason = 0, str(exc)
        else:
            reason = "not an address"
        if not port:
            self._gate.close()
            raise ListenError(
                f"cannot listen on {config.address!r} for gRPC: {reason}; nothing was started",
                hint="give HOST:PORT of a free port, or unix:PATH in a folder you may write",
            )
        unix = config.address.startswith("unix:")
        host = config.address.rpartition(":")[0]
        self.address = config.address if unix else f"{host}:{port}"
        """What a client dials, with the port that was chosen."""

    def start(self) -> None:
        """Take calls from now on."""
        self._server.start()

    def stop(self, drain_s: float) -> None:
        """Refuse new calls, let those under way end for ``drain_s`` seconds, then cut them."""
        self._server.stop(drain_s).wait()
        self._gate.close()
