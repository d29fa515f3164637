"""Ask a local ``shoal-agent serve`` from another program, in about ten microseconds.

with Client("vision") as client:                     # shoal-agent serve --shm vision ...
    outputs = client.infer("detector", {"x": window})

``Client("unix:/run/shoal.sock")`` and ``Client("http://127.0.0.1:8000")`` do the same over HTTP.
"""

from __future__ import annotations

from .client import Client
from .errors import (
    ClientError,
    ClientInputError,
    DeadlineError,
    OverloadedError,
    RingFullError,
    ServerFailedError,
    ServerGoneError,
    UnknownModelError,
)

__all__ = [
    "Client",
    "ClientError",
    "ClientInputError",
    "DeadlineError",
    "OverloadedError",
    "RingFullError",
    "ServerFailedError",
    "ServerGoneError",
    "UnknownModelError",
]
