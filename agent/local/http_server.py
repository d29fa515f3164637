"""Serve HTTP/1.1 on one thread: an epoll loop, no asyncio, one request at a time per connection.

    bytes --http_parser--> Request --handler(request, answer)--> answer(Response) --> bytes

``handler`` runs on the loop's thread and must not block; ``answer`` may be called from any thread,
once. Answers of pipelined requests come in the order of the requests, because the next one is only
handed out when the one before it has its answer.

Invariants:
    a connection waits for its client for a bounded time: for a head, a body, room to write, or
    the next request; while its request is with the handler it waits for nothing else;
    a connection too many is told 503 and closed at once;
    nothing more is read from a client that has an answer to come, or one to fetch.

Nothing here knows the protocol: the routes are ``http_front.py``'s.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final

from .errors import ListenError
from .http_parser import Budget, MessageLimits, Refusal, Request, Requests

_log = logging.getLogger(__name__)

READ_BYTES: Final = 256 << 10  # of one read; more does not make a large body faster
_JOIN_BYTES: Final = 64 << 10  # up to here copying into one send is cheaper than a gathering one
_OUT_BYTES: Final = 256 << 10  # answers of pipelined requests that may wait to be written
_PARTS: Final = 64  # of one gathering send; Linux takes 1024
_ACCEPTS: Final = 64  # in a row, before those who are connected get their turn
_BAD: Final = select.EPOLLHUP | select.EPOLLERR

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Where the HTTP face listens, and how much it takes at once."""

    address: str | None = "127.0.0.1:8000"
    """``HOST:PORT``, port 0: any free one. None: not on TCP."""

    socket: Path | None = None
    """Unix socket that speaks the same, mode 0600. None: none."""

    socket_group: str | None = None
    """Group whose users may connect to it too, by name or number: mode 0660. None: this user."""

    message: MessageLimits = field(default_factory=MessageLimits)
    """How large requests may be."""

    bodies_bytes_max: int = 256 << 20
    """Bodies of all requests under way, in bytes; a request beyond is 503."""

    connections_max: int = 1024
    """Clients at once; one more is told 503 and closed."""

    refusals_max: int = 256
    """Refused clients that may still fetch their 503; one more is closed without it."""

    head_s: float = 10.0
    """From the first byte of a request, or the connection, to the end of its head, in seconds."""

    body_s: float = 30.0
    """From the end of the head to the end of the body, in seconds."""

    write_s: float = 30.0
    """How long a client may take nothing of its answer, in seconds."""

    idle_s: float = 75.0
    """How long a connection may wait for its next request, in seconds."""

    linger_s: float = 1.0
    """How long a client may take to close after its last answer, in seconds."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if min(self.bodies_bytes_max, self.connections_max, self.refusals_max) < 1:
            raise ValueError("bodies_bytes_max, connections_max, refusals_max must be at least 1")
        if min(self.head_s, self.body_s, self.write_s, self.idle_s, self.linger_s) <= 0:
            raise ValueError("head_s, body_s, write_s, idle_s, linger_s must be above 0 seconds")
        if self.socket_group is not None and self.socket is None:
            raise ValueError("socket_group must come with socket")
        if self.address is None and self.socket is None:
            raise ValueError("address or socket must be given")


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; its body comes in parts that are sent one after the other."""

    status: int
    body: Sequence[Buffer] = ()
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


Answer = Callable[[Response], None]
Handler = Callable[[Request, Answer], None]


class _Connection:
    """One client. Used by the loop's thread only."""

    __slots__ = (
        "busy", "due", "ending", "key", "lingering", "mask", "out", "out_size", "refused",
        "requests", "sock", "written",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, requests: Requests, *, refused: bool) -> None:
        self.sock = sock
        self.requests = requests
        self.refused = refused
        self.busy = False  # a request is with the handler
        self.ending = False  # the last answer is in ``out``
        self.lingering = False  # all is written, the client may close
        self.mask = 0
        self.out: deque[Buffer] = deque()
        self.out_size = 0
        self.written = 0
        self.key: tuple[object, ...] = ()
        self.due = math.inf

    def push(self, *parts: Buffer) -> None:
        for part in parts:
            if len(part):
                self.out.append(part)
                self.out_size += len(part)


class HttpServer:
    """A listening HTTP server. States: new -> serving -> stopped; each once.

    Raises:
        ListenError: From the constructor: an address is taken or is none.
    """

    def __init__(self, handler: Handler, config: HttpConfig) -> None:
        self._handler = handler
        self._config = config
        self._budget = Budget(config.bodies_bytes_max)
        self._listeners: dict[int, socket.socket] = {}
        self._connections: dict[int, _Connection] = {}
        self._refused = 0
        self._answers: deque[tuple[_Connection, Request, Response]] = deque()
        self._lock = threading.Lock()
        self._woken = False
        self._stop_at = math.inf
        self._closing = False
        self._swept = 0.0
        self._date = (0, b"")
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._socket_id: tuple[int, int] | None = None
        self.address: str | None = None
        """``HOST:PORT`` on TCP, with the port that was chosen."""
        try:
            if config.address is not None:
                self.address = self._listen(_tcp(config.address))
            if config.socket is not None:
                self._listen(_unix(config.socket, config.socket_group))
                found = config.socket.stat()
                self._socket_id = (found.st_dev, found.st_ino)
        except BaseException:
            for each in self._listeners.values():
                each.close()
            raise
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def start(self) -> None:
        """Take requests from now on."""
        self._poll.register(self._wake, select.EPOLLIN)
        for fd in self._listeners:
            self._poll.register(fd, select.EPOLLIN)
        self._thread.start()

    def stop(self, drain_s: float) -> None:
        """Take no more clients, let requests under way end for ``drain_s`` s, then cut them."""
        if self._poll.closed:
            return
        if self._thread.ident is not None:
            self._stop_at = time.monotonic() + drain_s
            self._closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._unlisten()
        for each in list(self._connections.values()):
            self._close(each)
        self._poll.close()
        with self._lock:  # who answers now must not write to a file that is another's by then
            os.close(self._wake)
            self._wake = -1
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    # ---- the loop

    def _run(self) -> None:
        sweep_s = min(1.0, self._shortest() / 4)
        while True:
            now = time.monotonic()
            if self._closing:
                self._unlisten()
                for idle in list(self._connections.values()):
                    if idle.key[:1] == ("idle",) or idle.refused:
                        self._close(idle)
                if not self._connections or now >= self._stop_at:
                    return
            calling: list[socket.socket] = []
            for fd, events in self._poll.poll(0.02 if self._closing else sweep_s):
                if fd == self._wake:
                    self._deliver()
                elif fd in self._listeners:
                    calling.append(self._listeners[fd])
                elif fd in self._connections:
                    connection = self._connections[fd]
                    try:
                        self._serve(connection, events)
                    except OSError:  # the client is gone; what it asked may still run
                        self._close(connection)
                    except Exception:
                        _log.exception("an HTTP connection failed")
                        self._close(connection)
            for each in calling:  # last, or a new client could get a number that events are for
                self._accept(each)
            now = time.monotonic()
            if now - self._swept >= sweep_s:
                self._swept = now
                self._sweep(now)

    def _shortest(self) -> float:
        own = self._config
        return min(own.head_s, own.body_s, own.write_s, own.idle_s, own.linger_s)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # this client is gone already
                # No file is left: give up the spare one to close the client instead of spinning.
                if not self._turn_away(listener):
                    return
                continue
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            served = len(self._connections) - self._refused
            refused = served >= self._config.connections_max
            if refused and self._refused >= self._config.refusals_max:
                sock.close()
                continue
            self._refused += refused
            made = _Connection(sock, Requests(self._config.message, self._budget), refused=refused)
            self._connections[sock.fileno()] = made
            made.mask = select.EPOLLIN
            self._poll.register(sock.fileno(), made.mask)
            if refused:
                made.requests.ended = True
                text = f"the server has its {self._config.connections_max} clients; try later"
                made.requests.items.append(Refusal(503, text))
            try:
                self._advance(made)
            except OSError:
                self._close(made)

    def _turn_away(self, listener: socket.socket) -> bool:
        """Close a client that there is no file for; return whether there was one."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            listener.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False  # another thread took the file; the client waits in the backlog
        return True

    def _serve(self, connection: _Connection, events: int) -> None:
        if events & select.EPOLLIN:
            if connection.lingering:
                if not connection.sock.recv_into(self._buffer):
                    self._close(connection)
                return
            if connection.busy or connection.out or connection.requests.items:
                self._want(connection, connection.mask & ~select.EPOLLIN)
            else:
                size = connection.sock.recv_into(self._buffer)
                if not size:
                    self._close(connection)
                    return
                connection.requests.feed(self._buffer[:size])
        if events & _BAD:
            self._close(connection)
            return
        self._advance(connection)

    def _advance(self, connection: _Connection) -> None:
        """Do all that can be done for a connection now, then wait for the right thing."""
        requests = connection.requests
        while True:
            while requests.items and not connection.busy and not connection.ending:
                if connection.out_size > _OUT_BYTES:
                    break
                item = requests.items.popleft()
                if isinstance(item, Refusal):
                    body = json.dumps({"error": item.text}).encode()
                    self._put(connection, None, Response(item.status, (body,)))
                else:
                    self._handle(connection, item)
            if requests.continues and not (connection.busy or connection.out):
                requests.continues = False
                connection.push(b"HTTP/1.1 100 Continue\r\n\r\n")
            if connection.out and not self._flush(connection):
                break
            if connection.busy or connection.ending:
                break
            if not requests.items and not requests.continues:
                break
        if connection.ending and not connection.out and not connection.lingering:
            connection.lingering = True
            connection.sock.shutdown(socket.SHUT_WR)
        self._settle(connection)

    def _handle(self, connection: _Connection, request: Request) -> None:
        connection.busy = True
        told = False

        def answer(response: Response) -> None:
            nonlocal told
            assert not told, "a request is answered once"
            told = True
            if threading.get_ident() == self._thread.ident:
                self._put(connection, request, response)
                return
            self._answers.append((connection, request, response))
            with self._lock:
                if not self._woken and self._wake >= 0:
                    self._woken = True
                    os.eventfd_write(self._wake, 1)

        self._handler(request, answer)

    def _deliver(self) -> None:
        os.eventfd_read(self._wake)
        self._woken = False  # before looking: who comes later wakes again
        while self._answers:
            connection, request, response = self._answers.popleft()
            if connection.sock.fileno() < 0:
                continue  # nobody waits for it any more
            try:
                self._put(connection, request, response)
                self._advance(connection)
            except OSError:
                self._close(connection)

    def _put(self, connection: _Connection, request: Request | None, response: Response) -> None:
        """Note an answer to be written; ``request`` None is the end of the connection."""
        keep = request is not None and request.keep and not self._closing
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in response.headers]
        lines.append(f"Content-Length: {sum(map(len, response.body))}")
        if not keep:
            lines.append("Connection: close")
        elif request is not None and request.old:
            lines.append("Connection: keep-alive")
        head = "\r\n".join(lines).encode("latin-1") + self._dated()
        body = () if request is not None and request.method == "HEAD" else response.body
        if sum(map(len, body)) <= _JOIN_BYTES:
            connection.push(b"".join((head, *body)))
        else:
            connection.push(head, *body)
        if request is not None:
            connection.requests.give_back(len(request.body))
        connection.busy = False
        connection.ending = not keep

    def _dated(self) -> bytes:
        now = int(time.time())
        if self._date[0] != now:
            text = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now))
            self._date = (now, f"\r\nDate: {text}\r\n\r\n".encode())
        return self._date[1]

    def _flush(self, connection: _Connection) -> bool:
        """Write what goes; return whether all went."""
        out = connection.out
        while out:
            try:
                if len(out) == 1:
                    sent = connection.sock.send(out[0])
                else:
                    sent = connection.sock.sendmsg([out[i] for i in range(min(len(out), _PARTS))])
            except BlockingIOError:
                return False
            connection.written += sent
            connection.out_size -= sent
            while out and sent >= len(out[0]):
                sent -= len(out.popleft())
            if sent:
                out[0] = memoryview(out[0])[sent:]
        return True

    def _settle(self, connection: _Connection) -> None:
        """Choose what to wait for, and until when."""
        requests, own = connection.requests, self._config
        key: tuple[object, ...]
        if connection.lingering:
            key, wait_s, mask = ("linger",), own.linger_s, select.EPOLLIN
        elif connection.out:
            key, wait_s, mask = ("write", connection.written), own.write_s, select.EPOLLOUT
        elif connection.busy:
            # Stays readable in the poll until something comes: most clients wait for their answer.
            key, wait_s, mask = ("busy",), math.inf, connection.mask & select.EPOLLIN
        elif requests.stage == "between":
            first = requests.begun == 0
            # The count, or the time would not begin anew after a request that the loop answers.
            key, wait_s = ("idle", requests.begun), own.head_s if first else own.idle_s
            mask = select.EPOLLIN
        else:
            key = (requests.stage, requests.begun)
            wait_s = own.head_s if requests.stage == "head" else own.body_s
            mask = select.EPOLLIN
        if key != connection.key:
            connection.key = key
            connection.due = time.monotonic() + wait_s
        self._want(connection, mask)

    def _want(self, connection: _Connection, mask: int) -> None:
        if mask != connection.mask:
            connection.mask = mask
            self._poll.modify(connection.sock.fileno(), mask)

    def _sweep(self, now: float) -> None:
        for each in list(self._connections.values()):
            if now < each.due:
                continue
            if each.requests.stage == "between" or each.out or each.lingering:
                self._close(each)
                continue
            each.requests.ended = True
            each.requests.items.append(Refusal(408, "the request did not come in time"))
            try:
                self._advance(each)
            except OSError:
                self._close(each)

    def _close(self, connection: _Connection) -> None:
        fd = connection.sock.fileno()
        if fd < 0:
            return
        del self._connections[fd]
        self._refused -= connection.refused
        connection.requests.close()
        connection.out.clear()
        self._poll.unregister(fd)
        connection.sock.close()

    # ---- listening

    def _listen(self, sock: socket.socket) -> str:
        self._listeners[sock.fileno()] = sock
        sock.setblocking(False)
        name = sock.getsockname()
        if sock.family == socket.AF_INET6:
            return f"[{name[0]}]:{name[1]}"
        return str(name) if sock.family == socket.AF_UNIX else f"{name[0]}:{name[1]}"

    def _unlisten(self) -> None:
        for each in self._listeners.values():
            each.close()  # epoll forgets it by itself
        self._listeners.clear()
        path, own = self._config.socket, self._socket_id
        if path is None or own is None:
            return
        self._socket_id = None
        try:
            found = path.lstat()
            if (found.st_dev, found.st_ino) == own:  # else another server's by now
                path.unlink()
        except OSError as exc:
            _log.warning("cannot remove the socket %s: %s", path, exc)


def _tcp(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise OSError("it is not HOST:PORT")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, name = found[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(name)
            made.listen(4096)  # the kernel cuts it to its own limit
        except BaseException:
            made.close()
            raise
    except OSError as exc:
        raise ListenError(
            f"cannot listen on {address!r} for HTTP: {exc}; nothing was started",
            hint="give HOST:PORT of a free port of this machine",
        ) from exc
    return made


def _unix(path: Path, group: str | None) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        gid = None if group is None else _gid(group)
        _take_over(path)
        made.bind(str(path))
        try:  # nobody can connect before listen, so there is no gap
            if gid is not None:
                os.chown(path, -1, gid)
            path.chmod(0o600 if gid is None else 0o660)
            made.listen(4096)
        except OSError:
            path.unlink()
            raise
    except OSError as exc:
        made.close()
        raise ListenError(
            f"cannot listen on the socket {path} for HTTP: {exc}; nothing was started",
            hint="give a path, up to 107 bytes, in a folder you may write, and a group you are in",
        ) from exc
    return made


def _gid(group: str) -> int:
    import grp  # most servers need none

    if group.isascii() and group.isdigit() and int(group) < (1 << 32) - 1:  # that is chown's "keep"
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as exc:
        raise OSError(f"there is no group {group!r:.80}") from exc


def _take_over(path: Path) -> None:
    """Remove a socket that nobody listens on; anything else in the way is an error."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "it is a file that is no socket", str(path))
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog is a living server too
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "a server is listening there")
