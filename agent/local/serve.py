"""Serve models to this device's programs, with no fleet: `shoal-agent serve`.

    files --LocalCore--> models <-- faces: HTTP (TCP, Unix socket), gRPC, shared-memory ring

Here is only the wiring and the order of start and end. Addresses are taken before models are
loaded, so that a taken one is told at once; a face that was not asked for is not even imported:
gRPC alone costs 30 MB.

At SIGTERM or SIGINT: not ready from that moment, new requests are 503, those under way end for
``DRAIN_S`` seconds. After ``END_S`` the process ends even if a model never does, with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from .config import CoreConfig, ModelLimits, ModelSource

if TYPE_CHECKING:
    from .http_server import HttpConfig

DRAIN_S: Final = 7.0  # for requests under way
CUT_S: Final = 1.0  # for their answers to be written, and sockets to close; all faces at once
FILES: Final = 4096  # one for each client; many systems give 1024 at first
END_S: Final = 9.5  # from the signal to the end, whatever runs: native code cannot be interrupted
ENDS: Final = {signal.SIGTERM, signal.SIGINT}

_log = logging.getLogger(__name__)


class _Face(Protocol):
    def start(self) -> None: ...

    def stop(self, drain_s: float) -> None: ...


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    text = "Serve models on this device over HTTP, gRPC, a Unix socket or shared memory."
    made = commands.add_parser("serve", help=text, description=text)
    made.add_argument(
        "--model",
        action="append",
        default=[],
        type=_model,
        metavar="NAME=PATH",
        help="serve this .onnx or .tflite file as NAME; repeatable",
    )
    made.add_argument(
        "--http", metavar="HOST:PORT", help="Open Inference Protocol v2 over HTTP; port 0: any"
    )
    made.add_argument("--grpc", metavar="HOST:PORT", help="the same over gRPC")
    made.add_argument(
        "--socket", type=Path, metavar="PATH", help="HTTP over a Unix socket, for this user only"
    )
    made.add_argument(
        "--socket-group", metavar="GROUP", help="let the users of this group connect to it too"
    )
    made.add_argument("--shm", metavar="NAME", help="shared-memory ring, for shoal.agent.client")
    for option, default, text in (
        ("clients", 32, "clients of the ring at a time"),
        ("request-bytes", 768 << 10, "room for the inputs of one call in the ring"),
        ("response-bytes", 256 << 10, "room for the outputs of one call in the ring"),
    ):
        made.add_argument(
            f"--shm-{option}", type=int, default=default, metavar="N", help=f"{text} ({default})"
        )
    made.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads inside one call (1)"
    )
    made.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait per model (64)"
    )
    made.add_argument(
        "--deadline-ms",
        type=int,
        default=10_000,
        metavar="N",
        help="longest that a request may wait for its turn, in ms (10000)",
    )
    made.add_argument(
        "--batch-max",
        type=int,
        default=1,
        metavar="N",
        help="put requests together up to N rows; only for models whose first axis is a batch (1)",
    )
    made.add_argument(
        "--batch-wait-us",
        type=int,
        default=0,
        metavar="N",
        help="how long a request may wait for others to run with, in us (0)",
    )
    made.add_argument(
        "--allow-load", type=Path, metavar="DIR", help="let clients load models of this folder"
    )
    made.set_defaults(call=serve)


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    # Here, not above: other commands of shoal-agent need the parser only.
    from ..runtime import Runtime
    from .core import LocalCore
    from .http_front import HttpFront

    # Blocked before any thread starts, so that only sigwait in _watch takes them.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        config, http = _configs(arguments)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    _raise_files()
    ending = threading.Event()
    threading.Thread(target=_watch, args=(ending,), name="signals", daemon=True).start()
    with ExitStack() as ended:
        runtime = ended.enter_context(Runtime())
        core = LocalCore(config, runtime.load)
        ended.callback(core.drain, 0.0)
        faces: list[_Face] = []
        addresses: list[str] = []
        if http is not None:
            front = HttpFront(core, http)
            faces.append(front)
            ended.callback(front.stop, 0.0)
            if front.address is not None:
                addresses.append(f"http://{front.address}")
            if http.socket is not None:
                addresses.append(f"unix:{http.socket}")
        if arguments.grpc is not None:
            from .grpc_front import GrpcFront
            from .grpc_server import GrpcConfig

            grpc = GrpcFront(core, GrpcConfig(address=arguments.grpc))
            faces.append(grpc)
            ended.callback(grpc.stop, 0.0)
            addresses.append(f"grpc://{grpc.address}")
        if arguments.shm is not None:
            from .ring_front import RingConfig, RingFront

            try:
                ring_config = RingConfig(
                    clients_max=arguments.shm_clients,
                    request_bytes=arguments.shm_request_bytes,
                    response_bytes=arguments.shm_response_bytes,
                )
            except ValueError as exc:
                print(f"error: {exc}", file=sys.stderr)
                return 2
            ring = RingFront(core, arguments.shm, ring_config, lane=core.lane)
            faces.append(ring)
            ended.callback(ring.stop, 0.0)
            addresses.append(f"shm:{arguments.shm}")
        core.start()
        _trim()
        for face in faces:
            face.start()
        names = " ".join(each.name for each in config.models)
        for each in addresses:
            print(f"ready: {each} {names}".rstrip(), flush=True)
        ending.wait()
        core.drain(DRAIN_S)
        ended.pop_all()
        for face in faces:
            face.stop(CUT_S / len(faces))
        runtime.close()
    return 0


def _configs(arguments: argparse.Namespace) -> tuple[CoreConfig, HttpConfig | None]:
    """Return what the command line says.

    Raises:
        ValueError: A number is out of range, a name is bad or comes twice, or nobody could ask.
    """
    if not arguments.model and arguments.allow_load is None:
        raise ValueError("nothing to serve: give --model NAME=PATH or --allow-load DIR")
    limits = ModelLimits(
        threads=arguments.threads,
        queue_max=arguments.queue,
        wait_s_max=arguments.deadline_ms / 1000,
        batch_max=arguments.batch_max,
        batch_wait_us=arguments.batch_wait_us,
    )
    models = tuple(ModelSource(name=n, path=p, limits=limits) for n, p in arguments.model)
    config = CoreConfig(models=models, allow_load=arguments.allow_load, load_limits=limits)
    where = (arguments.http, arguments.socket, arguments.socket_group)
    if where != (None, None, None):
        from .http_server import HttpConfig

        address, path, group = where
        return config, HttpConfig(address=address, socket=path, socket_group=group)
    if arguments.grpc is None and arguments.shm is None:
        raise ValueError("nobody could ask: give --http, --grpc, --socket or --shm")
    return config, None


def _model(text: str) -> tuple[str, Path]:
    name, found, path = text.partition("=")
    if not found or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)


def _watch(ending: threading.Event) -> None:
    """Wait for the signal, tell it, and see to it that the process ends."""
    number = signal.sigwait(ENDS)
    _log.info("%s: ending", signal.Signals(number).name)
    ending.set()
    time.sleep(END_S)
    _log.error("a model still runs after %.1f s; ended without it", END_S)
    os._exit(1)


def _trim() -> None:
    """Give the memory back that loading needed for a moment: 4 MB for a model of 1 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
    if trim is not None:
        trim(0)


def _raise_files() -> None:
    """Allow as many open files as there may be clients; a lower hard limit stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
